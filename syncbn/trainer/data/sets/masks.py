"""Images with a mask of index numbers each: which file is whose, what a number in a mask means, and what is refused."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from syncbn.trainer.data.sets import folders, pixels
from syncbn.trainer.data.sets.folders import read_classes
from syncbn.trainer.data.sets.images import Images, Spread
from syncbn.trainer.data.sets.pixels import Unreadable
from syncbn.trainer.errors import UserError, some

IGNORED = 255  # in a mask: counts for nothing, neither in the loss nor in a figure
HEADS = 100  # files of a data set whose kind and size are looked at before it is used
MODES = (
    "L",
    "P",
    "1",
    "I;16",
    "I;16B",
    "I",
)  # of Pillow: grey, palette, 1 bit, 16 bits; their pixels are whole numbers
LAYOUT = "a mask folder holds classes.txt, train/images/*.jpg, train/masks/*.png, and test/ (or val/) like train/"
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Masks:
    """Image files with a mask file each, as Images: [i] is (uint8 [3, H, W], its mask uint8 [H, W]).

    Args:
        root: the folder that files are named from.
        files: (image, mask), in their order.
        names: of the classes, by their number in the mask files. Those that are not ignored become 0, 1, ... in the
            order of their numbers.
        ignored: the numbers of pixels that count for nothing; they become IGNORED.
    """

    beside: str | None = None

    def __init__(
        self,
        root: str | Path,
        files: Iterable[tuple[str, str]],
        names: Mapping[int, str],
        ignored: Collection[int],
        notes: Sequence[str] = (),
    ):
        self.root, self.files, self.ignored = root, [*files], sorted(ignored)
        self.numbers = [number for number in sorted(names) if number not in ignored]  # of the classes
        self.classes: Sequence[str] = [names[number] for number in self.numbers]
        self._notes = [
            *notes, *(f"{names[n]} ({n}) is data.ignore_index, and no class" for n in self.ignored if n in names),
        ]  # fmt: skip
        self.table = torch.full((256,), IGNORED, dtype=torch.uint8).numpy()
        self.table[self.numbers] = range(len(self.numbers))

    @classmethod
    def of_files(
        cls, root: str | Path, files: Iterable[tuple[str, str]], names: Mapping[int, str], ignored: Collection[int]
    ) -> Self:
        """Raises ValueError where there are none, or one of them is not there."""
        images = cls(root, files, names, ignored)
        if not images.files:
            raise ValueError("it has no image")
        for path in (path for pair in images.files for path in pair):
            if not os.path.exists(path):
                raise ValueError(f"{path} is missing")
        return images

    def checked(self) -> Self:
        """Itself. Raises UserError if a few files, evenly spread, show without being decoded what is refused."""
        for index in Spread(self, min(HEADS, len(self))).kept:
            image, mask = self.files[index]
            try:
                heads = pixels.head(image), pixels.head(mask)
            except Exception:  # named, or left out, when its turn comes
                continue
            refuse_mode(mask, heads[1].mode)
            self._refuse_sizes(index, *(head.size for head in heads))
        return self

    @property
    def notes(self) -> Sequence[str]:
        return self._notes if self.beside is None else [self.beside, *self._notes]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional as F

        image, mask = F.pil_to_tensor(pixels.read_image(self.files[index][0])), self.mask(index)
        self._refuse_sizes(index, *((each.shape[-1], each.shape[-2]) for each in (image, mask)))
        return image, mask

    def mask(self, index: int) -> Tensor:
        """The mask alone. Raises Unreadable, or UserError if it is a mask and fits no class."""
        import numpy

        path = self.files[index][1]
        try:
            mode, values = pixels.read_numbers(path)
        except Exception as error:  # decoders raise many kinds
            raise pixels.unreadable(path, error) from error
        refuse_mode(path, mode)
        if values.dtype != numpy.uint8:
            self._refuse_numbers(path, values[(values < 0) | (values > 255)][:1].tolist())
            values = values.astype(numpy.uint8)
        present = numpy.bincount(values.ravel(), minlength=256).nonzero()[0]
        self._refuse_numbers(path, numpy.setdiff1d(present, self.numbers + self.ignored).tolist())
        return torch.from_numpy(self.table.take(values))

    def where(self, index: int) -> str:
        return self.files[index][0]

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield folders.relative_names([path for path, _ in self.files], self.root)

    def _refuse_sizes(self, index: int, image: tuple[int, int], mask: tuple[int, int]) -> None:
        if image != mask:
            raise UserError(
                f"{self.files[index][1]} has {mask[0]}×{mask[1]} pixels and its image {self.files[index][0]} "
                f"{image[0]}×{image[1]}: make them one size"
            )

    def _refuse_numbers(self, path: str, numbers: Sequence[int]) -> None:
        if len(numbers):
            raise UserError(
                f"{path} has pixels of the number {numbers[0]}, of no class: the {len(self.classes)} classes are "
                f"{self.numbers[0]} to {self.numbers[-1]}, and {some([*map(str, self.ignored)], 4)} counts for "
                "nothing (data.ignore_index)"
            )


def refuse_mode(path: str, mode: str) -> None:
    """Raise UserError for a mask whose pixels are no whole numbers; mode: Pillow's."""
    if mode not in MODES:
        raise UserError(
            f"{path} has {mode} pixels, and those of a mask are numbers of classes: save the index of the class in "
            "each pixel, as a PNG in grey (Pillow's mode L) or with a palette (P)"
        )


