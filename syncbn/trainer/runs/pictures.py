"""What the last evaluation gives to look at, in a run's folder: pictures of a few samples, and charts."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from syncbn.trainer.errors import UserError
from syncbn.trainer.files import put_file

INDEX = "pictures.json"


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


Chart = Matrix
"""Plain data that a chart is drawn of: a dataclass of each kind, which report/charts.py draws."""

KINDS: Mapping[str, type[Chart]] = {"matrix": Matrix}


class PNG(NamedTuple):
    """A picture as a file holds it. panels: names of its parts, equally wide and side by side."""

    data: bytes
    caption: str
    panels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """In pixels, as the file's header has it."""
        return int.from_bytes(self.data[16:20])


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
    def png(self) -> bytes: ...


class Shown(NamedTuple):
    """What a task gives to look at after an evaluation."""

    pictures: Sequence[Drawn] = ()
    charts: Sequence[Chart] = ()
    legend: Mapping[str, str] = {}


def pictures_of(step: int, shown: Shown) -> Pictures:
    pngs = [PNG(each.png(), each.caption, tuple(each.panels)) for each in shown.pictures]
    return Pictures(step, pngs, shown.charts, shown.legend)


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
        panels = index.get("panels", {})
        each = [
            PNG((folder / name).read_bytes(), str(caption), tuple(panels.get(name, ())))
            for name, caption in index["captions"].items()
        ]
        charts = [_chart(**chart) for chart in index.get("charts", [])]
        return Pictures(int(index["step"]), each, charts, index.get("legend", {}))
    return Pictures()


def _chart(kind: str, **values: Any) -> Chart:
    return KINDS[kind](**values)
