"""Whether the GPU's kernels run at all, and what share of a copy's bandwidth each pass reaches: fails within seconds.

    python -m benchmarks smoke
    python -m benchmarks smoke --device cpu        the same in small, in Triton's interpreter, without times

First what has failed before on a GPU, or would have: which kernels are chosen, a layer's forward and backward against
F.batch_norm, the eager kernels on CUDA, masked moments of one element, moments of images, float64 by torch's own
kernels. Then a row for each shape: us of each pass, by the GPU's clock with the host ahead of it, and the time of a
copy of as many bytes as the pass must at least read and write over that (1.00: as fast as a copy).

    moments reads x; normalize x, writes y; grad_sums dy and x; grad_input dy and x, writes dx

`images` is moments with what differs between images, for drift. Then tensors whose channels, or planes, 16 bytes do not
divide, so that a program reads 2 or 4 bytes at a time; and a tiny one: what each pass costs at least.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.measure import timing
from benchmarks.measure.records import Result
from syncbn import SyncBatchNorm, kernels
from syncbn.kernels import Affine, Running, eager, native, unpacked

LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
SHAPES = [
    ((256, 64, 112, 112), "NHWC", torch.bfloat16),
    ((64, 256, 56, 56), "NHWC", torch.bfloat16),
    ((64, 256, 56, 56), "NHWC", torch.float32),
    ((64, 256, 56, 56), "NCHW", torch.bfloat16),
    ((256, 1024, 14, 14), "NHWC", torch.bfloat16),
    ((256, 1024, 14, 14), "NCHW", torch.float32),
    ((32, 2048, 7, 7), "NHWC", torch.bfloat16),
    ((8, 64, 112, 112), "NHWC", torch.bfloat16),
    ((8, 512, 28, 28), "NHWC", torch.bfloat16),
]
NARROW = [((64, 250, 57, 57), "NHWC", torch.bfloat16), ((64, 256, 57, 57), "NCHW", torch.bfloat16)]
TINY = ((2, 64, 4, 4), "NHWC", torch.bfloat16)
# Passes over the elements that there must at least be
PASSES = {"moments": 1, "images": 1, "normalize": 2, "grad_sums": 2, "grad_input": 3}

Shape = tuple[tuple[int, ...], str, torch.dtype]


def image(shape: Shape, device: str) -> torch.Tensor:
    size, layout, dtype = shape
    return (1 + 2 * torch.randn(size, device=device)).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def check_layer(device: str) -> str:
    """A layer's y and dx, near those of torch's batch norm in float32."""
    off = []
    for layout in LAYOUTS:
        x = image(((8, 24, 14, 14), layout, torch.bfloat16), device).requires_grad_()
        layer = SyncBatchNorm(24, device=device)
        wanted = [x, *layer.parameters()]
        dy = torch.randn_like(x)
        y = layer(x)
        got = (y, *torch.autograd.grad(y, wanted, dy))
        exact = x.detach().float().requires_grad_()
        y = F.batch_norm(exact, None, None, layer.weight, layer.bias, True)
        want = (y, *torch.autograd.grad(y, [exact, *wanted[1:]], dy.float()))
        pairs = zip(got, want, strict=True)
        off.append(max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs))
    assert max(off) < 1e-2, f"y or a gradient is off by {max(off):.1e} of its size"
    return f"y and gradients within {max(off):.0e}"


def check_eager(device: str) -> str:
    """native_batch_norm_backward without saved statistics is an internal assert on CUDA."""
    x = image(((4, 3, 5, 5), "NCHW", torch.float32), device)
    local = eager.moments(x, None, "row", per_image=True)
    assert torch.allclose(local.packed[:3].float(), x.mean((0, 2, 3)), atol=1e-5)
    return "runs"


def check_masked_element(device: str) -> str:
    """Triton 3.6 does not compile masked moments where N and S are 1 and compiled for."""
    x, mask = torch.full((1, 64), 3.0, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    packed = _ours().moments(x, mask, "row").packed
    assert packed[:64].eq(3).all()
    assert packed[-1] == 1
    return "runs"


def check_images(device: str) -> str:
    x = image(((8, 64, 28, 28), "NHWC", torch.bfloat16), device)
    got, want = (k.moments(x, None, "row", per_image=True).between_images for k in (_ours(), eager))
    assert torch.allclose(got, want, rtol=1e-3), "what differs between images is not eager's"
    return "as eager has them"


def check_native(device: str) -> str:
    if device == "cpu":
        return "left out: torch's own kernels are for GPUs"
    x = image(((4, 6, 5, 5), "NCHW", torch.float64), device)
    y, stats = native.normalize(x, native.moments(x, None, "row").packed[None], Affine())
    sums = native.grad_sums(x, x, stats, Affine(), None)
    native.grad_input(x, x, stats, Affine(), sums.packed, None)
    assert torch.allclose(y, F.batch_norm(x, None, None, training=True))
    return "float64 runs"


CHECKS: dict[str, Callable[[str], str]] = {
    "layer": check_layer,
    "eager": check_eager,
    "masked element": check_masked_element,
    "images": check_images,
    "native": check_native,
}


def _ours() -> Any:
    """Triton's kernels, on a GPU and in the interpreter."""
    from syncbn.kernels import triton

    return triton


