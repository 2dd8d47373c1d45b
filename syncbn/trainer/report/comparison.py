"""The points of a sweep compared: mean and spread over seeds of each setting, the best, and what came to nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from syncbn.trainer.errors import some
from syncbn.trainer.report.tables import Cell, Table
from syncbn.trainer.runs.metric import Metric
from syncbn.trainer.runs.sweep_folder import SEED, Point, Sweep, words

LOG_FROM = 4  # numbers that span more than this factor stand on a logarithmic axis
MOST_LINES = 12  # in a plot; more cannot be told apart
MOST_NAMED = 3  # points beside a reason


@dataclass
class Setting:
    """Points that differ in their seed alone. values: of those that are finished, and finite."""

    choices: dict[str, str]
    points: list[Point]
    best: bool = False

    @property
    def values(self) -> list[float]:
        objectives = [point.objective for point in self.points if point.done and point.objective is not None]
        return [value for value in objectives if math.isfinite(value)]

    @property
    def mean(self) -> float:
        return mean(self.values) if self.values else math.nan

    @property
    def std(self) -> float:
        """Of a sample, over seeds; nan: there are not two."""
        return stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def note(self) -> str:
        """A word on what is not finished."""
        ends = [point.state for point in self.points if not point.done]
        ends += ["not finite"] * (sum(point.done for point in self.points) - len(self.values))
        counts = {end: ends.count(end) for end in ends}
        alone = len(self.points) == 1
        return ", ".join(end if alone else f"{count} {end}" for end, count in counts.items())


@dataclass
class Line:
    """Settings that differ in one key alone: where each stands along it, its mean and its spread (nan: none)."""

    name: str
    along: list[str]
    means: list[float]
    stds: list[float]


def settings(sweep: Sweep) -> list[Setting]:
    """The settings of a sweep in its order, the best of them marked."""
    by_choices: dict[tuple[tuple[str, str], ...], Setting] = {}
    for point in sweep.points:
        choices = {key: value for key, value in point.choices.items() if key != SEED}
        by_choices.setdefault(tuple(choices.items()), Setting(choices, [])).points.append(point)
    means = [setting.mean for setting in by_choices.values() if setting.values]
    best = sweep.measured.best(means) if means else None
    for setting in by_choices.values():
        setting.best = len(by_choices) > 1 and setting.mean == best
    return list(by_choices.values())


def table(sweep: Sweep) -> Table:
    """A row for each setting: its choices, the metric over its seeds, of how many, and a note."""
    keys = [key for key in sweep.swept if key != SEED]
    rows: dict[str, list[Cell]] = {}
    for setting in settings(sweep):
        chosen = [short(setting.choices.get(key, "–")) for key in keys]
        if not keys:
            chosen = [",".join(point.choices.get(SEED, "–") for point in setting.points)]
        done, count = len(setting.values), len(setting.points)
        measured = [spread(setting, sweep.measured), str(done) if done == count else f"{done} of {count}"]
        note = ", ".join(filter(None, ["best" if setting.best else "", setting.note]))
        rows[words(setting.choices)] = [Cell(text, setting.best) for text in [*chosen, *measured, note]]
    caption = ["Mean ± standard deviation over n seeds."] if SEED in sweep.swept else []
    caption += ["Bold: the best."] if any(cells[0].best for cells in rows.values()) else []
    return Table([*(keys or [SEED]), sweep.metric, "n", ""], rows, " ".join(caption))


def as_text(table: Table) -> str:
    """The table for a screen or a log: words to the left, numbers to the right."""
    lines = [table.columns, *([cell.text for cell in cells] for cells in table.rows.values())]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [
        any(_number(text) is None for text in column[1:]) and i < len(columns) - 3 for i, column in enumerate(columns)
    ]
    left[-1] = True
    shown = [
        "  ".join(f"{text:<{w}}" if to else f"{text:>{w}}" for text, w, to in zip(line, widths, left, strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in shown)


def reasons(sweep: Sweep) -> list[str]:
    """Why points are not finished: each reason once, with those that it is told of."""
    points_by_reason: dict[tuple[str, str], list[str]] = {}
    for point in sweep.points:
        if point.reason and not point.done:
            points_by_reason.setdefault((point.state, point.reason), []).append(point.words)
    named = {key: some(points, MOST_NAMED, between="; ") for key, points in points_by_reason.items()}
    return [f"{state}: {reason} ({names})" for (state, reason), names in named.items()]


def tally(sweep: Sweep) -> str:
    """How many points are in which state: "6 finished, 2 refused"."""
    states = [point.state for point in sweep.points]
    states += ["not run"] * max(0, (sweep.total or 0) - len(states))
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"


def lines(sweep: Sweep, key: str) -> list[Line]:
    """The metric along a swept key, a line for each combination of the others; none if those are too many to tell."""
    by_name: dict[str, Line] = {}
    for setting in settings(sweep):
        if key in setting.choices and setting.values:
            others = {k: short(v) for k, v in setting.choices.items() if k != key}
            line = by_name.setdefault(words(others), Line(words(others), [], [], []))
            line.along.append(setting.choices[key])
            line.means.append(setting.mean)
            line.stds.append(setting.std)
    if len(by_name) <= MOST_LINES:
        return list(by_name.values())
    together = Line("", [], [], [])
    for line in by_name.values():
        together.along += line.along
        together.means += line.means
        together.stds += line.stds
    return [together]


def scale(values: Sequence[str]) -> tuple[list[float], bool] | None:
    """The values as numbers, and whether they want a logarithmic axis; None if one is a word."""
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(numbers) < len(values):
        return None
    return numbers, min(numbers) > 0 and max(numbers) / min(numbers) > LOG_FROM


def spread(setting: Setting, metric: Metric) -> str:
    """The mean of a setting, with its spread if there is one."""
    if not setting.values:
        return "–"
    text = metric.text(setting.mean)
    return text if math.isnan(setting.std) else f"{text} ± {metric.text(setting.std, digits=3)}"


def short(value: str) -> str:
    """A value as a person reads it: few digits of a number that a sampler drew."""
    number = _number(value)
    return value if number is None or len(value) <= 8 else f"{number:.4g}"


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
