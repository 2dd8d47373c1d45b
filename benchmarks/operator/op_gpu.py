"""What the operator costs on a GPU, forward and backward.

    python -m benchmarks op_gpu [--cases few] [--seconds 1]
    python -m benchmarks op_gpu --device cpu        one small case, which tells no time of interest

    cudnn    F.batch_norm           torch   torch.nn.SyncBatchNorm, made to send though alone: forced.py
    native   syncbn, made to send, with torch's kernels (kernels/native.py)       syncbn   the same, with Triton's

in three chains, with ReLU and addition in place, of their own but for native's and syncbn's, which are the layer's.
Times are the GPU's: the host enqueues while it sleeps, but for torch, which makes the host wait in each forward. A
tensor that the GPU's cache holds stays there from step to step, as it does behind a convolution; `of copy` is
meaningful for larger ones. It is the share of a copy's bandwidth, measured in the same run, that the fewest passes over
the elements would take in syncbn's time: 8 for BN and BN+ReLU (forward reads x twice and writes y, backward reads x and
dy twice and writes dx), 10 for BN+add+ReLU (the residual read, its gradient written). Counted on that floor, though
BN+add+ReLU makes 11 as built.

Before a case is timed every contestant is compared with float64 batch norm on its very tensors, in 8 of the channels:
the greatest error of y and of every gradient, as the norm of the difference over the norm, in which a sign that
rounding turns at the relu counts in full. What is far off is WRONG, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from benchmarks.measure.timing import Step
from benchmarks.operator import forced
from syncbn import SyncBatchNorm, kernels, reference
from syncbn.kernels import native

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
FLOORS = {"BN": 8, "BN+ReLU": 8, "BN+add+ReLU": 10}
WANTED_OF_COPY, LARGE_MB = 0.85, 60
WANTED_OF_TORCH = {"BN+ReLU": 1.5, "BN+add+ReLU": 1.5}
# One sign in 10 000 that bf16 turns at the relu is an error of 0.01, and a few are among the 784 values of the smallest
MOST_ERROR = {torch.bfloat16: 0.1, torch.float32: 5e-3}

# Of ResNet-50's layers
FEW = [(8, 256, 56, 56), (32, 256, 56, 56), (256, 64, 112, 112)]
MANY = [(2, 2048, 7, 7), (2, 64, 112, 112), (32, 2048, 7, 7), (32, 64, 112, 112), (64, 256, 56, 56)]
MANY = sorted([*FEW, *MANY, (256, 1024, 14, 14)], key=lambda shape: torch.Size(shape).numel())
CASES = [(shape, torch.bfloat16, "NHWC") for shape in MANY]
for other in (torch.float32, "NHWC"), (torch.bfloat16, "NCHW"), (torch.float32, "NCHW"):
    CASES += [(shape, *other) for shape in FEW]

Case = tuple[tuple[int, ...], torch.dtype, str]
# Of the table of RESULTS.md
WANTED_CASES = [case for case in CASES if case[0] == (256, 64, 112, 112) and case[1:] != (torch.float32, "NCHW")]
WANTED_CASES += [(shape, torch.bfloat16, "NHWC") for shape in ((256, 1024, 14, 14), (32, 256, 56, 56))]
SMALL: Case = ((2, 16, 5, 4), torch.float32, "NHWC")


class Inputs(NamedTuple):
    """x, dy and residual are [N, C, H, W] of the case's dtype and layout; weight and bias [C], float32."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None

    @property
    def wanted(self) -> list[Tensor]:
        """What gradients are of."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]


def inputs(case: Case, kind: str, device: str) -> Inputs:
    shape, dtype, layout = case
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    def image(values: Tensor) -> Tensor:
        return values.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    x = image(1 + 2 * random(*shape)).requires_grad_()
    residual = image(random(*shape)).requires_grad_() if "add" in kind else None
    weight, bias = (random(shape[1]).requires_grad_() for _ in range(2))
    return Inputs(x, image(random(*shape)), weight, bias, residual)


def contestants(given: Inputs, kind: str, device: str) -> dict[str, Step]:
    """Steps, each of which returns y and the gradients of what is wanted."""
    relu, channels = "ReLU" in kind, given.x.size(1)
    weight, bias = given.weight, given.bias
    ours = SyncBatchNorm(channels, track_running_stats=False, activation="relu" if relu else None, device=device)
    torchs = forced.TorchSyncBatchNorm(channels, track_running_stats=False, device=device)
    for layer in ours, torchs:
        layer.load_state_dict({"weight": weight, "bias": bias})

    def unfused(norm: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def chain() -> Tensor:
            y = norm(given.x)
            y = y if given.residual is None else y.add_(given.residual)
            return y.relu_() if relu else y

        return chain

    def step(forward: Callable[[], Tensor], parameters: Sequence[Tensor] = (weight, bias)) -> Step:
        x, _, _, _, residual = given
        wanted = [t for t in (x, *parameters, residual) if t is not None]

        def run() -> list[Tensor]:
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, wanted, given.dy)]

        return run

    fused = step(lambda: ours(given.x, given.residual), list(ours.parameters()))
    steps = {"cudnn": step(unfused(lambda x: F.batch_norm(x, None, None, weight, bias, True)))}
    if device == "cuda":
        steps["torch"] = step(unfused(torchs), list(torchs.parameters()))
        steps["native"] = with_kernels(native, fused)
    return {**steps, "syncbn": fused}


def with_kernels(chosen: Any, step: Step) -> Step:
    """step with these kernels, whatever the device."""

    def run() -> Any:
        with patch.object(kernels, "choose", lambda x: chosen):
            return step()

    return run


def errors(steps: dict[str, Step], given: Inputs, kind: str) -> dict[str, float]:
    """The greatest relative error of each contestant, against float64."""
    size = given.x.size(1)
    some = torch.linspace(0, size - 1, min(8, size)).long().to(given.x.device)

    def slice_of(t: Tensor) -> Tensor:
        return t.detach().index_select(min(1, t.dim() - 1), some).double()

    exact = Inputs(*(None if t is None else slice_of(t) for t in given))  # pyright: ignore[reportArgumentType]
    for t in exact.wanted:
        t.requires_grad_()
    y = reference.batch_norm(exact.x, exact.weight, exact.bias)
    y = y if exact.residual is None else y + exact.residual
    y = y.relu() if "ReLU" in kind else y
    want = [y.detach(), *torch.autograd.grad(y, exact.wanted, exact.dy)]
    greatest = {}
    for name, step in steps.items():
        pairs = zip(map(slice_of, step()), want, strict=True)
        greatest[name] = max(((got - right).norm() / right.norm()).item() for got, right in pairs)
    return greatest


def rows(case: Case, chain: str, seconds: float, device: str, copy: float | None) -> Iterator[Result]:
    """A row of each contestant; copy in GB/s, or None for no share of it."""
    shape, dtype, layout = case
    given = inputs(case, chain, device)
    steps = contestants(given, chain, device)
    error = errors(steps, given, chain)
    clock = timing.gpu_clock(5, queued=True) if device == "cuda" else timing.host_ms
    times = timing.turns(steps, seconds, clock)
    size_mb = torch.Size(shape).numel() * dtype.itemsize / 1e6
    tensor = {"shape": shape, "layout": layout, "dtype": str(dtype).removeprefix("torch."), "MB": size_mb}
    for name, figures in timing.compared(times, "syncbn"):
        share = None if copy is None else FLOORS[chain] * size_mb / figures["ms"].median / copy
        more = {"of copy": share, "wanted": wanted(name, chain, size_mb), "error": error[name]}
        right = "yes" if error[name] <= MOST_ERROR[dtype] else "WRONG"
        yield Result("operator", {**tensor, "chain": chain, "contestant": name}, {**figures, **more, "right": right})


def wanted(name: str, chain: str, size_mb: float) -> str | None:
    if name == "syncbn" and size_mb > LARGE_MB:
        return f"of copy at least {WANTED_OF_COPY}"
    if name == "torch" and chain in WANTED_OF_TORCH:
        return f"of syncbn at least {WANTED_OF_TORCH[chain]}"
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", choices=("all", "few"), default="all", help="few: those of RESULTS.md's table")
    parser.add_argument("--seconds", type=float, default=1, help="time for each case and chain")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if options.device == "cpu":
        yield from checked(row for chain in FLOORS for row in rows(SMALL, chain, options.seconds, "cpu", None))
        return
    cases = CASES if options.cases == "all" else WANTED_CASES
    with forced.world_of_one("cuda"):
        copy = timing.copy_gb_per_s()
        yield Result("a copy of 1 GiB", {}, {"GB/s, read and written together": copy})
        every = ((case, chain) for case in cases for chain in FLOORS)
        yield from checked(row for pair in every for row in rows(*pair, options.seconds, "cuda", copy.median))


def checked(results: Iterator[Result]) -> Iterator[Result]:
    """The same, and at their end an error if a contestant was wrong."""
    wrong = False
    for result in results:
        wrong |= result.figures["right"] == "WRONG"
        yield result
    if wrong:
        sys.exit("some contestants are WRONG: see above")
