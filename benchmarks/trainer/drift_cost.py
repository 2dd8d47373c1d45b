"""What a DriftMonitor costs: the share of a training step that is spent in it, its reading at log steps included.

    torchrun --nproc-per-node 2 -m benchmarks drift_cost [--model resnet20 --size 32 --images 8]

A turn is the steps from one reading to the next, with SGD and DDP; the seconds within the monitor's own functions are
divided by the others of the same turn, so that a slow minute of the machine is in both. `--device cuda` compares whole
turns with and without a monitor instead, by the GPU's clock. One rank does as well, with nobody to send to.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import syncbn
from benchmarks.measure import timing
from benchmarks.measure.records import Result, Spread, spread
from benchmarks.measure.timing import Step
from syncbn.drift.observer import Observer
from syncbn.trainer import models
from syncbn.trainer.environment import schedule_as_batch
from syncbn.trainer.models import ModelConfig
from syncbn.trainer.world import BROADCAST_BUFFERS

LEVELS = ("off", "rank", "image")
# What a monitor adds to a step on a CPU, but for what C does for it: a copy of some numbers a layer and, at
# level image, a pass over x
OWN = (Observer, "slot"), (Observer, "observe"), (syncbn.DriftMonitor, "read")


def contestant(level: str, options: argparse.Namespace) -> Step:
    """A turn: so many training steps, and a reading if there is a monitor."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    images = torch.randn(options.images, 3, options.size, options.size, device=device)
    labels = torch.zeros(options.images, dtype=torch.int64, device=device)
    net = models.build(ModelConfig(name=options.model), 10).to(device)
    net = syncbn.convert(net.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]
    images = images.contiguous(memory_format=torch.channels_last)
    model = DistributedDataParallel(net, **{BROADCAST_BUFFERS: False})  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = None if level == "off" else syncbn.DriftMonitor(net, level=level)  # pyright: ignore[reportArgumentType]

    def turn() -> None:
        for _ in range(options.steps):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor:
            monitor.read()

    return turn


class Clock:
    """Seconds within some functions."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.spent_s += time.perf_counter() - start

        setattr(owner, name, timed)


def shares(turn: Step, clock: Clock, count: int) -> tuple[Spread, Spread]:
    """Over turns: the seconds in the monitor over the others, and the others themselves."""
    inside, rest = [], []
    for n in range(-2, count):
        clock.spent_s, start = 0.0, time.perf_counter()
        turn()
        others = time.perf_counter() - start - clock.spent_s
        if n >= 0:
            inside.append(clock.spent_s / others)
            rest.append(others)
    return spread(inside), spread(rest)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--images", type=int, default=8, help="a rank")
    parser.add_argument("--steps", type=int, default=10, help="of a turn, from reading to reading")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)
        schedule_as_batch()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    title = f"{options.model}, {options.images} images of {options.size}² a rank, turns of {options.steps} steps"
    for level, figures in (_on_gpu if on_gpu else _on_cpu)(options):
        yield Result(title, {"ranks": dist.get_world_size(), "level": level}, figures)
    dist.destroy_process_group()


def _on_cpu(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    clock = Clock()
    for owner, name in OWN:
        clock.watch(owner, name)
    for level in LEVELS[1:]:
        share, rest = shares(contestant(level, options), clock, options.turns)
        yield level, {"share of a step": share, "ms of a step without": 1e3 * rest.median / options.steps}


def _on_gpu(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    # The same number of turns on every rank
    steps = {level: contestant(level, options) for level in LEVELS}
    times = timing.turns(steps, 0, timing.gpu_clock(1, queued=False), options.turns)
    yield from timing.compared(times, "off", "ms of a turn")
