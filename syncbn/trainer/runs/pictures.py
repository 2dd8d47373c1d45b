"""What a model makes of a few samples, as pictures in a run's folder: those of the last evaluation."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from syncbn.trainer.files import put_file

INDEX = "pictures.json"


class PNG(NamedTuple):
    """A picture as a file holds it."""

    data: bytes
    caption: str

    @property
    def width(self) -> int:
        """In pixels, as the file's header has it."""
        return int.from_bytes(self.data[16:20])


@dataclass(frozen=True)
class Pictures:
    """Pictures, and the step after which they were taken."""

    step: int = 0
    each: Sequence[PNG] = field(default_factory=list)


class Drawn(Protocol):
    """A picture that can be made into a file."""

    @property
    def caption(self) -> str: ...
    def png(self) -> bytes: ...


def pictures_of(step: int, drawn: Sequence[Drawn]) -> Pictures:
    return Pictures(step, [PNG(each.png(), each.caption) for each in drawn])


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Put them in the place of those that the folder has. Raises OSError."""
    folder.mkdir(exist_ok=True)
    names = [f"{i}.png" for i in range(len(pictures.each))]
    for name, picture in zip(names, pictures.each, strict=True):
        with put_file(folder / name, on_disk=False) as file:
            file.write(picture.data)
    captions = {name: picture.caption for name, picture in zip(names, pictures.each, strict=True)}
    with put_file(folder / INDEX, on_disk=False) as file:
        file.write(json.dumps({"step": pictures.step, "captions": captions}, indent=1).encode() + b"\n")
    for path in folder.glob("*.png"):
        if path.name not in names:
            path.unlink()


def read_pictures(folder: Path) -> Pictures:
    """Those that a folder has; none, if they are not all there."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads((folder / INDEX).read_text())
        each = [PNG((folder / name).read_bytes(), str(caption)) for name, caption in index["captions"].items()]
        return Pictures(int(index["step"]), each)
    return Pictures()
