"""The kernels in Triton, for CUDA devices: a step is four launches, each of which reads and writes its tensors once.

A tensor lies in memory as [N, C, S], or, where channels are last, as [N * S, C, 1]. Where the relu let a value through
is computed from x again, unless a residual was added.

What the host does in a step is kept small, as a step of a few images is bound by it: how a tensor is cut up is planned
once for each shape, and a compiled kernel is launched as it is, past Triton's look at each argument (15 us a launch).
"""

from typing import Any

import torch
import triton
from torch import Tensor

from syncbn.kernels.contract import Affine, Form, Local, Running, Sums
from syncbn.kernels.triton import backward, forward, launch, statistics
from syncbn.kernels.triton.plan import ROWS, TILE, planned

NEEDS_Y = False
WHOLE = None

# Columns that a program takes of the rows that ranks gathered
COLUMNS = 8


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    channels = x.size(1)
    if x.numel() == 0:
        nothing = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        return Local(nothing, None, nothing[: channels + 1] if per_image else None)
    x, plan = planned(x, x.size(0) if per_image else 0)
    cut, places = plan.moments, None if mask is None else _of_places(mask, x)
    packed = torch.empty(2 * channels + 1, dtype=torch.float64, device=plan.device)
    apart = torch.empty(channels + 1, dtype=torch.float64, device=plan.device) if per_image else None
    rows, counters = launch.scratch(plan, cut, 2 * channels + 1)
    key = ("moments", form, mask is None, per_image, x.data_ptr() % 16)
    inputs = (x, places, rows, counters, packed, apart, *plan.layout, cut.parts, cut.size, form == "message")
    launch.start(plan.runners, plan.device, forward.moments, cut.programs, key, *inputs, *plan.tile, plan.rows)
    return Local(packed, plan, apart)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: Any = None,
) -> tuple[Tensor, Tensor]:
    x, plan = planned(x)
    y = torch.empty_like(x)
    stats = torch.empty(3 * x.size(1) + 1, dtype=torch.float64, device=plan.device)
    if residual is not None:
        residual = _laid_out_as(x, residual)
    weight, bias, relu, eps = affine
    mean, var, batches, momentum = running or (None, None, None, 0.0)
    summed = shared.dim() == 1
    if not summed and shared.size(0) > 1:
        shared = _merged(shared)
    key = (
        "normalize",
        x.data_ptr() % 16,
        residual is None or residual.data_ptr() % 16,
        _dtype(weight),
        _dtype(bias),
        _dtype(mean),
        momentum is None,
        relu,
        summed,
    )
    vectors = (shared, stats, _without_gaps(weight), _without_gaps(bias), mean, var, batches)
    options = (eps, momentum or 0.0, summed, momentum is None, relu)
    inputs = (x, residual, y, *vectors, plan.normalize, *plan.layout, *options)
    launch.start(plan.runners, plan.device, forward.normalize, plan.normalize + 1, key, *inputs, *plan.tile)
    if running is not None:
        torch.autograd.graph.increment_version(running[:3])
    return y, stats


def update_running(running: Running, stats: Tensor) -> None:
    mean, var, batches, momentum = running
    key = ("update_running", stats.size(0), stats.device, mean.dtype, momentum is None)
    inputs = (mean, var, batches, stats, mean.size(0), momentum or 0.0, momentum is None)
    launch.start(launch.runners_of_statistics, stats.device, statistics.update_running, 1, key, *inputs)
    torch.autograd.graph.increment_version(running[:3])


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    channels, (weight, bias, relu, _) = x.size(1), affine
    if x.numel() == 0:
        dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
        return Sums(x.new_zeros(2 * channels, dtype=torch.float64), dweight, dbias, dy)
    x, plan = planned(x)
    cut, dy = plan.sums, _laid_out_as(x, dy)
    g = None if y is None else torch.empty_like(dy)
    packed = torch.empty(2 * channels, dtype=torch.float64, device=plan.device)
    dweight = None if weight is None else torch.empty(channels, dtype=weight.dtype, device=plan.device)
    dbias = None if bias is None else torch.empty(channels, dtype=bias.dtype, device=plan.device)
    rows, counters = launch.scratch(plan, cut, 2 * channels)
    key = (
        "grad_sums",
        x.data_ptr() % 16,
        dy.data_ptr() % 16,
        y is None or y.data_ptr() % 16,
        _dtype(weight),
        _dtype(bias),
        relu,
    )
    vectors = (rows, counters, packed, dweight, dbias, stats, _without_gaps(weight), _without_gaps(bias))
    inputs = (dy, x, y, g, *vectors, *plan.layout, cut.parts, cut.size, relu)
    launch.start(plan.runners, plan.device, backward.grad_sums, cut.programs, key, *inputs, *plan.tile, plan.rows)
    return Sums(packed, dweight, dbias, dy if g is None else g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x, plan = planned(x)
    g, dx, places = _laid_out_as(x, g), torch.empty_like(x), None if mask is None else _of_places(mask, x)
    weight, bias, relu, _ = affine
    key = ("grad_input", x.data_ptr() % 16, g.data_ptr() % 16, mask is None, _dtype(weight), _dtype(bias), relu)
    vectors = (stats, _without_gaps(weight), _without_gaps(bias), sums)
    inputs = (g, x, places, dx, *vectors, *plan.layout, relu)
    launch.start(plan.runners, plan.device, backward.grad_input, plan.grad_input, key, *inputs, *plan.tile)
    return dx


def probe(device: torch.device) -> None:
    """Compile and run every kernel, and again as compiled: for one element, and for parts that are merged.

    Raises what fails.
    """
    for shape in [(1, 3), (1, 1, 4 * TILE)] * 2:
        x = torch.zeros(shape, device=device)
        mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool, device=device)
        batches = torch.zeros((), dtype=torch.int64, device=device)
        running = Running(x.new_zeros(shape[1]), x.new_zeros(shape[1]), batches, 0.1)
        local = moments(x, mask, "message", per_image=True)
        y, stats = normalize(x, local.packed.expand(2, -1).contiguous(), Affine(relu=True), x, running)
        update_running(running, stats)
        sums = grad_sums(y, x, stats, Affine(relu=True), y)
        grad_input(sums.g, x, stats, Affine(), sums.packed, mask)


def _merged(rows: Tensor) -> Tensor:
    """The row [2C + 1] that gathered rows [W, 2C + 1] are together."""
    rows, channels = rows.contiguous(), rows.size(1) // 2
    merged = rows.new_empty(rows.size(1))
    key = ("merge", channels, rows.device)
    inputs = (rows, merged, channels, rows.size(0), ROWS, COLUMNS)
    launch.start(
        launch.runners_of_statistics, rows.device, statistics.merge, triton.cdiv(channels, COLUMNS), key, *inputs
    )
    return merged


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _without_gaps(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """other in x's memory format, of which x has no gaps."""
    if other.stride() == x.stride():
        return other
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    if all(mine == theirs or size == 1 for size, mine, theirs in strides):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _of_places(mask: Tensor, x: Tensor) -> Tensor:
    """One byte for each place of x, [N, 1, *S]."""
    return mask.expand(x.size(0), 1, *x.shape[2:]).contiguous().view(torch.uint8)
