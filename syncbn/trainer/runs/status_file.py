"""status.json: what a run is doing now, for whoever looks at it from outside."""

import json
import logging
import math
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from syncbn.trainer.errors import one_line
from syncbn.trainer.files import put_file
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs import lock
from syncbn.trainer.runs.lock import now

NAME = "status.json"
LIVE = ("starting", "training", "evaluating")
ENDED = ("preempted", "failed", "finished")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What status.json holds. Times are UTC, ISO 8601; a figure that is not known yet is null.

    state: one of LIVE or ENDED. A process that was killed cannot change it: that nobody holds the lock beside it tells.
    steps: those of the whole training.
    images_per_s: of all ranks together, since the log line before.
    objective: what the last evaluation came to, as in result.json.
    checkpoint: the file in checkpoints/ that the run would go on from, and its step.
    restarts: how often the run's ranks were started again, by launch.max_restarts, torchrun or the same command.
    host, pid: of rank 0. started: when these ranks were.
    error: why it failed.
    """

    state: str
    step: int
    steps: int
    epoch: float | int
    images_per_s: float | int | None
    objective: float | int | None
    checkpoint: str | None
    checkpoint_step: int | None
    restarts: int
    world_size: int
    host: str
    pid: int
    started: str
    updated: str
    error: str | None = None


class Pulse:
    """Rank 0's word on its run, in status.json: one call and one small write for each change. It never raises.

    Nothing waits for the disk: after a crash of the machine the file may be an old one, or empty.
    """

    def __init__(self, path: Path, *, step: int, steps: int, epoch: float, world_size: int):
        self.path, self.warned = path, False
        self.status = Status(
            state="starting",
            step=step,
            steps=steps,
            epoch=epoch,
            images_per_s=None,
            objective=None,
            checkpoint=None,
            checkpoint_step=None,
            restarts=_starts_before(path),
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=now(),
            updated=now(),
        )

    def tell(self, state: str, checkpoint: Path | None, **figures: Any) -> None:
        """Write what the run is doing, with what has changed of its figures."""
        figures = {name: _finite(value) for name, value in figures.items()}
        self.status = replace(
            self.status,
            state=state,
            checkpoint=checkpoint and checkpoint.name,
            checkpoint_step=checkpoint and int(checkpoint.stem.removeprefix("step_")),
            updated=now(),
            **redacted(figures),
        )
        try:
            _write_status(self.path, self.status)
        except OSError as error:
            if not self.warned:
                log.warning("%s cannot be written (%s): training goes on, and it tells what was", self.path, error)
            self.warned = True


def blame(path: Path, rank: int, cause: str, *, sure: bool, since: str) -> None:
    """Have a run whose ranks have failed tell the cause that their launcher knows. It never raises.

    A run that was not started since then, has ended in order or is another job's by now is left as it is.

    rank: the one to blame. sure: the cause is its own word; else what rank 0 has told stands as well.
    """
    with suppress(OSError, ValueError):
        status = read_status(path)
        if status.state not in (*LIVE, "failed") or when(status.started) < when(since) or lock.holder(path.parent):
            return
        if status.error and not sure:
            cause = f"{cause} (rank 0: {status.error})" if rank else status.error
        _write_status(path, replace(status, state="failed", error=one_line(redacted(cause)), updated=now()))


def _write_status(path: Path, status: Status) -> None:
    with put_file(path, on_disk=False) as file:
        file.write(json.dumps(asdict(status), indent=1).encode() + b"\n")


def read_status(path: Path) -> Status:
    """What a run has told. Raises FileNotFoundError, another OSError, or ValueError if it is no status."""
    written = json.loads(path.read_text())
    if not isinstance(written, dict):
        raise ValueError("it is no object")
    values = {}
    for field in fields(Status):
        values[field.name] = value = written.get(field.name)
        if not isinstance(value, field.type):  # pyright: ignore[reportArgumentType]
            raise ValueError(f"{field.name} is {value!r}")
    if values["state"] not in LIVE + ENDED:
        raise ValueError(f"state is {values['state']!r}")
    for time in values["started"], values["updated"]:
        when(time)
    return Status(**values)


def when(time: str) -> datetime:
    """A time of a status. Raises ValueError."""
    moment = datetime.fromisoformat(time)
    if moment.tzinfo is None:
        raise ValueError(f"{time} has no time zone")
    return moment


def _starts_before(path: Path) -> int:
    """How often the run's ranks have been started already."""
    try:
        return read_status(path).restarts + 1
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        return 1  # a start has left it; how many there were before is lost


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
