"""A study: a recipe trained at every combination of some settings, as a sweep that the same command goes on with."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn.trainer.errors import PREEMPTED
from syncbn.trainer.runs import reader
from syncbn.trainer.runs.sweep_folder import Sweep, is_sweep, read_sweep


def train(recipe: str, swept: Mapping[str, Sequence[Any]], data: Path, root: Path, more: Sequence[str] = ()) -> Sweep:
    """Run every point of conf/experiment's recipe that has not been run, each with more words."""
    words = [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]
    words += [f"data.root={data.absolute()}", f"run.root={root}", *more]
    done = subprocess.run([sys.executable, "train.py", "-m", f"experiment={recipe}", *words], check=False)
    sweeps = [read_sweep(folder) for folder in root.glob("sweep-*") if is_sweep(folder)]
    if done.returncode == PREEMPTED or not sweeps:
        sys.exit(done.returncode)
    return max(sweeps, key=lambda sweep: sweep.began)  # points may have come to nothing, as a norm may at one image


def worst(figure: str, of: Callable[..., float]) -> Callable[[reader.Run], float | None]:
    """The worst layer's last value of a figure of drift."""
    return lambda run: (
        of([points[max(points)] for points in run.drift[figure].values()]) if figure in run.drift else None
    )


def time_taken(sweep: Sweep, root: Path) -> str:
    """How long all runs took, in words."""
    took = [
        json.loads((root / point.run / "result.json").read_text())["duration_s"]
        for point in sweep.points
        if point.done and point.run
    ]
    return f"{len(took)} runs, {sum(took) / 3600:.1f} h of training"


def image_folder(name: str) -> Path:
    folder = Path(name)
    if not (folder / "train").is_dir():
        raise argparse.ArgumentTypeError(f"{folder} has no folder 'train'")
    return folder
