"""What the operator costs on a GPU, forward and backward: `python -m benchmarks.op --device cuda` prints it.

    python -m benchmarks.op_gpu [--cases few] [--seconds 1] [--json FILE]        without the operator's tests first

    cudnn    F.batch_norm           torch   torch.nn.SyncBatchNorm, made to send though alone: benchmarks/forced.py
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
rounding turns at the relu counts in full. What is far off is WRONG, and op.py ends with an error.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import forced, timing
from benchmarks.timing import Step, Times
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
# Those that the table of RESULTS.md asks for
WANTED_CASES = [case for case in CASES if case[0] == (256, 64, 112, 112) and case[1:] != (torch.float32, "NCHW")]
WANTED_CASES += [(shape, torch.bfloat16, "NHWC") for shape in ((256, 1024, 14, 14), (32, 256, 56, 56))]
IN_SMALL: list[Case] = [((2, 16, 5, 4), torch.float32, "NHWC")]


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
    found = {}
    for name, step in steps.items():
        pairs = zip(map(slice_of, step()), want, strict=True)
        found[name] = max(((got - right).norm() / right.norm()).item() for got, right in pairs)
    return found


def report(seconds: float, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """measure, beside the bandwidth of a copy."""
    with forced.world_of_one("cuda"):
        low, middle, high = timing.copy_gb_per_s()
        print(f"a copy of 1 GiB reads and writes {middle:.0f} GB/s together (quartiles {low:.0f} {high:.0f})\n")
        return measure(cases, seconds, copy=middle)


def measure(
    cases: Sequence[Case] = CASES, seconds: float = 1.0, device: str = "cuda", copy: float | None = None
) -> list[dict[str, Any]]:
    """A row for each case and chain, printed as it comes; copy in GB/s, or None for no share of it."""
    clock = timing.gpu_clock(5, queued=True) if device == "cuda" else timing.host_ms
    print(HEAD)
    rows = []
    for case in cases:
        for kind in FLOORS:
            given = inputs(case, kind, device)
            steps = contestants(given, kind, device)
            error = errors(steps, given, kind)
            wrong = [name for name in steps if not error[name] <= MOST_ERROR[case[1]]]
            times = timing.turns(steps, seconds, clock)
            mark = f"  WRONG: {', '.join(wrong)}" if wrong else ""
            print(line(case, kind, times, error, copy) + mark, flush=True)
            shape, dtype, layout = case
            row = {"table": "gpu", "shape": shape, "dtype": str(dtype), "layout": layout, "chain": kind}
            rows.append({**row, "ms": times, "errors": error, "wrong": wrong, "copy_gb_per_s": copy})
    return rows


NAMES = ("cudnn", "torch", "native", "syncbn")
HEAD = (
    f"{'shape':<22}{'':>14}{'MB':>7} {'chain':<12}"
    + "".join(f"{name:>9}" for name in NAMES)
    + f" ms{'quartiles':>18}{'of copy':>9}{'wanted':>7}{'torch/syncbn':>14}{'quartiles':>15}{'wanted':>7}"
    + f"{'error':>9}{'others':>9}"
)


def line(case: Case, kind: str, times: Times, error: dict[str, float], copy: float | None) -> str:
    shape, dtype, layout = case
    size_mb = torch.Size(shape).numel() * dtype.itemsize / 1e6
    middles = {name: timing.quartiles(ms)[1] for name, ms in times.items()}
    low, ours, high = timing.quartiles(times["syncbn"])
    text = f"{shape!s:<22}{layout:>5} {str(dtype).removeprefix('torch.'):>8}{size_mb:7.1f} {kind:<12}"
    text += "".join(f"{middles[name]:9.3f}" if name in middles else f"{'-':>9}" for name in NAMES)
    text += f"    ({low:7.3f} {high:7.3f})"
    share = "-" if copy is None else f"{FLOORS[kind] * size_mb / ours / copy:.2f}"
    text += f"{share:>9}{WANTED_OF_COPY if size_mb > LARGE_MB else '-':>7}"
    if "torch" in times:
        low, middle, high = timing.ratios(times, "torch", "syncbn")
        text += f"{middle:14.2f} ({low:5.2f} {high:6.2f})"
    else:
        text += f"{'-':>14}{'':15}"
    others = max(value for name, value in error.items() if name != "syncbn")
    return text + f"{WANTED_OF_TORCH.get(kind, '-'):>7}{error['syncbn']:9.1e}{others:9.1e}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: one small case")
    parser.add_argument("--cases", choices=("all", "few"), default="all", help="few: those of RESULTS.md's table")
    parser.add_argument("--seconds", type=float, default=1, help="time for each row")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU")
    machine = timing.machine(options.device)
    print(machine)
    if options.device == "cpu":
        rows = measure(IN_SMALL, options.seconds, "cpu")
    else:
        rows = report(options.seconds, CASES if options.cases == "all" else WANTED_CASES)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}) + "\n")
    if any(row["wrong"] for row in rows):
        sys.exit("some contestants are WRONG: see above")


if __name__ == "__main__":
    main()
