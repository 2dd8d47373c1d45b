"""What the operator costs on a CPU: against F.batch_norm, a detectron2-style formula ("naive"), and over gloo.

    python -m benchmarks op [--compile]

The operator's tests run first, and a red one stops it. A case's contestants take turns, so that a slow minute of the
machine meets all of them; ratios are of one turn. Forward and backward, fp32. `wanted` is of the ratio to F.batch_norm.

    alone   one process, one thread, no collective; --compile adds both under torch.compile; copy is the time in which
            memory moves as much as batch norm must, 8 times x: a copy of x moves 2
    fused   relu(norm(x) + residual) in one layer, alone, against F.batch_norm, add and relu
    ranks   2 gloo ranks, one thread each, on their own batch of that shape: F.batch_norm of each rank's own statistics
            against the operator over both ranks; gather is reduction="gather", watched is with a DesyncMonitor
    memory  what autograd keeps from forward to backward, and the most that is allocated on the way
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import ranks, timing
from benchmarks.measure.records import Result
from benchmarks.measure.timing import Step, Times
from syncbn import DesyncMonitor, SyncBatchNorm

SHAPES: list[tuple[int, ...]] = [(8, 64, 56, 56), (2, 256, 32, 32), (32, 64, 16, 16), (2, 2048, 7, 7)]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WANTED = {"NCHW": [0.6, 0.6, 0.6, 0.9], "NHWC": [1.0, 1.0, 1.0, 1.0]}
SMALL, WANTED_OF_SMALL = (4, 16, 8, 8), 1.3
WANTED_OF_FUSED = 0.6


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


def fused(shape: tuple[int, ...], layout: str, seconds: float) -> Times:
    torch.set_num_threads(1)
    weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    residual = torch.randn(shape).to(memory_format=LAYOUTS[layout]).requires_grad_()  # pyright: ignore[reportCallIssue]
    layer = SyncBatchNorm(shape[1], track_running_stats=False, activation="relu")

    def torchs(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, True) + residual)

    steps = {
        "F.batch_norm": step_of(torchs, [weight, bias, residual], shape, layout),
        "syncbn": step_of(lambda x: layer(x, residual=residual), [*layer.parameters(), residual], shape, layout),
    }
    return timing.turns(steps, seconds)


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


def on_ranks(shape: tuple[int, ...], layout: str, seconds: float) -> Times:
    with ranks.started(2) as run:
        return run(on_rank, shape, layout, max(15, int(seconds / 0.08)))[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=8, help="time for each case")
    parser.add_argument("--compile", action="store_true", help="the table of compiled layers too; needs a C++ compiler")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the operator's tests first")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if not options.skip_tests and subprocess.run([sys.executable, "-m", "pytest", "tests/op"]).returncode:
        sys.exit("the operator's tests are red: nothing is measured")
    cases = [(shape, layout) for layout in LAYOUTS for shape in SHAPES]
    with_small = [*cases, (SMALL, "NCHW")]
    yield from table("alone, 1 thread", alone, with_small, options.seconds, wanted_alone)
    yield from table("fused with add and relu, 1 thread", fused, cases, options.seconds, lambda *_: WANTED_OF_FUSED)
    if options.compile:
        yield from table("compiled, 1 thread", compiled, cases, options.seconds)
    yield from table("2 gloo ranks", on_ranks, with_small, options.seconds)
    makes = {"F.batch_norm": batch_norm_step, "syncbn": layer_step, "naive": naive_step}
    for layout in LAYOUTS:
        for name, make in makes.items():
            saved, peak = memory(make, SHAPES[0], layout)
            case = {"shape": SHAPES[0], "layout": layout, "contestant": name}
            yield Result("memory, in units of x", case, {"saved for backward": saved, "peak": peak})


def table(
    title: str,
    contest: Callable[[tuple[int, ...], str, float], Times],
    cases: list[tuple[tuple[int, ...], str]],
    seconds: float,
    wanted: Callable[[tuple[int, ...], str], float | None] = lambda *_: None,
) -> Iterator[Result]:
    for shape, layout in cases:
        for name, figures in timing.compared(contest(shape, layout, seconds), "F.batch_norm"):
            bound = wanted(shape, layout) if name == "syncbn" else None
            yield Result(title, {"shape": shape, "layout": layout, "contestant": name}, {**figures, "wanted": bound})


def wanted_alone(shape: tuple[int, ...], layout: str) -> float:
    return WANTED[layout][SHAPES.index(shape)] if shape in SHAPES else WANTED_OF_SMALL
