"""What the operator costs on a CPU: against F.batch_norm, a detectron2-style formula ("naive"), and over gloo.

    python -m benchmarks.op [--json FILE]
    python -m benchmarks.op --device cuda [--json FILE]        on a GPU: benchmarks/op_gpu.py tells what is printed

The operator's tests run first, and a red one stops it. Every row's contestants take turns, so that a slow minute of the
machine meets all of them; ratios are of one turn, and their median and quartiles are given. Forward and backward, fp32.

    alone   one process, one thread, no collective; --compile adds both under torch.compile; copy is the time in which
            memory moves as much as batch norm must, 8 times x: a copy of x moves 2
    fused   relu(norm(x) + residual) in one layer, alone, against F.batch_norm, add and relu
    ranks   2 gloo ranks, one thread each, on their own batch of that shape: F.batch_norm of each rank's own statistics
            against the operator over both ranks; gather is reduction="gather", watched is with a DesyncMonitor
    memory  what autograd keeps from forward to backward, and the most that is allocated on the way
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import op_gpu, timing
from benchmarks.timing import Step, Times
from syncbn import DesyncMonitor, SyncBatchNorm
from tests.ranks import run_ranks

SHAPES = [(8, 64, 56, 56), (2, 256, 32, 32), (32, 64, 16, 16), (2, 2048, 7, 7)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WANTED = {"NCHW": [0.6, 0.6, 0.6, 0.9], "NHWC": [1.0, 1.0, 1.0, 1.0]}
SMALL, WANTED_OF_SMALL = (4, 16, 8, 8), 1.3
WANTED_OF_FUSED = 0.6
# Without these the time of page faults is what gets measured
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
QUIET = {"KINETO_LOG_LEVEL": "99"}


def naive(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """detectron2's NaiveSyncBatchNorm: var = E[x²] - mean², left to autograd."""
    mean, mean_square = x.mean([0, 2, 3]), (x * x).mean([0, 2, 3])
    scale = weight * (mean_square - mean * mean + eps).rsqrt()
    return x * scale.view(1, -1, 1, 1) + (bias - mean * scale).view(1, -1, 1, 1)


def step_of(norm: Callable[[Tensor], Tensor], parameters: list[Tensor], shape: tuple[int, ...], layout: str) -> Step:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(memory_format=LAYOUTS[layout]) for _ in range(2))  # pyright: ignore[reportCallIssue]
    x.requires_grad_()
    return lambda: torch.autograd.grad(norm(x), [x, *parameters], dy)


def batch_norm_step(shape: tuple[int, ...], layout: str) -> Step:
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    return step_of(lambda x: F.batch_norm(x, None, None, weight, bias, True), [weight, bias], shape, layout)


def naive_step(shape: tuple[int, ...], layout: str) -> Step:
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    return step_of(lambda x: naive(x, weight, bias), [weight, bias], shape, layout)


def layer_step(shape: tuple[int, ...], layout: str, layer: nn.Module | None = None) -> Step:
    layer = layer or SyncBatchNorm(shape[1], track_running_stats=False)
    return step_of(layer, list(layer.parameters()), shape, layout)


def fused_steps(shape: tuple[int, ...], layout: str) -> dict[str, Step]:
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    residual = torch.randn(shape).to(memory_format=LAYOUTS[layout]).requires_grad_()  # pyright: ignore[reportCallIssue]
    layer = SyncBatchNorm(shape[1], track_running_stats=False, activation="relu")

    def torchs(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, True) + residual)

    return {
        "F.batch_norm": step_of(torchs, [weight, bias, residual], shape, layout),
        "syncbn": step_of(lambda x: layer(x, residual=residual), [*layer.parameters(), residual], shape, layout),
    }


def copy_step(shape: tuple[int, ...]) -> Step:
    """Four copies of x: as many bytes as are read and written by a batch norm that keeps nothing in a cache."""
    source, target = torch.ones(shape), torch.ones(shape)
    return lambda: [target.copy_(source) for _ in range(4)]


def alone(shape: tuple[int, ...], layout: str, seconds: float) -> Times:
    torch.set_num_threads(1)
    contestants = {"F.batch_norm": batch_norm_step, "syncbn": layer_step, "naive": naive_step}
    steps = {name: make(shape, layout) for name, make in contestants.items()}
    return timing.turns(steps | {"copy": copy_step(shape)}, seconds)


def compiled(shape: tuple[int, ...], layout: str, seconds: float) -> Times:
    torch.set_num_threads(1)
    torch.compiler.reset()
    ours, torchs = (one(shape[1], track_running_stats=False) for one in (SyncBatchNorm, nn.BatchNorm2d))
    for layer in ours, torchs:
        layer.compile(fullgraph=True)
    steps = {
        "F.batch_norm": batch_norm_step(shape, layout),
        "syncbn": layer_step(shape, layout, ours),
        "nn.BatchNorm2d": layer_step(shape, layout, torchs),
    }
    return timing.turns(steps, seconds)


