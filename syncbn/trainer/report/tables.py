"""The tables of a report, as a person reads them: what runs are and came to, and the worst layers of one."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from syncbn.trainer.runs.drift_figures import DRIFT_FIGURES, DriftFigure
from syncbn.trainer.runs.metric import Metric, in_digits, metric_of
from syncbn.trainer.runs.reader import Points, Run

MOST_LAYERS = 12  # in the table of the worst


@dataclass
class Cell:
    text: str
    best: bool = False  # of its row, or of its column in the table of worst layers the worst: told in bold


@dataclass
class Table:
    columns: list[str]
    rows: dict[str, list[Cell]]
    caption: str


def facts(runs: Sequence[Run]) -> dict[str, list[Cell]]:
    """What each run was and came to: {fact: [a cell for each run]}, facts that no run has left out."""
    config = [run.config for run in runs]
    rows = {
        "state": [_cell(_state(run)) for run in runs] if any(run.result is None for run in runs) else [],
        "data": [_cell(c.get("data.name")) for c in config],
        "model": [_cell(c.get("model.name")) for c in config],
        "norm": [_cell(f"{c.get('norm.name', '?')}{', fused' if c.get('norm.fuse') else ''}") for c in config],
        "ranks × images": [_cell(_batch(run)) for run in runs],
    }
    for name, metric in _evaluated(runs):
        if metric and metric.detail:
            continue
        rows[f"eval {_words(name)}"] = _compared([_last(run, name) for run in runs], metric)
        if metric and metric.headline and not name.startswith("recalibrated"):
            rows[f"best {_words(name)}"] = [_cell(_best(run.points.get(f"eval/{name}", {}), metric)) for run in runs]
    speeds = [run.points.get("train/images_per_s", {}).values() for run in runs]
    rows |= {
        "steps": [_cell(f"{run.last_step:,}") for run in runs],
        "images/s, median": _compared([median(speed) if speed else None for speed in speeds], Metric("images_per_s")),
        "time": [_cell(_time(run)) for run in runs],
    }
    return {name: cells for name, cells in rows.items() if any(cell.text != "–" for cell in cells)}


def by_part(runs: Sequence[Run]) -> dict[str, Table]:
    """Figures of parts, such as classes, by what they measure: a row for each part, with a cell for each run."""
    metrics = {metric.name: metric for run in reversed(runs) for metric in run.metrics if metric.detail}
    tables: dict[str, Table] = {}
    for prefix in "", "recalibrated_":
        for metric in metrics.values():
            of = f"eval {_words(prefix + metric.of)}"
            table = tables.setdefault(of, Table([run.label for run in runs], {}, ""))
            table.rows[metric.detail] = _compared([_last(run, prefix + metric.name) for run in runs], metric)
    for table in tables.values():
        if any(cell.text == "–" for cells in table.rows.values() for cell in cells):
            table.caption = "–: absent from the eval data."
    return {of: t for of, t in tables.items() if any(c.text != "–" for cells in t.rows.values() for c in cells)}


def worst_layers(run: Run) -> Table | None:
    """The layers that drift most, those named in a verdict first; none if no figure of a layer was written."""
    ordering = next((name for name, figure in DRIFT_FIGURES.items() if figure.sorts and name in run.drift), None)
    if ordering is None:
        return None
    settled = {f: {layer: _settled(p) for layer, p in run.drift[f].items()} for f in DRIFT_FIGURES if f in run.drift}
    sorted_by = DRIFT_FIGURES[ordering]
    sign = -1 if sorted_by.worst == "high" else 1
    layers = sorted(settled[ordering], key=lambda layer: sign * settled[ordering][layer])
    blamed = [v.text for v in run.verdicts or []]
    layers.sort(key=lambda layer: next((i for i, text in enumerate(blamed) if _names(text, layer)), len(blamed)))
    columns = {
        DRIFT_FIGURES[name].head: _column(values, layers, DRIFT_FIGURES[name]) for name, values in settled.items()
    }
    if run.rank_z:
        _, grid = run.rank_z
        columns["farthest rank, z"] = [_farthest(dict(zip(grid.rows, grid.values, strict=True)).get(x)) for x in layers]
    rows = {layer: [cells[i] for cells in columns.values()] for i, layer in enumerate(layers[:MOST_LAYERS])}
    shown = f"{len(rows)} of {len(layers)} layers" if len(layers) > len(rows) else f"All {len(layers)} layers"
    first = "those named in a verdict first, then " if blamed else ""
    caption = f"{shown}, {first}by {sorted_by.head}. Medians over the last quarter of the run; bold: the worst."
    return Table(list(columns), rows, caption)


def duration(seconds: float) -> str:
    """A time as a person reads it."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def setting(value: Any) -> str:
    """A value of a config as it is written on the command line; Ellipsis: the config has no such key."""
    if value is ...:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cell(text: Any) -> Cell:
    return Cell("–" if text is None else str(text))


