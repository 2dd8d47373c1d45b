"""What the last evaluation gives to look at, in a run's folder: pictures of a few samples, and charts."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from syncbn.trainer.errors import UserError
from syncbn.trainer.files import put_file

INDEX = "pictures.json"
MOST_BOXES = 100  # of a name in a picture: those of the highest scores are kept


@dataclass(frozen=True)
class Matrix:
    """A chart of a number for each row and column, such as a confusion matrix.

    Args:
        title: names it, in W&B too.
        rows, columns: names, from top to bottom and from left to right.
        values: [rows][columns]; None: not known.
        unit: as a Metric has it: "%" for shares of 1.
        down, along: what a row is, and what a column is.
        caption: what it shows, in a sentence.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str = ""
    down: str = ""
    along: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.values}
        if not (self.rows and self.columns) or (len(self.values), lengths) != (len(self.rows), {len(self.columns)}):
            raise UserError(
                f"the chart {self.title!r} has {len(self.values)} rows of {sorted(lengths)} values and names for "
                f"{len(self.rows)} rows and {len(self.columns)} columns: give one value for each row and column",
                on_every_rank=True,
            )


@dataclass(frozen=True)
class Curves:
    """A chart of lines, such as the precision of each class along the recall.

    Args:
        title: names it, in W&B too.
        lines: (x, y) of the points of each line, by its name, from left to right.
        along, up: what x is, and what y is.
        unit: of both, as a Metric has it: "%" for shares of 1.
        caption: what it shows, in a sentence.
    """

    title: str
    lines: Mapping[str, Sequence[Sequence[float]]]
    along: str = ""
    up: str = ""
    unit: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        misfits = [name for name, points in self.lines.items() if not (points and all(map(_is_point, points)))]
        if not self.lines or misfits:
            seen = f"no points, or others than two finite numbers, in {misfits[0]!r}" if misfits else "no lines"
            raise UserError(
                f"the chart {self.title!r} has {seen}: give lines of (x, y) by name, at least one point in each",
                on_every_rank=True,
            )


def _is_point(point: Sequence[float]) -> bool:
    return len(point) == 2 and all(map(math.isfinite, point))


Chart = Matrix | Curves
"""Plain data that a chart is drawn of: a dataclass of each kind, which report/charts.py draws."""

KINDS: Mapping[str, type[Chart]] = {"matrix": Matrix, "curves": Curves}


class Box(NamedTuple):
    """A box in a picture: its sides in the picture's pixels, the name of what is in it, and how sure that is, up to 1.

    right and bottom lie behind the last pixel. score: None, where there is no doubt.
    """

    left: float
    top: float
    right: float
    bottom: float
    name: str
    score: float | None = None


Boxes = Mapping[str, Sequence[Box]]
"""By the name of what they are: {"truth": [...], "prediction": [...]}."""


class PNG(NamedTuple):
    """A picture as a file holds it.

    panels: names of its parts, equally wide and side by side.
    boxes: to be drawn over it, once for each name; a picture that has them has no parts.
    """

    data: bytes
    caption: str
    panels: tuple[str, ...] = ()
    boxes: Mapping[str, Sequence[Box]] = {}

    @property
    def width(self) -> int:
        """In pixels, as the file's header has it."""
        return int.from_bytes(self.data[16:20])

    @property
    def height(self) -> int:
        return int.from_bytes(self.data[20:24])


@dataclass(frozen=True)
class Pictures:
    """Pictures and charts, and the step after which they were taken. legend: colours of the pictures, by meaning."""

    step: int = 0
    each: Sequence[PNG] = field(default_factory=list)
    charts: Sequence[Chart] = field(default_factory=list)
    legend: Mapping[str, str] = field(default_factory=dict)


class Drawn(Protocol):
    """A picture that can be made into a file."""

    @property
    def caption(self) -> str: ...
    @property
    def panels(self) -> Sequence[str]: ...
    @property
    def boxes(self) -> Boxes: ...
    def png(self) -> bytes: ...


class Shown(NamedTuple):
    """What a task gives to look at after an evaluation."""

    pictures: Sequence[Drawn] = ()
    charts: Sequence[Chart] = ()
    legend: Mapping[str, str] = {}


def pictures_of(step: int, shown: Shown) -> Pictures:
    pngs = [PNG(each.png(), each.caption, tuple(each.panels), kept(each.boxes)) for each in shown.pictures]
    return Pictures(step, pngs, shown.charts, shown.legend)


def kept(boxes: Boxes) -> Boxes:
    """The boxes that are worth their place, the surest first, to a hundredth of a pixel; none that is not finite."""
    finite = {name: [box for box in each if all(map(math.isfinite, box[:4]))] for name, each in boxes.items()}
    return {name: [*map(_rounded, sorted(each, key=_doubt)[:MOST_BOXES])] for name, each in finite.items()}


def _doubt(box: Box) -> float:
    return 0.0 if box.score is None else -box.score


def _rounded(box: Box) -> Box:
    left, top, right, bottom = (round(float(side), 2) for side in box[:4])
    return Box(left, top, right, bottom, box.name, None if box.score is None else round(float(box.score), 4))


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Put them in the place of those that the folder has. Raises OSError."""
    folder.mkdir(exist_ok=True)
    by_name = {f"{i}.png": picture for i, picture in enumerate(pictures.each)}
    for name, picture in by_name.items():
        with put_file(folder / name, on_disk=False) as file:
            file.write(picture.data)
    kind_of = {kind: name for name, kind in KINDS.items()}
    index = {
        "step": pictures.step,
        "captions": {name: picture.caption for name, picture in by_name.items()},
        "panels": {name: picture.panels for name, picture in by_name.items() if picture.panels},
        "boxes": {name: picture.boxes for name, picture in by_name.items() if picture.boxes},
        "legend": dict(pictures.legend),
        "charts": [{"kind": kind_of[type(chart)], **asdict(chart)} for chart in pictures.charts],
    }
    with put_file(folder / INDEX, on_disk=False) as file:
        file.write(json.dumps(index).encode() + b"\n")
    for path in folder.glob("*.png"):
        if path.name not in by_name:
            path.unlink()


def read_pictures(folder: Path) -> Pictures:
    """Those that a folder has; none, if they are not all there."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads((folder / INDEX).read_text())
        panels, boxes = index.get("panels", {}), index.get("boxes", {})
        each = [
            PNG((folder / name).read_bytes(), str(caption), tuple(panels.get(name, ())), _boxes(boxes.get(name, {})))
            for name, caption in index["captions"].items()
        ]
        charts = [_chart(**chart) for chart in index.get("charts", [])]
        return Pictures(int(index["step"]), each, charts, index.get("legend", {}))
    return Pictures()


def _boxes(by_name: Mapping[str, Any]) -> Boxes:
    return {name: [Box(*box) for box in each] for name, each in by_name.items()}


def _chart(kind: str, **values: Any) -> Chart:
    return KINDS[kind](**values)
