"""Boxes over a picture, as the page draws them: lines and letters as wide at any size, labels where there is room."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from syncbn.trainer.report.plots import COLOURS
from syncbn.trainer.runs.pictures import PNG, Box, Pictures

SUREST_FROM = 0.5  # a box of a lower score is not drawn
LABEL_PX, PADDING_PX = 16, 7  # height of a label and width of its ends, at the size of the page's style
WIDE, NARROW = "MW@%mw", "fijlrtI.,:;'|!() "  # letters
WIDE_PX, LETTER_PX, NARROW_PX = 11.6, 7.6, 5.0  # of a wide font
CROWDED = 12  # boxes in a picture; with more, names are left to the colours
FEW_COLOURS = 8  # if there are no more of these
DARK, LIGHT = "#16191c", "#ffffff"  # letters and halo, on a light colour and on a dark one


class Label(NamedTuple):
    """What is written at a box: above its upper edge, or in it."""

    text: str = ""
    above: bool = False


class Outline(NamedTuple):
    """A box on the page: its place in shares of the picture, its colour and what reads on that; all that is known."""

    style: str
    label: Label
    title: str


class Panel(NamedTuple):
    """A picture with the boxes of one name. note: how many of them are drawn, if not all."""

    name: str
    note: str
    outlines: list[Outline]


def named(pictures: Pictures) -> bool:
    """Whether labels say what is in a box: not where many boxes are of few colours, which the legend names."""
    most = max((len(drawn(boxes)) for picture in pictures.each for boxes in picture.boxes.values()), default=0)
    return most <= CROWDED or not 0 < len(pictures.legend) <= FEW_COLOURS


def drawn(boxes: Sequence[Box]) -> list[Box]:
    return [box for box in boxes if box.score is None or box.score >= SUREST_FROM]


def panels(picture: PNG, legend: Mapping[str, str], width: float, *, named: bool = True) -> list[Panel]:
    """Of each name, its boxes. width: of a panel, in pixels of the page, at least."""
    made = []
    for name, boxes in picture.boxes.items():
        sure = drawn(boxes)
        note = f"{len(sure)} of {len(boxes)}" if len(sure) < len(boxes) else ""
        labels = _labels(sure, width / picture.width, (width, width * picture.height / picture.width), named)
        # The smaller above the larger, so that the mouse meets each
        order = sorted(range(len(sure)), key=lambda i: -_area(sure[i]))
        outlines = [
            Outline(_style(sure[i], picture, legend.get(sure[i].name, COLOURS[0])), labels[i], _words(sure[i]))
            for i in order
        ]
        made.append(Panel(name, note, outlines))
    return made


def _labels(boxes: Sequence[Box], scale: float, size: tuple[float, float], named: bool) -> list[Label]:
    """Of each box as much of its name and score as has room, above it or in it, beside the labels before."""
    sides = [[scale * side for side in box[:4]] for box in boxes]
    labels, taken = [], []
    for i, box in enumerate(boxes):
        left, top, right, bottom = sides[i]
        label = Label()
        for text in (_words(box), box.name) if named else filter(None, [_sureness(box)]):
            end = left + _length(text)
            above, inside = (left, top - LABEL_PX, end, top), (left, top, end, top + LABEL_PX)
            others = [*taken, *sides[:i], *sides[i + 1 :]]
            if above[1] >= 0 and end <= size[0] and not any(_meet(above, other) for other in others):
                label = Label(text, above=True)
                taken.append(above)
                break
            if end <= right and inside[3] <= bottom and not any(_meet(inside, other) for other in taken):
                label = Label(text)
                taken.append(inside)
                break
        labels.append(label)
    return labels


def _length(text: str) -> float:
    """How wide a label is at most, in pixels."""
    widths = (WIDE_PX if letter in WIDE else NARROW_PX if letter in NARROW else LETTER_PX for letter in text)
    return sum(widths) + PADDING_PX


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _area(box: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top)


def _words(box: Box) -> str:
    return f"{box.name} {_sureness(box)}".rstrip()


def _sureness(box: Box) -> str:
    return "" if box.score is None else f"{box.score:.0%}"


def _style(box: Box, picture: PNG, colour: str) -> str:
    left, top = box.left / picture.width, box.top / picture.height
    wide, high = (box.right - box.left) / picture.width, (box.bottom - box.top) / picture.height
    place = f"left: {left:.2%}; top: {top:.2%}; width: {wide:.2%}; height: {high:.2%}"
    return f"{place}; --colour: {colour}; --ink: {DARK if _is_light(colour) else LIGHT}"


def _is_light(colour: str) -> bool:
    """Whether dark letters read better on it (relative luminance as WCAG has it, roughly)."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
        return False
    red, green, blue = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2
