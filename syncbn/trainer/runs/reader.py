"""What a run's folder tells: its config, its figures over steps, its verdicts. Whole, still going, or died."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml

from syncbn.trainer.errors import UserError
from syncbn.trainer.option import flat
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.metric import CLASSIFICATION, Metric
from syncbn.trainer.runs.options import RunConfig
from syncbn.trainer.runs.pictures import Pictures, read_pictures

NUMBER = re.compile(r"(?<![\w.])(?<!rank )(?<!at )-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")

Points = dict[int, float]  # step -> value, by rising step


@dataclass
class Verdict:
    """What the drift of a run comes to, in words, and the steps between which it was seen."""

    text: str
    first_step: int | None
    last_step: int | None


@dataclass
class Grid:
    """values [rows][columns], nan where nothing was written; along: what a column is."""

    rows: list[str]
    columns: list[int]
    values: list[list[float]]
    along: str = "step"

    def cells(self) -> list[list[Any]]:
        """[row, column, value] of everything that was written."""
        return [
            [row, column, value]
            for row, values in zip(self.rows, self.values, strict=True)
            for column, value in zip(self.columns, values, strict=True)
            if isfinite(value)
        ]


@dataclass
class Run:
    """A run as its files have it.

    config: config.yaml, keys joined by dots. lines: metrics.jsonl. result: result.json; none if the run still goes or
    died. notes: what could not be read. metrics: how people read the run's own figures. pictures: of the last
    evaluation.
    """

    label: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    result: dict[str, Any] | None
    notes: list[str]
    source: str  # config.yaml, as it was written
    metrics: tuple[Metric, ...] = CLASSIFICATION
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @cached_property
    def points(self) -> dict[str, Points]:
        """Every number that was written: {key: {step: value}}. What was written twice for a step, counts once."""
        points_by_key: dict[str, Points] = {}
        for line in sorted(self.lines, key=lambda line: line["step"]):
            for key, value in line.items():
                if isinstance(value, float | int) and not isinstance(value, bool):
                    points_by_key.setdefault(key, {})[line["step"]] = float(value)
        return points_by_key

    @cached_property
    def drift(self) -> dict[str, dict[str, Points]]:
        """{figure: {layer: {step: value}}}, layers in the order in which the model runs them."""
        by_figure: dict[str, dict[str, Points]] = {}
        for key, points in self.points.items():
            head, _, rest = key.partition("/")
            layer, _, figure = rest.rpartition("/")
            if head == "drift" and layer:
                by_figure.setdefault(figure, {})[layer] = points
        return by_figure

    def grid(self, figure: str) -> Grid:
        """A figure of drift, layer by step."""
        layers = self.drift.get(figure, {})
        steps = sorted({step for points in layers.values() for step in points})
        return Grid(list(layers), steps, [[points.get(step, nan) for step in steps] for points in layers.values()])

    @cached_property
    def rank_z(self) -> tuple[int, Grid] | None:
        """How far each rank's offset is from chance, layer by rank, and the step of the last evaluation that told."""
        for line in reversed(self.lines):
            layers = line.get("drift/rank_z")
            if isinstance(layers, dict) and layers:
                ranks = max(len(values) for values in layers.values())
                rows = [[nan if v is None else float(v) for v in values] for values in layers.values()]
                rows = [row + [nan] * (ranks - len(row)) for row in rows]
                return line["step"], Grid(list(layers), list(range(ranks)), rows, "rank")
        return None

    @cached_property
    def verdicts(self) -> list[Verdict] | None:
        """In order of weight; none: drift was not measured."""
        drift = (self.result or {}).get("drift")
        if drift is not None:
            return [Verdict(v["text"], v.get("first_step"), v.get("last_step")) for v in drift.get("verdicts", [])]
        seen = [line for line in self.lines if isinstance(line.get("drift/verdicts"), list)]
        if not seen:
            return [] if self.drift else None
        verdicts: dict[str, Verdict] = {}
        for line in reversed(seen):  # the latest wording and order count; a text's numbers change from line to line
            for text in line["drift/verdicts"]:
                verdict = verdicts.setdefault(NUMBER.sub("#", text), Verdict(text, line["step"], line["step"]))
                verdict.first_step = line["step"]
        return list(verdicts.values())


def read_run(folder: Path, label: str | None = None) -> Run:
    """A run from its folder. Raises UserError if there is none in it."""
    where = folder.resolve()
    if where.is_file():
        raise UserError(f"{folder} is a file: give the run's folder, {folder.parent}")
    if not where.is_dir():
        raise UserError(f"{folder}: no such folder; give the folders of runs, such as runs/NAME")
    files = RunFolder(RunConfig(name=where.name, root=str(where.parent)))
    if not files.config.is_file():
        inside = sorted(where.glob("*/config.yaml"))
        hint = f"give those in it, such as {folder / inside[0].parent.name}" if inside else "give folders of runs"
        raise UserError(f"{folder} is no run (it has no config.yaml): {hint}")
    source = files.config.read_text(errors="replace")
    try:
        config = yaml.safe_load(source)
        assert isinstance(config, dict)
    except (yaml.YAMLError, AssertionError):
        raise UserError(f"{folder / files.config.name} is no config: the file is damaged, leave this run out") from None
    lines, notes = _lines(files.metrics)
    result, damaged = _result(files.result)
    metrics, pictures = files.named_metrics(), read_pictures(files.pictures)
    return Run(label or where.name, flat(config), lines, result, notes + damaged, source, metrics, pictures)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs from their folders, each once, labelled by as much of their paths as tells them apart."""
    distinct = {folder.resolve(): folder for folder in reversed(folders)}
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(distinct[path], "/".join(path.parts[-depth:])) for path in paths]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys in which the configs differ, with each run's value; a key that a run does not have is Ellipsis.

    Where a run lies and what it is called is left out.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith("run."))
    rows = {key: [run.config.get(key, ...) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        return [], [f"{path.name} is not there"]
    lines, damaged = [], []
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged.append(number)
    if len(damaged) == 1:
        return lines, [f"{path.name}: line {damaged[0]} cannot be read and was skipped"]
    if damaged:
        first = f"{len(damaged)} lines, the first of them line {damaged[0]}"
        return lines, [f"{path.name}: {first}, cannot be read and were skipped"]
    return lines, []


def _result(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    if not path.is_file():
        return None, []
    try:
        result = json.loads(path.read_text())
    except ValueError:
        result = None
    return (result, []) if isinstance(result, dict) else (None, [f"{path.name} cannot be read"])
