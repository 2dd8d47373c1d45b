"""Images in folders, one folder for each class: which count, which are left out, and which folder is for evaluation."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from syncbn.trainer.data.sets import pixels
from syncbn.trainer.errors import UserError, some

# What Pillow reads, and people call their images
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif",
)  # fmt: skip
LAYOUT = "an image folder holds train/<class>/*.jpg and test/<class>/*.jpg (or val/)"


class Folder:
    """The images of root/<class>/, whatever lies in between, as Images.

    Names that begin with a dot are none of them, and each real folder is gone into once, whatever links lead there.

    Args:
        classes: those that labels are of; None: what root has, in order of name.

    Raises:
        UserError: root has no class, or one that is none of classes; or it may not be read.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        self.root, self.samples, self._left_out = root, [], Counter()
        self.beside: str | None = None
        try:
            entries = [entry for entry in os.scandir(root) if not _hidden(entry.name)]
            own = sorted(entry.name for entry in entries if entry.is_dir())
            self._loose = sum(not entry.is_dir() for entry in entries)
            self.classes = own if classes is None else classes
            seen = {_real(root), *(_real(root / name) for name in own)}
            for name in own:
                if name not in self.classes:
                    raise UserError(f"{root} has the class {name!r} that train lacks: add it there, or remove it")
                label = self.classes.index(name)
                self.samples += [(path, label) for path in files_below(root / name, ENDINGS, self._left_out, seen)]
        except OSError as error:
            raise UserError(f"{root} cannot be read ({error.strerror}: {error.filename}): {LAYOUT}") from error
        if not own:
            raise UserError(f"{root} has no class: {LAYOUT}")

    def missing(self) -> list[str]:
        """The classes without an image."""
        labels = {label for _, label in self.samples}
        return [name for label, name in enumerate(self.classes) if label not in labels]

    @property
    def notes(self) -> list[str]:
        """What somebody who counts the files should know."""
        notes = [] if self.beside is None else [self.beside]
        notes += note_of(self.root, self._left_out, "images")
        if self._loose:
            notes.append(f"left out of {self.root}: {self._loose} files that lie in no folder of a class")
        return notes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms.v2 import functional as F

        path, label = self.samples[index]
        return F.pil_to_tensor(pixels.read_image(path)), label

    def where(self, index: int) -> str:
        return self.samples[index][0]

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield torch.tensor([label for _, label in self.samples], dtype=torch.int64).numpy().astype("<i8").tobytes()
        yield relative_names([path for path, _ in self.samples], self.root)


def train_and_eval(root: Path) -> tuple[Folder, Folder]:
    """root/train, and root/test or, where only that has images in folders of classes, root/val.

    Raises UserError if one of them is missing, empty or does not fit the other.
    """
    if not (root / "train").is_dir():
        raise UserError(f"data.root={root} has no folder 'train': {LAYOUT}")
    train = Folder(root / "train")
    if without := train.missing():
        raise UserError(f"{train.root} is incomplete (no image of class {some(without, 5)}): {LAYOUT}")
    if len(train.classes) == 1:
        raise UserError(f"{train.root} has one class, {train.classes[0]!r}: there is nothing to tell it from")

    def read(part: Path) -> Folder:
        folder = Folder(part, train.classes)
        if not len(folder):
            raise UserError(f"{part} has no image in the folder of a class: {LAYOUT}")
        return folder

    return train, for_evaluation(root, read, LAYOUT)


class Part(Protocol):
    """Images of which notes say more. beside: why they are taken and not another part's."""

    beside: str | None


P = TypeVar("P", bound=Part)


def for_evaluation(root: Path, read: Callable[[Path], P], layout: str) -> P:
    """What is read of root/test or, where that cannot be used, of root/val; of both, a note says which it is.

    read: raises UserError for what cannot be used. layout: what is wanted, for the line where neither is there.
    """
    unusable: UserError | None = None
    parts = [part for part in ("test", "val") if (root / part).is_dir()]
    for part in parts:
        try:
            images = read(root / part)
        except UserError as error:
            unusable = unusable or error
        else:
            if len(parts) == 2:
                images.beside = f"evaluated on {root / part}" + (f", as {unusable}" if unusable else "")
            return images
    raise unusable or UserError(f"data.root={root} has no folder 'test' (or 'val'): {layout}")


def files_below(
    folder: Path, endings: tuple[str, ...], left_out: Counter[str], seen: set[tuple[int, int]] | None = None
) -> Iterator[str]:
    """The files below a folder with one of the endings, in order of folder and name.

    left_out: counts the others by their ending. seen: folders that are not gone into.
    """
    for place, names in sorted(_walk(folder, {_real(folder)} if seen is None else seen)):
        for name in sorted(names):
            if name.lower().endswith(endings):
                yield os.path.join(place, name)
            else:
                left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1


def relative_names(files: Iterable[str], root: str | Path) -> bytes:
    """The files as they are named from root, a line each: the same wherever root lies."""
    names = "\n".join(os.path.relpath(path, root) for path in files)
    return names.replace(os.sep, "/").encode(errors="surrogateescape")


def note_of(folder: Path, left_out: Counter[str], kind: str) -> list[str]:
    """A line on the files that were left out, if there are any; kind: what they are not."""
    kinds = ", ".join(f"{number} × {ending}" for ending, number in left_out.most_common(5))
    return [f"left out of {folder}: {left_out.total()} files that are no {kind} ({kinds})"] if kinds else []


def read_classes(path: Path, least: int, most: int) -> list[str]:
    """The names of classes, a line each, of which there are from least to most."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"{path} cannot be read ({why}): write the name of a class in each line, that of 0 first"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not least <= len(names) <= most:
        raise UserError(f"{path} names {len(names)} classes: give {least} to {most}, a line each")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path} names {some(twice, 3)} twice: give each class a name of its own")
    return names


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """Folders and the files in them, behind links too, but no folder that was seen, and no hidden name."""

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        new = []
        for name in sorted(folders):
            real = _real(Path(place, name))
            if not _hidden(name) and real not in seen:
                seen.add(real)
                new.append(name)
        folders[:] = new
        yield place, [name for name in names if not _hidden(name)]


def _real(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".")
