"""The study: what each norm comes to at 1, 2, 4, 8 and 32 images a rank, on CIFAR-10 over 8 ranks of this machine.

    python -m benchmarks small_batch DATA [--runs FOLDER] [--plot FILE] [WORD ...]

It takes hours on two cores; the same command goes on. DATA holds train/<class>/*.jpg and test/<class>/*.jpg. Each point
is a run of `experiment=small_batch/cifar10` for the same number of images; steps, and the rate, follow the batch. The
tables have, as mean ± standard deviation over seeds, the test error; how far training's accuracy, in its last epoch, is
above the test's; how far the error falls with exact statistics of training images in place of the running ones
(`eval.recalibrate`); and what the drift monitor saw at the end of training, of the worst layer: the effective batch
size, and F.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.measure import records
from benchmarks.measure.records import Result
from benchmarks.trainer.study import image_folder, time_taken, train, worst
from syncbn.trainer.report.plots import styled
from syncbn.trainer.report.sweep_plot import drawn_along
from syncbn.trainer.runs import reader
from syncbn.trainer.runs.sweep_folder import Sweep

NORMS = ("local", "sync", "group", "batch_renorm", "ws_group", "none")
BATCHES = (1, 2, 4, 8, 32)
SEEDS = (0, 1, 2)

Cells = dict[tuple[str, int], list[float]]
"""(norm, images a rank) -> a value of each seed that came to its end"""


def figures(sweep: Sweep, root: Path, of: Callable[[reader.Run], float | None]) -> Cells:
    """A figure of each point's run."""
    cells: Cells = {(norm, batch): [] for norm in NORMS for batch in BATCHES}
    for point in sweep.points:
        if point.done and point.run:
            value = of(reader.read_run(root / point.run))
            if value is not None:
                cells[point.choices["norm"], int(point.choices["data.batch_per_rank"])].append(value)
    return cells


def error(run: reader.Run) -> float | None:
    return None if run.result is None else 100 * (1 - run.result["metrics"]["eval/accuracy"])


def gap(run: reader.Run) -> float | None:
    """Points by which the accuracy in the last epoch, of augmented images and in training mode, is above the test's."""
    if run.result is None:
        return None
    last = run.last_step - run.last_step / run.config["train.epochs"]
    seen = [value for step, value in run.points["train/accuracy"].items() if step > last]
    return 100 * (mean(seen) - run.result["metrics"]["eval/accuracy"])


def regained(run: reader.Run) -> float | None:
    """Points of accuracy that exact statistics give back."""
    metrics = (run.result or {}).get("metrics", {})
    if "eval/recalibrated_accuracy" not in metrics:
        return None
    return 100 * (metrics["eval/recalibrated_accuracy"] - metrics["eval/accuracy"])


TABLES: dict[str, Callable[[reader.Run], float | None]] = {
    "Test error, %": error,
    "Train/eval gap, points of accuracy": gap,
    "Points of accuracy that exact statistics give back": regained,
    "Effective batch size of the worst layer": worst("n_eff", min),
    "F of the worst layer": worst("f", max),
}


def rows(title: str, cells: Cells) -> Iterator[Result]:
    """A row for each norm, with a column for each number of images a rank."""
    for norm in NORMS:
        yield Result(title, {"norm": norm}, {str(batch): records.mean(cells[norm, batch]) for batch in BATCHES})


@styled
def draw(cells: Cells, file: Path) -> None:
    """The test error against images a rank, a line for each norm."""
    measured = {norm: [batch for batch in BATCHES if cells[norm, batch]] for norm in NORMS}
    lines = [
        {
            "name": norm,
            "along": [str(batch) for batch in batches],
            "means": [mean(cells[norm, batch]) / 100 for batch in batches],
            "stds": [stdev(each) / 100 if len(each := cells[norm, b]) > 1 else math.nan for b in batches],
        }
        for norm, batches in measured.items()
    ]
    numbers = [float(value) for line in lines for value in line["along"]]
    look: Any = {"title": "Test error on CIFAR-10, mean ± std", "key": "images a rank", "log": True, "percent": True}
    figure = drawn_along(lines, numbers=numbers, width=6.5, height=3.8, **look)
    (axes,) = figure.axes
    highest_first = sorted(
        zip(lines, axes.containers, strict=True), key=lambda pair: [-value for value in pair[0]["means"][:1]]
    )
    names: list[str] = [line["name"] for line, _ in highest_first]
    marks: Any = [mark for _, mark in highest_first]  # a legend takes containers, too
    figure.legend(marks, names, loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=150, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=image_folder, help="CIFAR-10 as an image folder")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/small_batch"), help="where runs lie, and are gone on with"
    )
    parser.add_argument("--plot", type=Path, help="draw the test error, as .svg or .png")
    parser.add_argument("words", nargs="*", help="of train.py, for every point: launch.device=cuda, say")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    swept = {"seed": SEEDS, "data.batch_per_rank": BATCHES, "norm": NORMS}
    sweep = train("small_batch/cifar10", swept, options.data, options.runs, options.words)
    for title, of in TABLES.items():
        yield from rows(title, figures(sweep, options.runs, of))
    print(f"\n{time_taken(sweep, options.runs)}")
    if options.plot:
        draw(figures(sweep, options.runs, error), options.plot)
