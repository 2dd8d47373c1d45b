"""Files that are whole, or not there; and a folder for temporary ones that does not outlive its maker for long."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from syncbn.trainer.errors import UserError

BESIDE = ".tmp"  # ends the name of what is not whole yet
SCRATCH = "syncbn-scratch-"  # begins the name of a folder for temporary files


@contextmanager
def put_file(path: Path, *, on_disk: bool = True) -> Iterator[BinaryIO]:
    """A file to be written, which takes path's place once it is whole, and else leaves no trace.

    on_disk: wait until the disk has it, so that it outlives the machine, and not just this process.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            if on_disk:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    if on_disk:
        _sync(path.parent)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files, removed at the end; those of makers that were killed go when the next is made."""
    path, lock = _locked_folder()
    try:
        clear_scratch()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def clear_scratch() -> None:
    """Remove the folders for temporary files whose makers were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):
            _remove_if_left(folder)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the lock on it that the kernel takes off when this process ends in any way."""
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=SCRATCH))
        except OSError as error:
            raise UserError(
                f"no folder for temporary files ({error.strerror}): give one that this user may write to, "
                "TMPDIR=FOLDER, or in a container docker run --tmpfs /tmp"
            ) from error
        with suppress(OSError):  # another process may have thought it left behind before it was locked
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _remove_if_left(folder: Path) -> None:
    """Remove it, unless its maker is alive. Raises OSError, as it does for a folder of another user."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
