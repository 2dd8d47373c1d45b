"""The kernels in C, for CPUs: each pass reads and writes its tensors once, and does the statistics of channels too.

Threads are torch's own, torch.get_num_threads() of them; how many makes no difference to a bit. Where the relu let a
value through is computed from x again, unless a residual was added.
"""

from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums
from syncbn.kernels.cpu import whole
from syncbn.kernels.cpu.library import calls
from syncbn.kernels.cpu.records import (
    address,
    laid_out,
    like,
    movable,
    of_affine,
    of_places,
    of_running,
    threads,
    without_gaps,
)

__all__ = [
    "NEEDS_Y",
    "WHOLE",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "update_running",
]

NEEDS_Y = False
WHOLE = whole


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    x, layout = laid_out(x)
    packed = torch.empty(2 * layout.channels + 1, dtype=torch.float64)
    between = torch.empty(layout.channels + 1, dtype=torch.float64) if per_image else None
    mask = None if mask is None else of_places(mask, x)
    calls.moments(
        *layout.record, threads(layout), x.data_ptr(), address(mask), packed.data_ptr(), address(between),
        form == "message",
    )  # fmt: skip
    return Local(packed, None, between)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: Any = None,
) -> tuple[Tensor, Tensor]:
    x, layout = laid_out(x)
    y, stats = torch.empty_like(x), torch.empty(3 * layout.channels + 1, dtype=torch.float64)
    residual, affine = None if residual is None else like(x, residual), without_gaps(affine)
    # A gathered row may have had a stamp behind it
    shared, rows = (shared, 0) if shared.dim() == 1 else (shared.contiguous(), shared.size(0))
    here = None if running is None or not movable(running) else running
    calls.normalize(
        *layout.record, threads(layout), x.data_ptr(), address(residual), y.data_ptr(), shared.data_ptr(), rows,
        stats.data_ptr(), *of_affine(affine), *of_running(here),
    )  # fmt: skip
    if here is not None:
        torch.autograd.graph.increment_version(here[:3])
    elif running is not None:
        eager.update_running(running, stats)
    return y, stats


def update_running(running: Running, stats: Tensor) -> None:
    if not movable(running):
        return eager.update_running(running, stats)
    calls.update_running(stats.size(0) // 3, stats.data_ptr(), *of_running(running))
    torch.autograd.graph.increment_version(running[:3])
    return None


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    x, layout = laid_out(x)
    dy, affine, channels = like(x, dy), without_gaps(affine), layout.channels
    weight, bias, *_ = affine
    y, g = (None, dy) if y is None else (like(x, y), torch.empty_like(x))
    packed = torch.empty(2 * channels, dtype=torch.float64)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    calls.grad_sums(
        *layout.record, threads(layout), dy.data_ptr(), x.data_ptr(), address(y), g.data_ptr(), stats.data_ptr(),
        packed.data_ptr(), address(dweight), address(dbias), *of_affine(affine),
    )  # fmt: skip
    return Sums(packed, dweight, dbias, g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    x, layout = laid_out(x)
    g, dx, affine = like(x, g), torch.empty_like(x), without_gaps(affine)
    mask = None if mask is None else of_places(mask, x)
    calls.grad_input(
        *layout.record, threads(layout), g.data_ptr(), x.data_ptr(), address(mask), dx.data_ptr(), stats.data_ptr(),
        sums.data_ptr(), *of_affine(affine),
    )  # fmt: skip
    return dx
