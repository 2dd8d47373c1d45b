"""Contestants take turns, so that a slow minute of the machine meets all of them; a ratio is of one turn."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measure.records import Spread, spread

Step = Callable[[], Any]
Clock = Callable[[Step], float]
Times = dict[str, list[float]]

# The GPU sleeps for so long for each step that the host is to enqueue meanwhile: 1 ms at 2 GHz
SLEEP_CYCLES = 2_000_000


def host_ms(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def enqueue_ms(step: Step) -> float:
    """ms that the host is busy with a step of which the GPU may be far behind: nothing waits for it but step itself."""
    ms = host_ms(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return ms


def gpu_clock(repeats: int, *, queued: bool) -> Clock:
    """ms of one of so many steps in a row, by the GPU's clock.

    queued: the GPU sleeps until the host has enqueued them all, so that its own pace shows, not the host's; a step that
    waits for the GPU is past that and shows what it costs. Otherwise the slower of the two shows, as in training.
    """

    def clock(step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(repeats * SLEEP_CYCLES)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    return clock


def turns(steps: dict[str, Step], seconds: float, clock: Clock = host_ms, least: int = 11) -> Times:
    """ms of each contestant, turn by turn, for about so long."""
    times: Times = {name: [] for name in steps}
    for step in [*steps.values()] * 3:
        step()
    began = time.perf_counter()
    for step in steps.values():
        clock(step)
    count = max(least, int(seconds / (time.perf_counter() - began)))
    for _ in range(count):
        for name, step in steps.items():
            times[name].append(clock(step))
    return times


def ratio(times: Times, name: str, of: str) -> Spread:
    """Of a contestant's time over another's in the same turn."""
    return spread(mine / theirs for mine, theirs in zip(times[name], times[of], strict=True))


def compared(times: Times, of: str, unit: str = "ms") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each contestant, with its time and the ratio to that of one."""
    for name, values in times.items():
        yield name, {unit: spread(values), f"of {of}": ratio(times, name, of) if of in times else None}


def copy_gb_per_s(size: int = 2**30) -> Spread:
    """What a large copy within the GPU's memory reads and writes, together."""
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = turns({"copy": lambda: target.copy_(source)}, 0.5, gpu_clock(10, queued=True))
    return spread(2 * size / (1e6 * ms) for ms in times["copy"])