def passes(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """Each pass over a tensor of that shape."""
    ours, x = _ours(), image(shape, device)
    dy, channels = torch.randn_like(x), x.size(1)
    affine = Affine(torch.ones(channels, device=device), torch.zeros(channels, device=device), relu=True)
    buffers = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    running = Running(*buffers, torch.zeros((), dtype=torch.int64, device=device), 0.1)
    packed = ours.moments(x, None, "message").packed
    _, stats = ours.normalize(x, packed, affine)
    sums = ours.grad_sums(dy, x, stats, affine, None)
    assert unpacked(stats)[0].count == x.numel() // channels
    return {
        "moments": lambda: ours.moments(x, None, "message"),
        "images": lambda: ours.moments(x, None, "message", per_image=True),
        "normalize": lambda: ours.normalize(x, packed, affine, None, running),
        "grad_sums": lambda: ours.grad_sums(dy, x, stats, affine, None),
        "grad_input": lambda: ours.grad_input(sums.g, x, stats, affine, sums.packed, None),
    }


def rows(shape: Shape, copy_gb_per_s: float, clock: timing.Clock) -> Iterator[Result]:
    """us of each pass, the least of three times, and its share of a copy's bandwidth."""
    size, layout, dtype = shape
    mb = torch.Size(size).numel() * dtype.itemsize / 1e6
    tensor = {"shape": size, "layout": layout, "dtype": str(dtype)[6:], "MB": mb, "narrow": shape in NARROW}
    for name, run in passes(shape, "cuda").items():
        run()
        us = 1e3 * min(clock(run) for _ in range(3))
        share = PASSES[name] * mb / (1e-3 * us) / copy_gb_per_s
        yield Result("passes", {**tensor, "pass": name}, {"us, least of 3": us, "of copy": share})


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


def measure(options: argparse.Namespace) -> Iterator[Result]:
    on_gpu = options.device == "cuda"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("without a GPU Triton's kernels run in its interpreter: set TRITON_INTERPRET=1")
    chosen: str = vars(kernels.choose(torch.zeros(1, device=options.device)))["__name__"]
    print(f"kernels: {chosen}")
    assert not on_gpu or chosen.endswith("triton"), "Triton's kernels are not chosen: the warning above says why"
    for name, check in CHECKS.items():
        yield Result("checks", {"check": name}, {"outcome": check(options.device)})
    if on_gpu:
        copy, clock = timing.copy_gb_per_s(), timing.gpu_clock(10, queued=True)
        yield Result("a copy of 1 GiB", {}, {"GB/s, read and written together": copy})
        for shape in [*SHAPES, *NARROW, TINY]:
            yield from rows(shape, copy.median, clock)
    else:
        for run in passes(((2, 16, 6, 6), "NHWC", torch.float32), "cpu").values():
            run()
        yield Result("checks", {"check": "every pass"}, {"outcome": "runs"})
