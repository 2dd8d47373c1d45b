"""The kernels in Triton, for CUDA devices: each pass reads and writes its tensors once, in the same order every run.

A tensor lies in memory as [N, C, S], or, where channels are last, as [N * S, C, 1]. The passes that add up are cut into
parts, whose sums are rows that a second launch adds up in their order; of a small tensor there is one part and no
second launch. Where the relu let a value through is computed from x again, unless a residual was added.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncbn.kernels import passes, steps
from syncbn.kernels.contract import Affine, Form, Local, Sums
from syncbn.moments import Moments

NEEDS_Y = False

# Elements of a tile: 16 for each thread of 8 warps
_TILE, _WARPS = 4096, 8
# Tiles of a tensor that is one part: there a launch costs more than the programs that it would add
_SMALL = 8
# Programs for each multiprocessor in the passes that add up
_WAVES = 4
# Columns that a program takes of the small matrices that are added up
_COLUMNS = 8
# Elements up to which offsets are int32
_INT32 = 2**30


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    images = x.size(0) if per_image else 1
    message = form == "message"
    if x.numel() == 0:
        nothing = x.new_zeros(2 * x.size(1) + 1, dtype=torch.float64)
        return Local(nothing, None, nothing[: x.size(1) + 1] if per_image else None)
    x, plan = _planned(x, images)
    count = images * plan.parts
    rows = torch.empty((count, 2 * x.size(1) + 1), dtype=torch.float64, device=x.device)
    final = count == 1 and not per_image
    inputs = (x, _of_places(mask, x), rows, *plan.layout, plan.parts, message and final)
    _launch(passes.moments, x, count * plan.blocks, *inputs, *plan.tile)
    packed = rows[0] if final else _merged(rows, message)
    return Local(packed, None, _between_images(rows, images, plan.parts) if per_image else None)


def statistics(shared: Tensor, eps: float) -> tuple[Moments, Tensor]:
    channels = shared.size(-1) // 2
    settled = shared.new_empty(3 * channels + 1)
    mean, m2, count, invstd = settled.split_with_sizes([channels, channels, 1, channels])
    _merge(shared, settled, invstd, eps, summed=shared.dim() == 1, message=False)
    return Moments(count.view(()), mean, m2), invstd


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    moments: Moments,
    momentum: float | None,
) -> None:
    _launch(
        steps.update_running,
        running_mean,
        1,
        running_mean,
        running_var,
        num_batches_tracked,
        *moments,
        running_mean.numel(),
        momentum or 0.0,
        momentum is None,
        1024,
    )


def normalize(x: Tensor, affine: Affine, residual: Tensor | None, work: None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x, plan = _planned(x)
    y = torch.empty_like(x)
    residual = None if residual is None else _laid_out_as(x, residual)
    _launch(passes.normalize, x, plan.tiles, x, residual, y, *_vectors(affine), *plan.layout, affine.relu, *plan.tile)
    return y


def grad_sums(dy: Tensor, x: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    channels = x.size(1)
    parameters = affine.weight, affine.bias
    dweight, dbias = (None if t is None else torch.empty(channels, dtype=t.dtype, device=t.device) for t in parameters)
    if x.numel() == 0:
        return Sums(x.new_zeros(2 * channels, dtype=torch.float64), _zeroed(dweight), _zeroed(dbias), dy)
    x, plan = _planned(x)
    dy = _laid_out_as(x, dy)
    g = None if y is None else torch.empty_like(dy)
    rows = torch.empty((plan.parts, 2 * channels), dtype=torch.float64, device=x.device)
    gradients = (dweight, dbias) if plan.parts == 1 else (None, None)
    inputs = (dy, x, y, g, rows, *gradients, *_vectors(affine), *plan.layout, plan.parts, affine.relu)
    _launch(passes.grad_sums, x, plan.parts * plan.blocks, *inputs, *plan.tile)
    sums = rows[0]
    if plan.parts > 1:
        sums = rows.new_empty(2 * channels)
        step = (channels, plan.parts, plan.tile[0], _rows_at_a_time(plan.parts), _COLUMNS)
        _launch(steps.add_sums, x, triton.cdiv(channels, _COLUMNS), rows, sums, dweight, dbias, *step)
    return Sums(sums, dweight, dbias, dy if g is None else g)


def grad_input(g: Tensor, x: Tensor, affine: Affine, sums: Tensor, count: Tensor, mask: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    x, plan = _planned(x)
    dx = torch.empty_like(x)
    inputs = (_laid_out_as(x, g), x, _of_places(mask, x), dx, *_vectors(affine), sums, count)
    _launch(passes.grad_input, x, plan.tiles, *inputs, *plan.layout, affine.relu, *plan.tile)
    return dx


def _vectors(affine: Affine) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """mean, invstd, weight and bias; the last two may come with gaps."""
    mean, invstd, weight, bias, _ = affine
    return mean, invstd, None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()


def _merged(rows: Tensor, message: bool) -> Tensor:
    packed = rows.new_empty(rows.size(1))
    _merge(rows, packed, None, 0.0, summed=False, message=message)
    return packed


def _merge(rows: Tensor, out: Tensor, invstd: Tensor | None, eps: float, *, summed: bool, message: bool) -> None:
    channels, count = rows.size(-1) // 2, 1 if summed else len(rows)
    inputs = (rows, out, invstd, channels, count, eps, summed, message)
    _launch(steps.merge, rows, triton.cdiv(channels, _COLUMNS), *inputs, _rows_at_a_time(count), _COLUMNS)


def _rows_at_a_time(count: int) -> int:
    return next(rows for rows in (1, 16, 256) if rows >= min(count, 256))


def _between_images(rows: Tensor, images: int, parts: int) -> Tensor:
    channels = rows.size(1) // 2
    apart = rows.new_empty(channels + 1)
    inputs = (rows, apart, channels, images, parts)
    _launch(steps.between_images, rows, triton.cdiv(channels, _COLUMNS), *inputs, _rows_at_a_time(images), _COLUMNS)
    return apart


class _Plan(NamedTuple):
    """How a pass over a tensor is cut up.

    layout: [N, C, S], as it lies in memory.
    tile: the constants of a pass: dtype of values, BN, BC, BS, dtype of offsets.
    blocks: of channels. tiles: all of them. parts: of a pass that adds up.
    """

    layout: tuple[int, int, int]
    tile: tuple[Any, int, int, int, Any]
    blocks: int
    tiles: int
    parts: int


def _planned(x: Tensor, images: int = 1) -> tuple[Tensor, _Plan]:
    """x, copied if it lies in memory with gaps, and the plan for it, or for each of so many of its images."""
    last = not x.is_contiguous()
    if last and not x.movedim(1, -1).is_contiguous():
        x, last = x.contiguous(), False
    return x, _plan(x.shape, last, x.dtype, x.device, images)


@cache
def _plan(shape: torch.Size, last: bool, dtype: torch.dtype, device: torch.device, images: int) -> _Plan:
    channels, places = shape[1], shape.numel() // shape[1] // images
    inner = 1 if last else places * images // shape[0]
    outer = places // inner
    columns = min(triton.next_power_of_2(inner), _TILE)
    # Channels side by side fill a tile's row; planes, only as far as they are small
    wide = min(triton.next_power_of_2(channels), max(1, (64 if inner == 1 else 256) // columns))
    rows = min(triton.next_power_of_2(outer), _TILE // (columns * wide))
    blocks = triton.cdiv(channels, wide)
    tiles = triton.cdiv(outer, rows) * triton.cdiv(inner, columns)
    parts = 1 if tiles <= _SMALL else min(tiles, triton.cdiv(_WAVES * _multiprocessors(device), blocks))
    values = tl.float64 if dtype == torch.float64 else tl.float32
    offsets = tl.int32 if outer * channels * inner <= _INT32 else tl.int64
    tile = (values, rows, wide, columns, offsets)
    return _Plan((outer, channels, inner), tile, blocks, tiles * blocks, parts)


@cache
def _multiprocessors(device: torch.device) -> int:
    # Triton's interpreter, of the tests, has none
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _launch(kernel: Any, x: Tensor, programs: int, *arguments: Any) -> None:
    with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, num_warps=_WARPS, enable_fp_fusion=True)


def _zeroed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.zero_()


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """other in x's memory format, of which x has no gaps."""
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    if all(mine == theirs or size == 1 for size, mine, theirs in strides):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _of_places(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """One byte for each place of x, [N, 1, *S]."""
    if mask is None:
        return None
    return mask.expand(x.size(0), 1, *x.shape[2:]).contiguous().view(torch.uint8)
