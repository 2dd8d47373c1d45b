"""The study of streets: what each norm comes to at one image a rank, on CamVid over 8 ranks of this machine.

    python -m benchmarks camvid DATA [--runs FOLDER] [--plot FILE] [WORD ...]

It takes an hour on two cores; the same command goes on. DATA holds {train,val}/{images,masks}/ and classes.txt, as
data=mask_folder has it. Each point is a run of `experiment=camvid`. The tables have, as mean ± standard deviation over
seeds, the mean IoU at native size, with running statistics and with exact ones of 8 training batches, what the drift
monitor saw at the end of training, of the worst layer, and the IoU of each class.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import records
from benchmarks.measure.records import Result
from benchmarks.trainer.study import image_folder, time_taken, train, worst
from syncbn.trainer.report.plots import COLOURS, styled
from syncbn.trainer.runs import reader

NORMS = ("sync", "local", "group", "none")
SEEDS = (0, 1, 2)

Runs = Mapping[str, list[reader.Run]]
"""By norm, the run of each seed that came to its end."""


def metric(name: str) -> Callable[[reader.Run], float | None]:
    """A figure of the last evaluation, in per cent."""

    def value(run: reader.Run) -> float | None:
        share = (run.result or {}).get("metrics", {}).get(f"eval/{name}")
        return None if share is None else 100 * share

    return value


FIGURES: dict[str, Callable[[reader.Run], float | None]] = {
    "val mIoU, %": metric("miou"),
    "with exact statistics, %": metric("recalibrated_miou"),
    "pixel accuracy, %": metric("pixel_accuracy"),
    "effective batch of the worst layer": worst("n_eff", min),
    "dead channels of the worst layer": worst("dead", max),
}


def over_seeds(runs: list[reader.Run], of: Callable[[reader.Run], float | None]) -> list[float]:
    return [value for run in runs if (value := of(run)) is not None]


def rows(runs: Runs) -> Iterator[Result]:
    """A row for each norm: its figures, then the IoU of each class."""
    for norm, each in runs.items():
        figures = {name: records.mean(over_seeds(each, of)) for name, of in FIGURES.items()}
        yield Result("CamVid, 8 ranks of one image", {"norm": norm}, figures)
    classes = [m.name for run in next(iter(runs.values()))[:1] for m in run.metrics if m.name.startswith("iou_")]
    for norm, each in runs.items():
        figures = {name.removeprefix("iou_"): records.mean(over_seeds(each, metric(name))) for name in classes}
        yield Result("IoU of each class, %", {"norm": norm}, figures)


@styled
def draw(runs: Runs, file: Path) -> None:
    """The mean IoU of each norm, beside it the effective batch that foretells it; a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 2.4), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    shown = ["val mIoU, %", "effective batch of the worst layer"]
    titles = ["Mean IoU on CamVid, %", "Effective batch size of the worst layer"]
    for axes, name, title in zip(panels, shown, titles, strict=True):
        for place, norm in enumerate(runs):
            if values := over_seeds(runs[norm], FIGURES[name]):
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=image_folder, help="CamVid as a mask folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"), help="where runs lie, and are gone on with")
    parser.add_argument("--plot", type=Path, help="draw the mean IoU and the effective batch, as .svg or .png")
    parser.add_argument("words", nargs="*", help="of train.py, for every point: launch.device=cuda, say")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    swept = {"seed": SEEDS, "norm": NORMS}
    sweep = train("camvid", swept, options.data, options.runs, options.words)
    runs: Runs = {
        norm: [
            reader.read_run(options.runs / point.run)
            for point in sweep.points
            if point.done and point.run and point.choices["norm"] == norm
        ]
        for norm in NORMS
    }
    yield from rows(runs)
    print(f"\n{time_taken(sweep, options.runs)}")
    if options.plot:
        draw(runs, options.plot)
