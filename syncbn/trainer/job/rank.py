"""One rank's life: it finds its config, runs it, and tells how it ended."""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from syncbn.trainer import environment, world
from syncbn.trainer.config import Config, from_yaml
from syncbn.trainer.errors import FAILED, USER_ERROR, UserError, one_line
from syncbn.trainer.job.agreement import alike
from syncbn.trainer.job.diagnosis import LostRank
from syncbn.trainer.job.evaluate import evaluate
from syncbn.trainer.job.run import train
from syncbn.trainer.redact import redacted

# Files beside the config that was handed over, for the launcher: rank 0's exit code, and why each rank ended
EXIT_CODE, REASON = "exit_code", "reason"
log = logging.getLogger(__name__)


def as_rank(find_config: Callable[[], Config], launcher: int | None = None, handed_over: Path | None = None) -> int:
    """Be one rank of a run: its exit code. A UserError is one line, told by one rank; so is a traceback.

    launcher: the pid of the process that started it, if it is known.
    handed_over: the file that the config was handed over in; beside it goes why this rank ended, for the launcher to
    tell. None: that goes to stderr.
    """
    reason = handed_over and handed_over.with_name(f"{REASON}{environment.rank()}")
    environment.end_with_launcher(launcher)
    environment.print_any_text()
    try:
        config = alike(find_config)
        ranks = world.join(config.launch, world.meet())
        code = evaluate(config, ranks) if config.task.mode == "evaluate" else train(config, ranks)
    except UserError as error:
        told = environment.rank() > 0 and error.on_every_rank
        if not told:
            world.first_failure(redacted(f"{error}"))
            if not (reason and _written(reason, f"{error}")):
                print(redacted(f"error: {error}"), file=sys.stderr, flush=True)
        if error.on_every_rank:
            world.word_of_rank_0("", patience_s=30)
        return USER_ERROR
    except Exception as error:
        log.info("rank %d failed", environment.rank(), exc_info=True)
        if isinstance(error, LostRank):
            print(redacted(f"rank {environment.rank()} lost another: {error}"), file=sys.stderr, flush=True)
        else:
            _tell(error, reason)
        return FAILED
    world.leave()
    return code


def _tell(error: Exception, reason: Path | None) -> None:
    """Print an error that nobody foresaw, as the first rank with its traceback, else in a line if it is another."""
    line = one_line("; ".join("".join(traceback.format_exception_only(error)).strip().splitlines()))
    first, said = world.first_failure(redacted(line))
    if first == environment.rank():
        print(redacted(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        if not (reason and _written(reason, line)):
            print(redacted(f"error: rank {first} failed: {line}"), file=sys.stderr, flush=True)
    elif redacted(line) != said:
        print(redacted(f"rank {environment.rank()} failed after rank {first}: {line}"), file=sys.stderr, flush=True)


def _written(path: Path, line: str) -> bool:
    with suppress(OSError):  # a full disk
        path.write_text(redacted(line))
        return True
    return False


def as_started(handed_over: Path, launcher: int) -> NoReturn:
    """Be the rank that the environment says, of a run whose config was handed over in a file, and end with it."""
    environment.show_title(f"syncbn: rank {environment.rank()} of {environment.size()}, {handed_over}")
    environment.set_scratch(handed_over.parent)
    exit_code = as_rank(lambda: from_yaml(handed_over.read_text()), launcher, handed_over)
    if environment.rank() == 0:
        handed_over.with_name(EXIT_CODE).write_text(str(exit_code))
    sys.exit(exit_code)


if __name__ == "__main__":
    as_started(Path(sys.argv[1]), int(sys.argv[2]))
