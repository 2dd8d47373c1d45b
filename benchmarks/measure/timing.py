"""Contestants take turns, so that a slow minute of the machine meets all of them; a ratio is of one turn."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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


def quartiles(values: Iterable[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def ratios(times: Times, name: str, of: str) -> list[float]:
    """Quartiles of a contestant's time over another's in the same turn."""
    return quartiles(mine / theirs for mine, theirs in zip(times[name], times[of], strict=True))


def copy_gb_per_s(size: int = 2**30) -> list[float]:
    """Quartiles of what a large copy within the GPU's memory reads and writes, together."""
    source, target = (torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = turns({"copy": lambda: target.copy_(source)}, 0.5, gpu_clock(10, queued=True))
    return quartiles(2 * size / (1e6 * ms) for ms in times["copy"])


def restart_with(environment: dict[str, str], module: str) -> None:
    """Start this program again with what must be in the environment before it starts, unless it is there."""
    whole = {**os.environ, **environment}
    if whole != os.environ:
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], whole)


def machine(device: str = "cpu") -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    host = f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return host if device == "cpu" else f"{_gpu()}\n{host}, Python {platform.python_version()}"


def _gpu() -> str:
    from torch.cuda import nccl

    gpu = torch.cuda.get_device_properties(0)
    of_nccl = ".".join(str(part) for part in nccl.version())
    query = "driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
    return (
        f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB, "
        f"{query}: {told.strip() or 'not known'}\n"
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"NCCL {of_nccl}, Triton {_version('triton')}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def stolen(before: tuple[int, int] | None = None) -> Any:
    """(steal, all) ticks since the machine started, or the share of steal since before."""
    if not Path("/proc/stat").exists():
        return (0, 1) if before is None else 0.0
    ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    now = ticks[7], sum(ticks)
    return now if before is None else (now[0] - before[0]) / max(1, now[1] - before[1])
