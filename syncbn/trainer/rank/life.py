"""One rank's life: it finds its config, runs it, and tells how it ended."""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from syncbn.trainer import environment, world
from syncbn.trainer.config import Config, from_yaml
from syncbn.trainer.errors import FAILED, USER_ERROR, UserError, one_line
from syncbn.trainer.rank.agreement import alike
from syncbn.trainer.rank.diagnosis import LostRank
from syncbn.trainer.rank.evaluate import evaluate
from syncbn.trainer.rank.train import train
from syncbn.trainer.redact import redacted

# Files beside the config that was handed over, for the launcher: rank 0's exit code, and why each rank ended
EXIT_CODE, REASON = "exit_code", "reason"
log = logging.getLogger(__name__)


def as_rank(source: Callable[[], Config] | Path, launcher: int | None = None) -> int:
    """Be one rank of a run: its exit code. A UserError is one line, told by one rank; so is a traceback.

    source: of the config; or the file that it was handed over in, by the process that started this one. Beside it goes
        why this rank ended, and rank 0's exit code, for that process to tell. Else the reason goes to stderr.
    launcher: the pid of the process that started it, if it is known.
    """
    handed_over = source if isinstance(source, Path) else None
    reason = handed_over and handed_over.with_name(f"{REASON}{environment.rank()}")
    if handed_over:
        environment.show_title(f"syncbn: rank {environment.rank()} of {environment.size()}, {handed_over}")
        environment.set_scratch(handed_over.parent)
    environment.end_with_launcher(launcher)
    environment.print_any_text()
    try:
        config = alike(source if callable(source) else lambda: from_yaml(source.read_text()))
        ranks = world.join(config.launch, world.meet())
        code = evaluate(config, ranks) if config.task.mode == "evaluate" else train(config, ranks)
    except UserError as error:
        code = USER_ERROR
        _refuse(error, reason)
    except Exception as error:
        code = FAILED
        _fail(error, reason)
    else:
        world.leave()
    if handed_over and environment.rank() == 0:
        handed_over.with_name(EXIT_CODE).write_text(str(code))
    return code


def _refuse(error: UserError, reason: Path | None) -> None:
    """Tell what the user can mend; of all ranks that say the same, rank 0 alone."""
    if environment.rank() == 0 or not error.on_every_rank:
        world.first_failure(redacted(f"{error}"))
        if not (reason and _written(reason, f"{error}")):
            print(redacted(f"error: {error}"), file=sys.stderr, flush=True)
    if error.on_every_rank:
        world.word_of_rank_0("", patience_s=30)


def _fail(error: Exception, reason: Path | None) -> None:
    """Tell an error that nobody foresaw: the first rank with its traceback, others in a line if it is another."""
    log.info("rank %d failed", environment.rank(), exc_info=error)
    if isinstance(error, LostRank):
        print(redacted(f"rank {environment.rank()} lost another: {error}"), file=sys.stderr, flush=True)
        return
    line = one_line("; ".join("".join(traceback.format_exception_only(error)).strip().splitlines()))
    first, said = world.first_failure(redacted(line))
    if first == environment.rank():
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
        if not (reason and _written(reason, line)):
            print(redacted(f"error: rank {first} failed: {line}"), file=sys.stderr, flush=True)
    elif redacted(line) != said:
        print(redacted(f"rank {environment.rank()} failed after rank {first}: {line}"), file=sys.stderr, flush=True)


def _written(path: Path, line: str) -> bool:
    with suppress(OSError):  # a full disk
        path.write_text(redacted(line))
        return True
    return False


if __name__ == "__main__":
    sys.exit(as_rank(Path(sys.argv[1]), int(sys.argv[2])))
