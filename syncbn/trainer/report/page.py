"""The report of a run, of several side by side, or of a sweep: one HTML file that needs nothing else.

`python -m syncbn.trainer.report runs/a runs/b -o report.html`
"""

import argparse
import math
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from syncbn.trainer.errors import UserError
from syncbn.trainer.report import boxes, charts, comparison, plots
from syncbn.trainer.report.sweep_plot import drawn_along
from syncbn.trainer.report.tables import by_part, duration, facts, setting, worst_layers
from syncbn.trainer.runs import sweep_folder
from syncbn.trainer.runs.drift_figures import DRIFT_FIGURES, LIKENESS, OFFSETS, HeatMap
from syncbn.trainer.runs.pictures import Chart, Pictures
from syncbn.trainer.runs.reader import Grid, Run, Verdict, differing, read_runs

NOT_LEARNT = ("lr", "step_ms", "data_wait_share", "skipped_images", "images", "images_per_s")  # has no learning curve


SMALLEST_PX, LARGEST_PX = 120, 380  # widths that a picture has on the page, at least
LARGEST_PANEL_PX = 190  # where it is one of several in a picture
SMALLEST_BOXED_PX, LARGEST_BOXED_PX = 170, 290  # where boxes are drawn over it
MOST_OPEN = 60  # rows of a table of parts; one of more is to be opened


def runs_page(runs: Sequence[Run]) -> str:
    """The whole report as HTML; the same runs give the same bytes."""
    ids = (f"s{i}" for i in count())
    return _rendered(
        "report.html.jinja",
        sources="config.yaml, metrics.jsonl and result.json",
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=[_shown(run, i) for i, run in enumerate(runs)],
        facts=facts(runs),
        differences={key: [setting(v) for v in values] for key, values in differing(runs).items()},
        curves=list(_curves(runs, ids)),
        parts=by_part(runs),
        most_open=MOST_OPEN,
        pictures=list(_pictures(runs, ids)),
        maps=list(_maps(runs, ids)),
        worst=worst_layers(runs[0]) if len(runs) == 1 else None,
    )


