"""Images with boxes around objects: what a target is, which boxes are none, and annotated image files as Images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from syncbn.trainer.data.sets import pixels
from syncbn.trainer.data.sets.folders import relative_names
from syncbn.trainer.data.sets.images import Spread
from syncbn.trainer.errors import UserError

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels, the latter two behind the last pixel."""

HEADS = 100  # images of a data set whose size is looked at before it is used
SLACK = 2  # pixels over the edge that come of counting from 0 or from 1, and of rounding: they are cut off

MOST = 10**9  # pixels of a side; what is more is no size


def with_boxes(boxes: Tensor, labels: Tensor, areas: Tensor | None = None, crowd: Tensor | None = None) -> Any:
    """A target: boxes float32 [n, 4], labels int64 [n] from 1, areas float32 [n] and crowd bool [n]; n may be 0.

    areas: what small and large go by; None: those of the boxes. crowd: objects that are neither trained on nor missed.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return {
        "boxes": boxes,
        "labels": labels,
        "areas": width * height if areas is None else areas,
        "crowd": torch.zeros(len(labels), dtype=torch.bool) if crowd is None else crowd,
    }


def fault(box: Box, size: tuple[int, int]) -> str | None:
    """What is wrong with a box in an image of a size (width, height); None: nothing."""
    left, top, right, bottom = box
    width, height = size
    over = max(-left, -top, right - width, bottom - height)
    if not all(map(isfinite, box)):
        return "is not of four numbers"
    if right < left or bottom < top:
        return "ends before it begins: its corners are swapped, or its width or height is below 0"
    if right == left or bottom == top:
        return "has no area"
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return f"lies outside of its image of {width}×{height} pixels"
    if over > SLACK:
        return f"reaches {over:g} pixels over the edge of its image of {width}×{height}"
    return None


def number(value: object) -> float:
    """Of what a file has in a number's place; infinite if it is none."""
    try:
        return inf if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return inf


def size_of(width: object, height: object) -> tuple[int, int] | None:
    """Of what a file has for an image's size; None: that is none."""
    sides = number(width), number(height)
    whole = all(1 <= side < MOST and side == int(side) for side in sides)
    return (int(sides[0]), int(sides[1])) if whole else None


class Annotations:
    """The images of a data set and the objects in them, added in their order: what Annotated is made of.

    Args:
        skip_broken: whether broken boxes are left out and counted, or the first of them ends it.
    """

    def __init__(self, *, skip_broken: bool):
        self.skip_broken = skip_broken
        self.files: list[str] = []
        self.origins: list[str] = []  # what says an image's size, for a message
        self.sizes: list[tuple[int, int]] = []
        self.ends: list[int] = []  # of each image's objects, in all
        self.boxes: list[Box] = []
        self.labels: list[int] = []
        self.areas: list[float] = []
        self.crowd: list[bool] = []
        self.shapes: list[bytes] = []  # of the objects, encoded by the source, if it has them
        self.broken, self.clipped, self.first = 0, 0, ""

    def add_image(self, file: str, size: tuple[int, int], origin: str) -> None:
        """The image that objects are added to from now on. size: width and height."""
        self.files.append(file)
        self.sizes.append(size)
        self.origins.append(origin)
        self.ends.append(len(self.boxes))

    def add(
        self,
        box: Box,
        label: int,
        where: Callable[[], str],
        *,
        area: float | None = None,
        crowd: bool = False,
        shape: bytes | None = None,
    ) -> None:
        """An object of the last image. where: which box of which file it is.

        Raises UserError if it is broken, unless such boxes are left out.
        """
        width, height = self.sizes[-1]
        if wrong := fault(box, self.sizes[-1]):
            if not self.skip_broken:
                raise UserError(f"{where()} {wrong}: correct it, or data.skip_broken=true leaves such boxes out")
            self.first = self.first or f"{where()} {wrong}"
            self.broken += 1
            return
        clipped = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
        self.clipped += clipped != box
        self.boxes.append(clipped)
        self.labels.append(label)
        self.areas.append((clipped[2] - clipped[0]) * (clipped[3] - clipped[1]) if area is None else area)
        self.crowd.append(crowd)
        if shape is not None:
            self.shapes.append(shape)
        self.ends[-1] = len(self.boxes)

    def notes(self, root: str | Path) -> list[str]:
        notes = []
        if self.broken:
            notes.append(f"left out of {root}: {self.broken} broken boxes (the first: {self.first})")
        if self.clipped:
            notes.append(f"cut off in {root}: what {self.clipped} boxes have beyond the edge, {SLACK} pixels at most")
        return notes