def class_pixels(images: Images, most: int = 1000) -> Tensor:
    """How many pixels of each class there are, int64 [K], in the masks of at most so many images, evenly spread.

    Masks that cannot be read are left out: training says so, if it is to.
    """
    some_of_them, pixels_of = Spread(images, min(most, len(images))), torch.zeros(256, dtype=torch.int64)
    for index in range(len(some_of_them)):
        with suppress(Unreadable):
            pixels_of += some_of_them.mask(index).flatten().bincount(minlength=256)
    return pixels_of[: len(images.classes)]


def train_and_eval(root: Path, ignore_index: int) -> tuple[Masks, Masks]:
    """root/train, and root/test or, where that has no masks, root/val. No file but classes.txt is read.

    Raises UserError if one of them is missing, or has no image, or an image or mask without the other.
    """
    if not (root / "train").is_dir():
        raise UserError(f"data.root={root} has no folder 'train': {LAYOUT}")
    names = dict(enumerate(read_classes(root / "classes.txt", 2, IGNORED)))

    def read(part: Path) -> Masks:
        files, notes = pairs(part)
        return Masks(root, files, names, {ignore_index}, notes)

    train = read(root / "train")
    if len(train.classes) < 2:
        raise UserError(
            f"{root / 'classes.txt'} has one class, {some(train.classes, 1)}: there is nothing to tell it from"
        )
    return train, folders.for_evaluation(root, read, LAYOUT)


def pairs(part: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """The images of a folder with their masks, by name, and what was left out."""
    kinds = {"images": folders.ENDINGS, "masks": (".png",)}
    files, notes = {}, []
    for kind, endings in kinds.items():
        folder, left_out = part / kind, Counter()
        if not folder.is_dir():
            raise UserError(f"{part} has no folder {kind!r}: {LAYOUT}")
        try:
            paths = [*folders.files_below(folder, endings, left_out)]
        except OSError as error:
            raise UserError(f"{folder} cannot be read ({error.strerror}: {error.filename}): {LAYOUT}") from error
        files[kind] = {os.path.splitext(os.path.relpath(path, folder))[0]: path for path in paths}
        if len(files[kind]) < len(paths):
            twice = sorted({*paths} - {*files[kind].values()})
            raise UserError(f"{twice[0]} has a second image beside it with its name: remove one, as they share a mask")
        notes += folders.note_of(folder, left_out, kind)
    if not files["images"]:
        raise UserError(f"{part / 'images'} has no image: {LAYOUT}")
    for one, other in ("images", "masks"), ("masks", "images"):
        if alone := sorted(files[one].keys() - files[other].keys()):
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise UserError(
                f"{files[one][alone[0]]}{more} has no file of its name in {part / other}: images/NAME.jpg goes with "
                "masks/NAME.png"
            )
    return [(path, files["masks"][name]) for name, path in sorted(files["images"].items())], notes