def sweep_page(name: str, sweep: sweep_folder.Sweep) -> str:
    """The report of a sweep as HTML: every setting and point, and the metric along each swept key."""
    ids = (f"s{i}" for i in count())
    sign = -1 if sweep.better == "more" else 1
    ran = sorted(sweep.points, key=lambda point: math.inf if point.objective is None else sign * point.objective)
    return _rendered(
        "sweep.html.jinja",
        sources=sweep_folder.NAME,
        title=name,
        facts={
            "points": str(sweep.total or len(sweep.points)),
            "came to": comparison.tally(sweep),
            "compared by": sweep.metric,
        },
        table=comparison.table(sweep),
        reasons=comparison.reasons(sweep),
        figures=list(_along(sweep, ids)),
        points=[_point_row(point, sweep) for point in ran],
        keys=sweep.swept,
        metric=sweep.metric,
    )


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run or a sweep: where it lies. Raises UserError if it holds neither."""
    return _write_page(_page_of(folder), folder / "report.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: its exit code."""
    parser = argparse.ArgumentParser("python -m syncbn.trainer.report", description="Write the report of runs as HTML.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/NAME, or that of one sweep"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html, in the run's folder if it is one run"
    )
    given = parser.parse_args(arguments)
    try:
        text = _page_of(*given.runs)
        print(_write_page(text, given.output or (given.runs[0] if _one(given.runs) else Path()) / "report.html"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _page_of(*folders: Path) -> str:
    sweeps = [folder for folder in folders if sweep_folder.is_sweep(folder)]
    if sweeps and not _one(folders):
        raise UserError(f"{sweeps[0]} is a sweep: give it alone, or give runs")
    return (
        sweep_page(sweeps[0].resolve().name, sweep_folder.read_sweep(sweeps[0]))
        if sweeps
        else runs_page(read_runs(folders))
    )


def _one(folders: Sequence[Path]) -> bool:
    return len({folder.resolve() for folder in folders}) == 1


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(values)


def _write_page(text: str, file: Path) -> Path:
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
        **_style(index),
        "verdicts": run.verdicts and [{"text": v.text, "when": _when(v)} for v in run.verdicts],
    }


def _point_row(point: sweep_folder.Point, sweep: sweep_folder.Sweep) -> dict[str, Any]:
    """A row of the table of points."""
    return {
        "choices": [comparison.short(point.choices.get(key, "–")) for key in sweep.swept],
        "state": point.state,
        "value": "–" if point.objective is None else sweep.measured.text(point.objective),
        "time": "–" if point.took_s is None else duration(point.took_s),
        "link": point.run and f"../{quote(point.run)}/report.html" if point.done else None,
    }


def _along(sweep: sweep_folder.Sweep, ids: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The metric along each swept key, with a line for each combination of the others."""
    for key in sweep.swept:
        lines = comparison.lines(sweep, key)
        if len({value for line in lines for value in line.along}) < 2:
            continue
        numbers, log = comparison.scale([value for line in lines for value in line.along]) or (None, False)
        percent = sweep.measured.unit == "%"
        drawn = [vars(line) for line in lines]
        title = f"{sweep.metric} along {key}"
        figure = drawn_along(drawn, title=title, key=key, numbers=numbers, log=log, percent=percent)
        legend = [{**_style(i), "label": line.name} for i, line in enumerate(lines) if line.name]
        yield {"svg": _drawn(figure, ids), "legend": legend}


def _style(index: int) -> dict[str, str]:
    """The colour and the dash of the run or line of that number, as the figures have them."""
    return {
        "colour": plots.COLOURS[index % len(plots.COLOURS)],
        "dash": ("solid", "dashed", "dotted")[index // len(plots.COLOURS) % 3],
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
    metrics = {metric.name: metric for run in reversed(runs) for metric in run.metrics}
    first = [name for name in metrics if name in names]
    names -= {name for name, metric in metrics.items() if metric.detail}
    first = [name for name in first if name in names]
    for name in [*first, *sorted(names.difference(first))]:
        unit = metrics[name].unit if name in metrics else ""
        percent = unit == "%"
        title = name.replace("_", " ") + (f", {unit}" if unit and not percent else "")
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


def _pictures(runs: Sequence[Run], ids: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Of each run that has some, its pictures, as wide as they are to be shown, and its charts."""
    for i, run in enumerate(runs):
        shown = run.pictures
        if not (shown.each or shown.charts):
            continue
        width = max((picture.width // max(1, len(picture.panels)) for picture in shown.each), default=0)  # of a panel
        panels = max((len(picture.panels or picture.boxes) for picture in shown.each), default=0)
        smallest, largest = SMALLEST_PX, LARGEST_PANEL_PX if panels > 1 else LARGEST_PX
        if any(picture.boxes for picture in shown.each):
            smallest, largest = SMALLEST_BOXED_PX, LARGEST_BOXED_PX
        panel = min(max(width, smallest), largest)
        named = boxes.named(shown)
        yield {
            "run": _shown(run, i),
            "step": f"step {shown.step:,}",
            "images": [
                {
                    "source": f"data:image/png;base64,{b64encode(p.data).decode()}",
                    "caption": p.caption,
                    "panels": p.panels,
                    "boxed": boxes.panels(p, shown.legend, panel, named=named),
                    "id": next(ids),
                    "size": (p.width, p.height),
                }
                for p in shown.each
            ],
            "panel": panel,
            "width": panel * max(1, panels),
            "small": width < SMALLEST_PX,
            "unsure": f"{boxes.SUREST_FROM:.0%}" if _scored(shown) else "",
            "legend": shown.legend,
            "charts": [_chart(chart, ids) for chart in shown.charts],
        }


def _scored(pictures: Pictures) -> bool:
    return any(box.score is not None for png in pictures.each for each in png.boxes.values() for box in each)


def _chart(chart: Chart, ids: Iterator[str]) -> dict[str, Any]:
    figure = charts.drawn(chart)
    return {"svg": _drawn(figure, ids), "width": round(96 * figure.get_figwidth()), "caption": chart.caption}


def _maps(runs: Sequence[Run], ids: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The heat maps, each kind with one scale of colours for all runs, so that they can be compared."""
    if likeness := _likeness(runs):
        yield from _map(likeness, [run.grid(likeness) for run in runs], runs, ids)
    yield from _map("n_eff", [run.grid("n_eff") for run in runs], runs, ids)
    offsets = [run.rank_z for run in runs]
    steps = {step for step, _ in filter(None, offsets)}
    when = f"step {steps.pop():,}, the last evaluation" if len(steps) == 1 else "the last evaluation of each"
    grids = [grid[1] if grid else Grid([], [], []) for grid in offsets]
    yield from _map("rank_z", grids, runs, ids, when=f" At {when}.")


def heat_maps(run: Run) -> dict[str, tuple[Grid, Any]]:
    """The cells and a figure of each heat map of a run, by what it shows."""
    grids = {name: run.grid(name) for name in (_likeness([run]), "n_eff") if name}
    if run.rank_z:
        grids["rank_z"] = run.rank_z[1]
    return {
        name: (grid, _heat_map(name, grid, _limits(name, [grid]), _coloured(name).title))
        for name, grid in grids.items()
        if grid.rows
    }


def _coloured(name: str) -> HeatMap:
    heat_map = OFFSETS if name == "rank_z" else DRIFT_FIGURES[name].heat_map
    assert heat_map
    return heat_map


def _likeness(runs: Sequence[Run]) -> str | None:
    return next((figure for figure in LIKENESS if any(figure in run.drift for run in runs)), None)


def _limits(name: str, grids: Sequence[Grid]) -> tuple[float, float]:
    heat_map = _coloured(name)
    low, high = plots.span((row for grid in grids for row in grid.values), positive=heat_map.log)
    return low if heat_map.low is None else heat_map.low, max(high, heat_map.high)


def _heat_map(name: str, grid: Grid, limits: tuple[float, float], title: str) -> Any:
    return plots.heat_map(
        grid.values,
        grid.rows,
        grid.columns,
        title=title,
        unit=_coloured(name).scale,
        along=grid.along,
        worst=DRIFT_FIGURES[name].worst if name in DRIFT_FIGURES else "high",
        limits=limits,
        log=_coloured(name).log,
    )


def _map(
    name: str, grids: Sequence[Grid], runs: Sequence[Run], ids: Iterator[str], when: str = ""
) -> Iterator[dict[str, Any]]:
    if not any(grid.rows for grid in grids):
        return
    heat_map, limits, drawn = _coloured(name), _limits(name, grids), []
    for i, grid in enumerate(grids):
        if grid.rows:
            figure = _heat_map(name, grid, limits, heat_map.title if len(runs) == 1 else "")
            drawn.append({"run": _shown(runs[i], i), "svg": _drawn(figure, ids)})
    yield {"title": heat_map.title, "caption": f"{heat_map.caption}.{when}", "drawn": drawn}


def _drawn(figure: Any, ids: Iterator[str]) -> Markup:
    return Markup(plots.svg(figure, next(ids)))
