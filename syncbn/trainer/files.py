"""Files that are whole, or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

BESIDE = ".tmp"  # ends the name of what is not whole yet


@contextmanager
def put(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which takes path's place once it is whole and on the disk, and else leaves no trace."""
    beside = path.with_name(path.name + BESIDE)
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