def _compared(values: Sequence[float | None], metric: Metric | None) -> list[Cell]:
    """A row of numbers, the best in bold if there is something to choose."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    best = metric.best(finite) if metric and len(set(finite)) > 1 else None
    text = metric.text if metric else partial(in_digits, digits=4)
    return [_cell(None) if v is None else Cell(text(v), v == best) for v in values]


def _evaluated(runs: Sequence[Run]) -> list[tuple[str, Metric | None]]:
    """What evaluations wrote, the headline first, each with how it is read."""
    metrics = {metric.name: metric for run in reversed(runs) for metric in run.metrics}
    keys = dict.fromkeys(key for run in runs for key in run.points if key.startswith("eval/"))
    evaluated = [(key.removeprefix("eval/"), metric_of(key, [*metrics.values()])) for key in keys]
    shown = [(name, metric) for name, metric in evaluated if name not in ("images", "skipped_images")]
    return sorted(shown, key=lambda each: not (each[1] and each[1].headline))


def _last(run: Run, name: str) -> float | None:
    points = run.points.get(f"eval/{name}")
    return points[max(points)] if points else None


def _best(points: Points, metric: Metric) -> str | None:
    finite = {step: value for step, value in points.items() if math.isfinite(value)}
    if not finite:
        return None
    best = metric.best(finite.values())
    step = next(step for step, value in finite.items() if value == best)
    return f"{metric.text(best)}, step {step:,}"


def _state(run: Run) -> str:
    return "unfinished: still going, or died" if run.result is None else "finished"


def _batch(run: Run) -> str:
    ranks = (run.result or {}).get("ranks") or (len(run.rank_z[1].columns) if run.rank_z else None)
    batch, accumulate = run.config.get("data.batch_per_rank", "?"), run.config.get("train.accumulate", 1)
    if batch == "auto" and run.result and "global_batch" in run.result:
        batch = run.result["global_batch"] // run.result["ranks"]
    times = f" × {accumulate} accumulated" if accumulate != 1 else ""
    return f"{ranks or '?'} × {batch}{times}"


def _time(run: Run) -> str | None:
    seconds = (run.result or {}).get("duration_s") or max(run.points.get("time_s", {}).values(), default=None)
    return None if seconds is None else duration(seconds)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _settled(points: Points) -> float:
    """The median over the last quarter of what was written."""
    values = [v for v in points.values() if math.isfinite(v)]
    return median(values[-max(1, len(values) // 4) :]) if values else math.nan


def _column(values: dict[str, float], layers: Sequence[str], figure: DriftFigure) -> list[Cell]:
    finite = [v for v in values.values() if math.isfinite(v)]
    worst = figure.worse(finite) if len(set(finite)) > 1 else None
    return [Cell(in_digits(values[x]), values[x] == worst) if x in values else _cell(None) for x in layers]


def _farthest(ranks: list[float] | None) -> Cell:
    finite = {rank: z for rank, z in enumerate(ranks or []) if math.isfinite(z)}
    if not finite:
        return _cell(None)
    rank = max(finite, key=finite.__getitem__)
    return _cell(f"rank {rank}: {in_digits(finite[rank])}")


def _names(text: str, layer: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(layer)}(?![\w.])", text) is not None
