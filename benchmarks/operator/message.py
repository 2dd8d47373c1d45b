"""What a message of synchronised batch norm costs on a CPU: through shared memory, by gloo, and Python's part of it.

    memory  Mailbox.add, as reduction="auto" sends it among the ranks of one host
    gloo    the backend's all_reduce, as reduction="all_reduce" sends it

Each turn sends MESSAGES of one kind in a row, then as many of the other; a figure is the quartiles over turns of a
message's time on rank 0. Ranks have nothing to do in between, as they have in training: what a message costs there is
step.py's matter.

    python -m benchmarks message [RANKS ...] [--values N] [--turns N]
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import ranks, timing
from benchmarks.measure.records import Result
from syncbn import collectives
from syncbn.collectives import Reduction, messages

MESSAGES = 200


def message_us(send: Callable[[Tensor], object], message: Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(MESSAGES):
        send(message)
    return 1e6 * (time.perf_counter() - start) / MESSAGES


def measured(rank: int, values: int, turns: int) -> dict[str, list[float]]:
    """µs of a message by each way, turn by turn."""
    group = collectives.resolve_once("world", 0)
    assert group is not None
    ways: dict[str, Reduction] = {"memory": "auto", "gloo": "all_reduce"}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, reduction in ways.items():
            message = torch.zeros(values, dtype=torch.float64)
            times[name].append(message_us(lambda m, by=reduction: messages.sum_message(m, group, by), message))
    return times


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--values", type=int, default=513, help="float64 of a message: 2C + 1")
    parser.add_argument("--turns", type=int, default=21)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    for size in options.ranks:
        with ranks.started(size) as run:
            times = run(measured, options.values, options.turns)[0]
        for way, figures in timing.compared(times, "gloo", "us"):
            yield Result(f"a message of {options.values} float64", {"ranks": size, "way": way}, figures)
