"""Scenes with real handwritten digits in them: any number, each drawn from its number alone, with masks and boxes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn.trainer.data.sampler import seed_of
from syncbn.trainer.data.sets.boxes import with_boxes

SMALLEST, LARGEST = 64, 96  # sides of a canvas, in pixels
DIGITS = (5, 9)  # of a scene, from and to
SIDES = (16, 24)  # of a digit, in pixels
TRIES = 8  # to find a place for a digit
INK = 0.4  # of the darkest: what is darker is of the digit


class Scene(NamedTuple):
    """A canvas with digits on it.

    image: uint8 [3, H, W]. mask: uint8 [H, W], of classes. boxes: int64 [n, 4], left, top, right and bottom of each
    digit, the latter two behind its last pixel. labels: int64 [n], the classes of the digits. masks: uint8 [n, H, W],
    1 where the digit is.
    """

    image: Tensor
    mask: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


class Scenes:
    """Digit scans laid on textured canvases, as Images: [i] is (uint8 [3, H, W], its mask [H, W]).

    A pixel's class is 0, the background, or 1 more than the digit that covers it. Scenes are 64 to 96 pixels high and
    wide, each as (seed, i) has it.

    Args:
        scans: [N, 1, 8, 8], 0..255. labels: of the scans, 0 to 9.
        number: of scenes.
        seed: another one is other scenes.
    """

    notes: Sequence[str] = ()
    classes: Sequence[str] = ("background", *map(str, range(10)))

    def __init__(self, scans: Tensor, labels: Sequence[int], number: int, seed: int):
        self.scans, self.labels, self.number, self.seed = scans, labels, number, seed

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        scene = self.scene(index)
        return scene.image, scene.mask

    def scene(self, index: int) -> Scene:
        """All of scene index, the boxes of its digits too."""
        draw, (width, height) = self._begun(index)
        canvas = texture(height, width, draw)
        mask = torch.zeros(height, width, dtype=torch.uint8)
        boxes, labels, masks = [], [], []
        digits = int(torch.randint(DIGITS[0], DIGITS[1] + 1, (), generator=draw))
        for scan in torch.randint(len(self.scans), (digits,), generator=draw).tolist():
            side = int(torch.randint(SIDES[0], SIDES[1] + 1, (), generator=draw))
            place = free_place(mask, side, draw)
            if place is None:
                continue
            ink = F.interpolate(self.scans[scan][None].float() / 255, (side, side), mode="bilinear")[0]
            colour = contrast(canvas[place].mean((1, 2)), draw)
            canvas[place].lerp_(colour.view(3, 1, 1), ink.clamp(0, 1))
            mask[place[1:]][ink[0] > INK] = 1 + self.labels[scan]
            boxes.append(box_around(ink[0] > INK, place))
            labels.append(1 + self.labels[scan])
            masks.append(torch.zeros_like(mask))
            masks[-1][place[1:]][ink[0] > INK] = 1
        # At least one digit finds a place: the first
        return Scene(canvas.mul(255).round().byte(), mask, torch.stack(boxes), torch.tensor(labels), torch.stack(masks))

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of a scene, which is not drawn for that."""
        return self._begun(index)[1]

    def _begun(self, index: int) -> tuple[torch.Generator, tuple[int, int]]:
        draw = torch.Generator().manual_seed(seed_of(self.seed, index))
        height, width = torch.randint(SMALLEST, LARGEST + 1, (2,), generator=draw).tolist()
        return draw, (width, height)

    def where(self, index: int) -> str:
        return f"scene {index}"

    def fingerprint_parts(self) -> Iterator[bytes]:
        yield repr((self.number, self.seed, [*self.labels])).encode()


class BoxedScenes(Scenes):
    """The same scenes with a box around each digit, and instances: its own mask too. The classes are the digits."""

    classes: Sequence[str] = Scenes.classes[1:]

    def __init__(self, scans: Tensor, labels: Sequence[int], number: int, seed: int, *, instances: bool = False):
        super().__init__(scans, labels, number, seed)
        self.instances = instances

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        scene = self.scene(index)
        target = with_boxes(scene.boxes.float(), scene.labels)
        return scene.image, target | {"masks": scene.masks} if self.instances else target


def free_place(mask: Tensor, side: int, draw: torch.Generator) -> tuple[slice, slice, slice] | None:
    """Where of an image [3, H, W] a square may lie that covers no digit; None if a few tries come to no such place."""
    for _ in range(TRIES):
        top, left = (int(torch.randint(size - side + 1, (), generator=draw)) for size in mask.shape)
        place = slice(None), slice(top, top + side), slice(left, left + side)
        if not mask[place[1:]].any():
            return place
    return None


def box_around(digit: Tensor, place: tuple[slice, slice, slice]) -> Tensor:
    """Left, top, right and bottom of a digit, bool [side, side], that lies at a place of the image."""
    rows, columns = digit.nonzero().T
    left, top = columns + place[2].start, rows + place[1].start
    return torch.stack([left.min(), top.min(), left.max() + 1, top.max() + 1])


def texture(height: int, width: int, draw: torch.Generator) -> Tensor:
    """A canvas [3, H, W] in 0..1: spots of two sizes, and grain."""
    canvas = 0.25 + 0.5 * torch.rand(3, 1, 1, generator=draw)
    for cells, strength in (3, 0.25), (12, 0.12):
        spots = torch.rand(1, 3, cells, cells, generator=draw) - 0.5
        canvas = canvas + strength * F.interpolate(spots, (height, width), mode="bicubic")[0]
    return (canvas + 0.04 * torch.randn(3, height, width, generator=draw)).clamp(0, 1)


def contrast(background: Tensor, draw: torch.Generator) -> Tensor:
    """A colour [3] that stands out from another: nearer to white where that is dark, and the other way round."""
    far = torch.where(background.mean() < 0.5, 1.0, 0.0)
    return (far + 0.35 * (torch.rand(3, generator=draw) - 0.5)).clamp(0, 1)
