"""A study of norms: a recipe trained with each of them over several seeds, tables of what comes of it, and a plot."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import records
from benchmarks.measure.records import Result
from benchmarks.trainer.study import time_taken, train
from syncbn.trainer.report.plots import COLOURS, styled
from syncbn.trainer.runs import reader

NORMS = ("sync", "local", "group", "none")
SEEDS = (0, 1, 2)

Runs = Mapping[str, list[reader.Run]]
"""By norm, the run of each seed that came to its end."""


@dataclass(frozen=True)
class Study:
    """What is trained, and what is told of it.

    Args:
        recipe: of conf/experiment.
        title: of the table.
        figures: its columns, by name.
        each_class: the title of the table of classes, and what the names of their metrics begin with.
        drawn: the columns that are drawn beside each other, each with its title.
    """

    recipe: str
    title: str
    figures: Mapping[str, Callable[[reader.Run], float | None]]
    each_class: tuple[str, str]
    drawn: Mapping[str, str]


def metric(name: str) -> Callable[[reader.Run], float | None]:
    """A figure of the last evaluation, in per cent."""

    def value(run: reader.Run) -> float | None:
        share = (run.result or {}).get("metrics", {}).get(f"eval/{name}")
        return None if share is None else 100 * share

    return value


def over_seeds(runs: list[reader.Run], of: Callable[[reader.Run], float | None]) -> list[float]:
    return [value for run in runs if (value := of(run)) is not None]


def rows(study: Study, runs: Runs) -> Iterator[Result]:
    """A row for each norm: its figures, then those of each class."""
    for norm, each in runs.items():
        figures = {name: records.mean(over_seeds(each, of)) for name, of in study.figures.items()}
        yield Result(study.title, {"norm": norm}, figures)
    title, begins = study.each_class
    classes = [m.name for run in next(iter(runs.values()))[:1] for m in run.metrics if m.name.startswith(begins)]
    for norm, each in runs.items():
        figures = {name.removeprefix(begins): records.mean(over_seeds(each, metric(name))) for name in classes}
        yield Result(title, {"norm": norm}, figures)


@styled
def draw(study: Study, runs: Runs, file: Path) -> None:
    """A bar of each norm in each panel; a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 2.4), layout="constrained")
    panels: Any = figure.subplots(1, len(study.drawn), sharey=True)
    for axes, (name, title) in zip(panels, study.drawn.items(), strict=True):
        for place, norm in enumerate(runs):
            if values := over_seeds(runs[norm], study.figures[name]):
                axes.barh(place, mean(values), height=0.6, color=COLOURS[place], alpha=0.85)
                axes.plot(values, [place] * len(values), "o", markersize=3.5, color="black", alpha=0.6)
                axes.annotate(
                    f"{mean(values):.1f}", (max(values), place), (6, 0), textcoords="offset points", va="center"
                )
            else:
                axes.annotate("no batch statistics", (0, place), (4, 0), textcoords="offset points", va="center")
        axes.set_title(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(runs)), [f"norm={norm}" for norm in runs])
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=150, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)


def add_options(study: Study, folder: Callable[[str], Path], parser: argparse.ArgumentParser) -> None:
    """folder: checks that a name is that of a folder with the data."""
    parser.add_argument("data", type=folder, help="the data set, as the recipe has it")
    runs = Path("runs") / study.recipe
    parser.add_argument("--runs", type=Path, default=runs, help="where runs lie, and are gone on with")
    parser.add_argument("--plot", type=Path, help=f"draw {' and '.join(study.drawn)}, as .svg or .png")
    parser.add_argument("words", nargs="*", help="of train.py, for every point: launch.device=cuda, say")


def measure(study: Study, options: argparse.Namespace) -> Iterator[Result]:
    swept = {"seed": SEEDS, "norm": NORMS}
    sweep = train(study.recipe, swept, options.data, options.runs, options.words)
    runs: Runs = {
        norm: [
            reader.read_run(options.runs / point.run)
            for point in sweep.points
            if point.done and point.run and point.choices["norm"] == norm
        ]
        for norm in NORMS
    }
    yield from rows(study, runs)
    print(f"\n{time_taken(sweep, options.runs)}")
    if options.plot:
        draw(study, runs, options.plot)
