"""What the trainer costs: images/s of its loop against a bare DDP loop with the same model and batch.

    torchrun --nproc-per-node 2 -m benchmarks trainer
    torchrun --nproc-per-node 2 -m benchmarks trainer --default-job

The loops take turns in the same processes, a few steps at a time, so that a slow minute of the machine meets all of
them; a turn of one is compared with the same turn of the first.

    bare    DistributedDataParallel, nn.BatchNorm, SGD, one batch that is already in memory: no data, no metrics
    local   the trainer with norm=local: reading, augmentation, metrics and schedule included
    sync    the trainer with norm=sync
    fused   and norm.fuse=true
    drift   norm=sync with drift measured at level image, read and judged at its log steps

--default-job takes the data, model, batch and log steps of `python train.py`, and leaves bare out.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from syncbn.trainer import environment, models, world
from syncbn.trainer.config import Config, typed
from syncbn.trainer.rank.assemble import assemble
from syncbn.trainer.rank.build import build
from syncbn.trainer.training import drift, evaluation, loop
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
            with evaluation.autocast(config.train, ranks):
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


def trainer_loop(config: Config, ranks: World):
    """images/s of so many steps of loop.fit; its eval set is left empty."""
    parts = build(config, ranks)
    parts.data = parts.data._replace(eval=cast(Any, NoImages()))
    training = assemble(parts, config, ranks)
    training.drift = drift.monitor(parts.model, config.drift)
    log_every = config.train.log_every if training.drift else 10**9

    def run(steps: int) -> float:
        until = replace(config.train, steps=training.step + steps, log_every=log_every, eval_every=10**9)
        began = time.perf_counter()
        loop.fit(training, until, ranks, drift_every=config.drift.every)
        return steps * parts.data.global_batch / (time.perf_counter() - began)

    return run


# What each of the trainer's loops is besides the others
LOOPS: dict[str, dict[str, Any]] = {
    "local": {"norm": {"name": "local"}},
    "sync": {"norm": {"name": "sync"}},
    "fused": {"norm": {"name": "sync", "fuse": True}},
    "drift": {"norm": {"name": "sync"}, "drift": {"level": "image"}},
}


def default_job(name: str, options: argparse.Namespace) -> Config:
    return typed({"drift": {"level": "off"}, "launch": {"device": "cpu"}, **LOOPS[name], **digits()})


def digits() -> dict[str, Any]:
    """What conf/ adds to the defaults of the dataclasses."""
    return {"data": OmegaConf.to_container(OmegaConf.load("conf/data/digits.yaml"))}


def fake_images(name: str, options: argparse.Namespace) -> Config:
    images = {"name": "fake", "fake_samples": 20 * options.batch, "batch_per_rank": options.batch, "cache": True}
    return typed(
        {
            "data": {**images, "augment": {"pad": 4, "flip": True}},
            "model": {"name": options.model},
            "drift": {"level": "off"},
            "train": {
                "precision": options.precision,
                "channels_last": not options.compile,
                "compile": options.compile,
            },
            "launch": {"device": "cpu"},
            **LOOPS[name],
        }
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=64, help="images per rank")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=15, help="turns of each loop")
    parser.add_argument("--compile", action="store_true", help="torch.compile in the trainer's loops, and NCHW")
    parser.add_argument("--default-job", action="store_true", help="the data and model of `python train.py`")
    parser.add_argument("--default-scheduler", action="store_true", help="leave out environment.schedule_as_batch")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if options.default_scheduler:
        environment.schedule_as_batch = lambda: None
    config = default_job if options.default_job else fake_images
    ranks = world.join(config("sync", options).launch, world.meet())
    loops = {} if options.default_job else {"bare": bare_loop(config("local", options), ranks)}
    loops |= {name: trainer_loop(config(name, options), ranks) for name in LOOPS}
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-1, options.turns):  # the first warms up: it reads every image once
        for name, run in loops.items():
            speed = run(options.steps if turn >= 0 else 40)
            if turn >= 0:
                speeds[name].append(speed)
    job = f"{options.model}, {options.batch} images a rank, {options.precision}, channels_last"
    title = f"{'the default job' if options.default_job else job}; turns of {options.steps} steps"
    for name, figures in timing.compared(speeds, next(iter(speeds)), "images/s"):
        yield Result(title, {"ranks": ranks.size, "loop": name}, figures)
    world.leave()
