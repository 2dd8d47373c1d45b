"""A sweep's folder, runs/sweep-...: what is swept, and what became of each point.

sweep.json is the plan, and in the end the whole table. Until then each point tells of itself in a file of its own, so
that points may run side by side, in other processes and on other machines, and be killed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from syncbn.trainer.errors import PREEMPTED, USER_ERROR, UserError, one_line
from syncbn.trainer.files import put_file
from syncbn.trainer.redact import redacted
from syncbn.trainer.runs.folder import digest
from syncbn.trainer.runs.metric import Metric

NAME = "sweep.json"
SEED = "seed"  # points that differ in it alone are one setting, tried several times
ENDS = {USER_ERROR: "refused", PREEMPTED: "preempted"}  # what an exit code other than 0 is called; else: failed


@dataclass
class Point:
    """A point of a sweep, and what became of it."""

    choices: dict[str, str]  # {swept key: value}, as on a command line
    run: str | None = None  # the run's name; none: it has none, or its config was refused
    state: str = "not run"  # finished, refused, failed, preempted
    reason: str = ""  # why it is not finished, in one line
    exit_code: int = 0
    objective: float | None = None  # nan: it was not finite
    took_s: float | None = None  # of training, this time; none if there was nothing to train
    ended: float = 0.0  # seconds since 1970

    @property
    def words(self) -> str:
        return words(self.choices)

    @property
    def done(self) -> bool:
        return self.state == "finished"


@dataclass
class Sweep:
    """A sweep.

    swept: keys, in the command's order. total: how many points there are to be; none: not known. metric: what the
    objective is. began: when it was started the last time, in seconds since 1970.
    """

    swept: list[str]
    total: int | None
    metric: str
    began: float
    points: list[Point] = field(default_factory=list)
    unit: str | None = None  # of the metric; none: of before 2026-11-28, when a share was told by its name
    better: Literal["more", "less"] = "more"

    @property
    def measured(self) -> Metric:
        """The metric, as people read it."""
        unit = ("%" if self.metric == "accuracy" else "") if self.unit is None else self.unit
        return Metric(self.metric, unit, self.better, headline=True)

    def place(self, choices: Mapping[str, str]) -> int | None:
        """The index of the point with the choices."""
        return next((i for i, point in enumerate(self.points) if point.choices == choices), None)

    @property
    def asked_to_end(self) -> bool:
        """Whether a point was ended by a signal since the sweep was started."""
        return any(point.state == "preempted" and point.ended >= self.began for point in self.points)


def words(choices: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in choices.items())


def is_sweep(folder: Path) -> bool:
    return (folder / NAME).is_file()


def write_plan(folder: Path, sweep: Sweep) -> None:
    """Write the sweep down, with what is told of its points so far. Raises UserError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with put_file(folder / NAME) as file:
            file.write(json.dumps(redacted(_plain(asdict(sweep))), indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}): mend that, or give another run.root="
        ) from None


def write_point(folder: Path, point: Point) -> None:
    """Write down what became of a point. Raises OSError."""
    written = redacted(_plain(asdict(point)))
    path = folder / "points" / f"{digest(words(written['choices']), size=8)}.json"
    path.parent.mkdir(exist_ok=True)
    with put_file(path) as file:
        file.write(json.dumps(written, indent=1).encode() + b"\n")


def read_sweep(folder: Path) -> Sweep:
    """A sweep from its folder. Raises UserError."""
    try:
        sweep = _made(Sweep, json.loads((folder / NAME).read_text()))
        sweep.points = [_made(Point, content) for content in sweep.points]  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, TypeError) as error:
        text = one_line(f"{error}")
        raise UserError(f"{folder / NAME} cannot be read ({text}): the sweep's command writes it anew") from None
    others: list[Point] = []
    for path in (folder / "points").glob("*.json"):
        try:
            point = _made(Point, json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # of a machine that fell: as if it had not been run
        place = sweep.place(point.choices)
        if place is None:
            others.append(point)
        else:
            sweep.points[place] = replace(point, run=point.run or sweep.points[place].run)
    sweep.points += sorted(others, key=lambda point: point.ended)
    return sweep


def _made(kind: type, content: Any) -> Any:
    """The dataclass of what was written of it; keys of another version are left out."""
    names = {f.name for f in fields(kind)}
    return kind(**{key: value for key, value in dict(content).items() if key in names})


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
