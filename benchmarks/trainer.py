"""What the trainer costs: images/s of its loop against a bare DDP loop with the same model and batch.

    torchrun --nproc-per-node 2 benchmarks/trainer.py

Three loops take turns in the same processes, a few steps at a time, so that a slow minute of the machine meets all of
them; the medians over the turns are compared.

    bare    DistributedDataParallel, nn.BatchNorm, SGD, one batch that is already in memory: no data, no metrics
    local   the trainer with norm=local: reading, augmentation, metrics and schedule included
    sync    the trainer with norm=sync
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn.trainer import loop, models, world
from syncbn.trainer.config import Config, typed
from syncbn.trainer.run import assemble, build
from syncbn.trainer.world import World


def bare_loop(config: Config, ranks: World):
    """images/s of so many steps of the loop that everyone writes first."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        models.build(config.model, 10).to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
        gradient_as_bucket_view=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batch = int(config.data.batch_per_rank)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            with loop.autocast(config.train, ranks):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * batch * ranks.size / (time.perf_counter() - began)

    return run


class NoImages:
    """An eval set without an image."""

    most = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Speed:
    """An observer that keeps the last speed."""

    images_per_s = 0.0

    def stepped(self, step: int) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def log(self, step: int, figures: dict[str, float], reading: Any = None) -> None:
        self.images_per_s = figures.get("train/images_per_s", self.images_per_s)


def trainer_loop(config: Config, ranks: World):
    """images/s of so many steps of loop.fit, as it logs them; its eval set is left empty."""
    parts = build(config, ranks)
    parts.data = parts.data._replace(eval=cast(Any, NoImages()))
    training, speed = assemble(parts, config, ranks), Speed()

    def run(steps: int) -> float:
        until = replace(config.train, steps=training.step + steps, log_every=10**9, eval_every=10**9)
        loop.fit(training, until, ranks, speed)
        return speed.images_per_s

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images per rank")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=15, help="turns of each loop")
    parser.add_argument("--json", type=Path, help="append a JSON line for each loop")
    parser.add_argument("--compile", action="store_true", help="torch.compile in the trainer's loops, and NCHW")
    parser.add_argument("--default-scheduler", action="store_true", help="leave out world.schedule_as_batch")
    options = parser.parse_args()
    if options.default_scheduler:
        world.schedule_as_batch = lambda: None

    def config(norm: str) -> Config:
        images = {"name": "fake", "fake_samples": 20 * options.batch, "batch_per_rank": options.batch, "cache": True}
        return typed(
            {
                "data": {**images, "augment": {"pad": 4, "flip": True}},
                "model": {"name": options.model},
                "norm": {"name": norm},
                "train": {
                    "precision": options.precision,
                    "channels_last": not options.compile,
                    "compile": options.compile,
                },
                "launch": {"device": "cpu"},
            }
        )

    ranks = world.join(config("sync").launch, world.meet())
    loops = {"bare": bare_loop(config("local"), ranks)}
    loops |= {norm: trainer_loop(config(norm), ranks) for norm in ("local", "sync")}
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-1, options.turns):  # the first warms up: it reads every image once
        for name, run in loops.items():
            speed = run(options.steps if turn >= 0 else 40)
            if turn >= 0:
                speeds[name].append(speed)
    if ranks.rank == 0:
        report(speeds, options, ranks)
    world.leave()


def report(speeds: dict[str, list[float]], options: argparse.Namespace, ranks: World) -> None:
    print(
        f"{options.model}, {ranks.size} ranks × {options.batch} images, {options.precision}, channels_last; "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{options.turns} turns of {options.steps} steps"
    )
    print(f"{'loop':<6} {'images/s':>9} {'quartiles':>15} {'of bare, turn by turn: median (quartiles)':>44}")
    for name, values in speeds.items():
        ratios = [mine / bare for mine, bare in zip(values, speeds["bare"], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4)
        r_low, r_middle, r_high = statistics.quantiles(ratios, n=4)
        print(f"{name:<6} {middle:9.0f} {low:7.0f} {high:7.0f} {r_middle:29.3f} ({r_low:.3f} {r_high:.3f})")
        if options.json:
            line = {"loop": name, "images_per_s": values, **{k: str(v) for k, v in vars(options).items()}}
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