class Annotated:
    """Image files with boxes, as Images: [i] is (uint8 [3, H, W], a target as of with_boxes).

    All that the annotations say is kept in a few tensors, which workers share.

    Args:
        root: the folder that files are named from.
        masks_of: the masks uint8 [n, H, W] of the shapes of an image's objects; None: targets have no masks.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: Annotations,
        classes: Sequence[str],
        masks_of: Callable[[Sequence[bytes], tuple[int, int]], Tensor] | None = None,
    ):
        self.root, self.files, self.origins, self.classes = root, annotations.files, annotations.origins, classes
        self.notes: Sequence[str] = annotations.notes(root)
        self.sizes = torch.tensor(annotations.sizes, dtype=torch.int64).view(-1, 2)
        self.ends = torch.tensor([0, *annotations.ends])
        self.boxes = torch.tensor(annotations.boxes, dtype=torch.float32).view(-1, 4)
        self.labels = torch.tensor(annotations.labels, dtype=torch.int64)
        self.areas = torch.tensor(annotations.areas, dtype=torch.float32)
        self.crowd = torch.tensor(annotations.crowd, dtype=torch.bool)
        self.masks_of = masks_of
        self.shapes = b"".join(annotations.shapes)
        self.shape_ends = torch.tensor([0, *map(len, annotations.shapes)]).cumsum(0)

    def checked(self) -> Self:
        """Itself. Raises UserError if a few files, evenly spread, show without being decoded another size."""
        for index in Spread(self, min(HEADS, len(self))).kept:
            try:
                size = pixels.head(self.files[index]).size
            except Exception:  # named, or left out, when its turn comes
                continue
            self._refuse_size(index, size)
        return self

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        from torchvision.transforms.v2 import functional as F

        image, target = F.pil_to_tensor(pixels.read_image(self.files[index])), self.target(index)
        self._refuse_size(index, (image.shape[-1], image.shape[-2]))
        if self.masks_of is not None:
            try:
                target["masks"] = self.masks_of([*self._shapes_of(index)], self.size(index))
            except Exception as error:  # decoders raise many kinds
                raise UserError(f"{self.origins[index]} has a segmentation that cannot be drawn ({error})") from error
        return image, target

    def target(self, index: int) -> Any:
        """The boxes of image index, without decoding it; no masks."""
        part = self._objects(index)
        # Copies, as a worker that sends a view sends all of its storage
        return with_boxes(*(of_all[part].clone() for of_all in (self.boxes, self.labels, self.areas, self.crowd)))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image index, as the annotation has it."""
        width, height = self.sizes[index].tolist()
        return width, height

    def where(self, index: int) -> str:
        return self.files[index]

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield relative_names(self.files, self.root)
        yield self.boxes.numpy().astype("<f4").tobytes()
        for numbers in self.ends, self.labels, self.crowd:
            yield numbers.numpy().astype("<i8").tobytes()

    def _objects(self, index: int) -> slice:
        begin, end = self.ends[index : index + 2].tolist()
        return slice(begin, end)

    def _shapes_of(self, index: int) -> Iterator[bytes]:
        part = self._objects(index)
        ends = self.shape_ends[part.start : part.stop + 1].tolist()
        for begin, end in pairwise(ends):
            yield self.shapes[begin:end]

    def _refuse_size(self, index: int, size: tuple[int, int]) -> None:
        if size != self.size(index):
            width, height = self.size(index)
            raise UserError(
                f"{self.files[index]} has {size[0]}×{size[1]} pixels, and {self.origins[index]} says "
                f"{width}×{height}: correct that, as its boxes may be for another size"
            )


def refuse_no_box(train: Annotated, what: str) -> None:
    """Raise UserError if there is nothing to learn from. what: the files that were read."""
    if not len(train.boxes):
        raise UserError(f"{what} has no box in any of its {len(train)} images: there is nothing to learn from")


def label_of(name: str, labels: Mapping[str, int], where: str, listed: str) -> int:
    """The label of a class. listed: what names the classes. Raises UserError if there is no such class."""
    if name not in labels:
        raise UserError(
            f"{where} has the class {name!r}, which {listed} lacks: add it there, or correct or remove it here"
        )
    return labels[name]
