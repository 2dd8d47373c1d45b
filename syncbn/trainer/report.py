"""The report of a run, or of several side by side: one HTML file that needs nothing else.

`python -m syncbn.trainer.report runs/a runs/b -o report.html`
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from syncbn.trainer import plots
from syncbn.trainer.errors import UserError
from syncbn.trainer.runs import Grid, Run, Verdict, differing, read, read_all
from syncbn.trainer.tables import facts, setting, worst_layers

NOT_LEARNT = ("lr", "step_ms", "data_wait_share", "skipped_images", "images", "images_per_s")  # has no learning curve
CURVES_FIRST = ("loss", "accuracy")


@dataclass
class Kind:
    """A kind of heat map: what it shows, and how it is coloured."""

    title: str
    unit: str
    caption: str
    low: float | None = None  # where the scale of colours begins; none: at the lowest number
    high: float = -math.inf  # where it ends at least, so that mere noise stays pale
    worst: str = "high"
    log: bool = False


OFFSETS = Kind(
    "Offset of each rank",
    "z",
    "How far each rank's mean is from the others': 1 is chance, above about 3 it differs",
    1,
    4,
)
# The first of these that was measured is drawn
LIKENESS = {
    "icc": Kind("ICC", "ICC", "How alike the images of one rank are, as against other ranks': 0 is chance", 0, 0.3),
    "f": Kind("F", "MSB/MSI", "Variance between ranks over variance within, of images: 1 is chance", 1, 2),
    "dmean_z": Kind("Batch against running mean", "z", "How far the batch is from the running mean: 1 is chance", 1, 4),
}
EFFECTIVE = Kind(
    "Effective batch size", "n_eff", "How many independent samples the statistics rest on", worst="low", log=True
)


def page(runs: Sequence[Run]) -> str:
    """The whole report as HTML; the same runs give the same bytes."""
    ids = (f"s{i}" for i in count())
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text())
    return template.render(
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=[_shown(run, i) for i, run in enumerate(runs)],
        facts=facts(runs),
        differences={key: [setting(v) for v in values] for key, values in differing(runs).items()},
        curves=list(_curves(runs, ids)),
        maps=list(_maps(runs, ids)),
        worst=worst_layers(runs[0]) if len(runs) == 1 else None,
    )


def write(folder: Path) -> Path:
    """Write report.html into a run's folder: where it lies. Raises UserError if the folder holds no run."""
    return _write([read(folder)], folder / "report.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: its exit code."""
    parser = argparse.ArgumentParser("python -m syncbn.trainer.report", description="Write the report of runs as HTML.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/NAME")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html, in the run's folder if it is one run"
    )
    given = parser.parse_args(arguments)
    try:
        runs = read_all(given.runs)
        print(_write(runs, given.output or (given.runs[0] if len(runs) == 1 else Path()) / "report.html"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(runs: Sequence[Run], file: Path) -> Path:
    text = page(runs)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): give another file with -o") from error
    return file


def _shown(run: Run, index: int) -> dict[str, Any]:
    return {
        "label": run.label,
        "notes": run.notes,
        "source": run.source,
        "colour": plots.COLOURS[index % len(plots.COLOURS)],
        "dash": ("solid", "dashed", "dotted")[index // len(plots.COLOURS) % 3],
        "verdicts": run.verdicts and [{"text": v.text, "when": _when(v)} for v in run.verdicts],
    }


def _when(verdict: Verdict) -> str:
    if verdict.first_step is None:
        return ""
    if verdict.last_step in (None, verdict.first_step):
        return f"step {verdict.first_step:,}"
    return f"steps {verdict.first_step:,} to {verdict.last_step:,}"


def _curves(runs: Sequence[Run], ids: Iterator[str]) -> Iterator[Markup]:
    """A figure for each metric: of one run with training and evaluation together, of several each by itself."""
    keys = {key for run in runs for key in run.points if key.startswith(("train/", "eval/"))}
    names = {key.partition("/")[2].removeprefix("recalibrated_") for key in keys}.difference(NOT_LEARNT)
    for name in sorted(names, key=lambda n: (CURVES_FIRST.index(n) if n in CURVES_FIRST else len(CURVES_FIRST), n)):
        title, percent = name.replace("_", " "), name.endswith("accuracy")
        parts = {"train": f"train/{name}", "eval": f"eval/{name}", "recalibrated": f"eval/recalibrated_{name}"}
        parts = {part: key for part, key in parts.items() if key in keys}
        if len(runs) == 1:
            lines = {part: runs[0].points[key] for part, key in parts.items()}
            yield _drawn(plots.curves(lines, title=title, percent=percent), ids)
            continue
        for part, key in parts.items():
            lines = {run.label: run.points.get(key, {}) for run in runs}
            yield _drawn(plots.curves(lines, title=f"{title}, {part}", percent=percent, legend=False), ids)
    if "train/images_per_s" in keys:
        lines = {run.label: run.points.get("train/images_per_s", {}) for run in runs}
        yield _drawn(plots.curves(lines, title="images/s", from_zero=True, legend=False), ids)


def _maps(runs: Sequence[Run], ids: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The heat maps, each kind with one scale of colours for all runs, so that they can be compared."""
    if likeness := _likeness(runs):
        yield from _map(LIKENESS[likeness], [run.grid(likeness) for run in runs], runs, ids)
    yield from _map(EFFECTIVE, [run.grid("n_eff") for run in runs], runs, ids)
    told = [run.rank_z for run in runs]
    steps = {step for step, _ in filter(None, told)}
    when = f"step {steps.pop():,}, the last evaluation" if len(steps) == 1 else "the last evaluation of each"
    grids = [grid[1] if grid else Grid([], [], []) for grid in told]
    yield from _map(OFFSETS, grids, runs, ids, when=f" At {when}.")


def heat_maps(run: Run) -> dict[str, tuple[Grid, Any]]:
    """The cells and a figure of each heat map of a run, by what it shows."""
    kinds = {name: LIKENESS[name] for name in [_likeness([run])] if name} | {"n_eff": EFFECTIVE}
    grids = {name: (kind, run.grid(name)) for name, kind in kinds.items()}
    if run.rank_z:
        grids["rank_z"] = OFFSETS, run.rank_z[1]
    return {
        name: (grid, _heat_map(kind, grid, _limits(kind, [grid]), kind.title))
        for name, (kind, grid) in grids.items()
        if grid.rows
    }


def _likeness(runs: Sequence[Run]) -> str | None:
    return next((figure for figure in LIKENESS if any(figure in run.drift for run in runs)), None)


def _limits(kind: Kind, grids: Sequence[Grid]) -> tuple[float, float]:
    low, high = plots.span((row for grid in grids for row in grid.values), positive=kind.log)
    return low if kind.low is None else kind.low, max(high, kind.high)


def _heat_map(kind: Kind, grid: Grid, limits: tuple[float, float], title: str) -> Any:
    return plots.heat_map(
        grid.values,
        grid.rows,
        grid.columns,
        title=title,
        unit=kind.unit,
        along=grid.along,
        worst=kind.worst,
        limits=limits,
        log=kind.log,
    )


def _map(
    kind: Kind, grids: Sequence[Grid], runs: Sequence[Run], ids: Iterator[str], when: str = ""
) -> Iterator[dict[str, Any]]:
    if not any(grid.rows for grid in grids):
        return
    limits, drawn = _limits(kind, grids), []
    for i, grid in enumerate(grids):
        if grid.rows:
            figure = _heat_map(kind, grid, limits, kind.title if len(runs) == 1 else "")
            drawn.append({"run": _shown(runs[i], i), "svg": _drawn(figure, ids)})
    yield {"title": kind.title, "caption": f"{kind.caption}.{when}", "drawn": drawn}


def _drawn(figure: Any, ids: Iterator[str]) -> Markup:
    return Markup(plots.svg(figure, next(ids)))


if __name__ == "__main__":
    sys.exit(main())
