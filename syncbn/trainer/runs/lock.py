"""The lock on a run: one job at a time writes to its folder, and a job that is killed leaves nothing locked.

It is a POSIX record lock (fcntl(2)) on a file in the folder: the kernel, or an NFS server, takes it off when the
process that holds it is gone, in whatever way. It is the process's own: what it forks, such as the processes that load
data, does not hold it. The process must not open the file again, as closing it would give the lock back.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from syncbn.trainer.errors import UserError

NAME = "run.lock"
PATIENCE_S = 10.0  # for a job that is just ending, as one does whose ranks are started again
PATIENCE_ELSEWHERE_S = 100.0  # for one on another host: an NFS server keeps a dead host's locks for 90 s
SILENT_S = 1.0  # waiting that is not worth a line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, by its own word; since: UTC, ISO 8601."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"a job on host {self.host}, pid {self.pid}, since {self.since}"


@contextmanager
def held(folder: Path, longest_s: float) -> Iterator[None]:
    """Hold the run's lock; its folder is made for it, and goes with it if nothing else is in it.

    longest_s: how long to wait at most, whoever holds it.

    Raises UserError if another process holds it for longer than a job takes to end, or nothing can be written there.
    """
    handle = _take(folder, longest_s)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (folder / NAME).unlink()  # before the lock is given back: it is still ours to remove
                folder.rmdir()
            os.close(handle)


def holder(folder: Path) -> Holder | None:
    """Who holds the lock of a run; None if nobody does. Not for the process that holds it."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read_holder(handle) if _is_held(error) else None
    else:
        return None
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Remove the file that a job left which was killed; nothing, if a job holds it."""
    with suppress(OSError):
        handle = os.open(folder / NAME, os.O_RDWR)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(handle, folder / NAME):
                (folder / NAME).unlink()
        finally:
            os.close(handle)


def now() -> str:
    """The time, UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _take(folder: Path, longest_s: float) -> int | None:
    """The file, locked; None where files cannot be locked."""
    began, said = time.monotonic(), False
    while True:
        handle = _opened(folder)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = _read_holder(handle)
            os.close(handle)
            if not _is_held(error):
                log.warning("%s cannot be locked (%s): give no two jobs one run.name", folder, error.strerror)
                return None
        else:
            if _is_there(handle, folder / NAME):
                _write_holder(handle)
                return handle
            os.close(handle)  # the one that held it has removed it
            continue
        waited_s = time.monotonic() - began
        patience_s = min(longest_s, PATIENCE_S if other.host == socket.gethostname() else PATIENCE_ELSEWHERE_S)
        if waited_s > patience_s:
            raise UserError(
                f"{folder} is in use by {other}: one job at a time writes to a run; let that one end, or choose "
                "another run.name="
            )
        if waited_s > SILENT_S and not said:
            line = f"{folder} is in use by {other}: waiting {patience_s:.0f} s for it to end"
            print(line, file=sys.stderr, flush=True)
            said = True
        time.sleep(0.1)


def _opened(folder: Path) -> int:
    for tries_left in reversed(range(100)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            # Another job may have taken its folder away meanwhile, as it was refused or had nothing to keep; or while
            # mkdir, which found something there, looked whether it is a folder
            if isinstance(error, FileNotFoundError | FileExistsError) and tries_left:
                continue
            mend = "mend that, or say with run.root= where runs are to lie"
            raise UserError(f"{folder} cannot be written to ({error.strerror}): {mend}") from None
    raise AssertionError


def _is_held(error: OSError) -> bool:
    return error.errno in (errno.EACCES, errno.EAGAIN)


def _is_there(handle: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _write_holder(handle: int) -> None:
    """Write down who holds it; a full disk costs no more than the word."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), now()))).encode(), 0)


def _read_holder(handle: int) -> Holder:
    """Who holds it, as far as it is told."""
    try:
        written = json.loads(os.pread(handle, 10_000, 0))
        return Holder(str(written["host"]), int(written["pid"]), str(written["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder(socket.gethostname(), 0, "just now")