def on_rank(rank: int, shape: tuple[int, ...], layout: str, count: int) -> Times:
    """As turns, a fixed number of them, as every rank must make as many."""
    torch.set_num_threads(1)
    watched = SyncBatchNorm(shape[1], track_running_stats=False)
    steps = {
        "F.batch_norm": batch_norm_step(shape, layout),
        "syncbn": layer_step(shape, layout),
        "gather": layer_step(shape, layout, SyncBatchNorm(shape[1], track_running_stats=False, reduction="gather")),
        "watched": layer_step(shape, layout, watched),
    }
    with DesyncMonitor(nn.Sequential(watched)):
        times: Times = {name: [] for name in steps}
        for turn in range(count + 3):
            for name, step in steps.items():
                torch.distributed.barrier()
                start = time.perf_counter()
                step()
                if turn >= 3:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def memory(make: Callable[[tuple[int, ...], str], Step], shape: tuple[int, ...], layout: str) -> tuple[float, float]:
    """What is saved for backward and the peak of what is allocated, in units of x."""
    step, size, saved = make(shape, layout), 4 * torch.Size(shape).numel(), {}
    step()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # pyright: ignore
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held)
    return sum(t.nbytes for t in saved.values()) / size, peak / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="append a JSON line for each row")
    parser.add_argument("--seconds", type=float, help="time for each row; without it 8, on a GPU 1")
    parser.add_argument("--compile", action="store_true", help="the table of compiled layers too; needs a C++ compiler")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the operator's tests first")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("there is no GPU")
    timing.restart_with({**MALLOC, **QUIET}, "benchmarks.op")
    if not options.skip_tests and subprocess.run([sys.executable, "-m", "pytest", "tests/op"]).returncode:
        sys.exit("the operator's tests are red: nothing is measured")
    before, machine = timing.stolen(), timing.machine(options.device)
    of = "" if on_gpu else "fp32, "
    print(f"{machine}; {of}forward + backward; tests {'skipped' if options.skip_tests else 'green'}")
    rows = op_gpu.report(options.seconds or 1) if on_gpu else measure(options.seconds or 8, options.compile)
    print(f"steal meanwhile: {timing.stolen(before):.0%}")
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps({**row, "machine": machine}) + "\n" for row in rows)
    if any(row.get("wrong") for row in rows):
        sys.exit("some contestants are WRONG: see above")


def measure(seconds: float, with_compiled: bool) -> list[dict[str, Any]]:
    cases = [(shape, layout) for layout in LAYOUTS for shape in SHAPES]
    small = (SMALL, "NCHW")
    rows = []
    print(f"\n{'alone, 1 thread':<40} {HEAD} {'wanted':>9} {'copy':>9} {'naive':>9}")
    for shape, layout in [*cases, small]:
        wanted = WANTED[layout][SHAPES.index(shape)] if shape in SHAPES else WANTED_OF_SMALL
        times = alone(shape, layout, seconds)
        print(f"{line(shape, layout, times)} {wanted:9.1f} {ratio(times, 'copy'):9.2f} {ratio(times, 'naive'):9.2f}")
        rows.append({"table": "alone", "shape": shape, "layout": layout, "ms": times})
    print(f"\n{'fused with add and relu, 1 thread':<40} {HEAD} {'wanted':>9}")
    for shape, layout in cases:
        torch.set_num_threads(1)
        times = timing.turns(fused_steps(shape, layout), seconds)
        print(f"{line(shape, layout, times)} {WANTED_OF_FUSED:9.1f}")
        rows.append({"table": "fused", "shape": shape, "layout": layout, "ms": times})
    if with_compiled:
        print(f"\n{'both compiled, 1 thread':<40} {HEAD} {'nn.BatchNorm2d':>15}")
        for shape, layout in cases:
            times = compiled(shape, layout, seconds)
            print(f"{line(shape, layout, times)} {ratio(times, 'nn.BatchNorm2d'):15.2f}")
            rows.append({"table": "compiled", "shape": shape, "layout": layout, "ms": times})
    print(f"\n{'2 gloo ranks':<40} {HEAD} {'gather':>9} {'watched':>9}")
    for shape, layout in [*cases, small]:
        times = run_ranks(on_rank, 2, shape, layout, max(15, int(seconds / 0.08)), timeout_s=600)[0]
        print(f"{line(shape, layout, times)} {ratio(times, 'gather'):9.2f} {ratio(times, 'watched'):9.2f}")
        rows.append({"table": "ranks", "shape": shape, "layout": layout, "ms": times})
    print(f"\n{'memory, in units of x: saved, peak':<40} {'F.batch_norm':>14} {'syncbn':>14} {'naive':>14}")
    for shape, layout in [(SHAPES[0], layout) for layout in LAYOUTS]:
        figures = [memory(make, shape, layout) for make in (batch_norm_step, layer_step, naive_step)]
        print(f"{shape!s:<34} {layout:<5} " + " ".join(f"{saved:7.2f} {peak:6.2f}" for saved, peak in figures))
        rows.append({"table": "memory", "shape": shape, "layout": layout, "saved_and_peak": figures})
    return rows


HEAD = f"{'F.batch_norm':>14} {'syncbn':>12} {'ratio':>7} {'quartiles':>12}"


def line(shape: tuple[int, ...], layout: str, times: Times) -> str:
    theirs, ours = (statistics.median(times[name]) for name in ("F.batch_norm", "syncbn"))
    low, middle, high = timing.ratios(times, "syncbn", "F.batch_norm")
    return f"{shape!s:<34} {layout:<5} {theirs:11.3f} ms {ours:9.3f} ms {middle:7.2f}  ({low:4.2f} {high:4.2f})"


def ratio(times: Times, name: str) -> float:
    """The median of the contestant's time over F.batch_norm's in the same turn."""
    return timing.ratios(times, name, "F.batch_norm")[1]


if __name__ == "__main__":
    main()
