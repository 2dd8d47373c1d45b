"""The kernels in C, for CPUs: each pass reads and writes its tensors once, and does the steps over channels too.

Threads are torch's own, torch.get_num_threads() of them; how many makes no difference to a bit. Where the relu let a
value through is computed from x again, unless a residual was added.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.kernels import eager
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums
from syncbn.kernels.cpu.library import Library

__all__ = ["NEEDS_Y", "grad_input", "grad_sums", "moments", "normalize", "update_running"]

NEEDS_Y = False

# As cpu.h numbers them
_DTYPES = {dtype: i for i, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16))}
# Values that are not worth waking a thread for, as torch has it
_GRAIN = 2**15

_library = Library()


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    x, layout = _laid_out(x)
    packed = torch.empty(2 * layout.channels + 1, dtype=torch.float64)
    between = torch.empty(layout.channels + 1, dtype=torch.float64) if per_image else None
    mask = None if mask is None else _of_places(mask, x)
    _library.moments(
        *layout.record, _threads(layout), x.data_ptr(), _at(mask), packed.data_ptr(), _at(between), form == "message"
    )
    return Local(packed, None, between)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: Any = None,
) -> tuple[Tensor, Tensor]:
    x, layout = _laid_out(x)
    y, stats = torch.empty_like(x), torch.empty(3 * layout.channels + 1, dtype=torch.float64)
    residual, affine = None if residual is None else _like(x, residual), _without_gaps(affine)
    # A gathered row may have had a stamp behind it
    shared, rows = (shared, 0) if shared.dim() == 1 else (shared.contiguous(), shared.size(0))
    here = None if running is None or not _movable(running) else running
    _library.normalize(
        *layout.record, _threads(layout), x.data_ptr(), _at(residual), y.data_ptr(), shared.data_ptr(), rows,
        stats.data_ptr(), *_of_affine(affine), *_of_running(here),
    )  # fmt: skip
    if here is not None:
        torch.autograd.graph.increment_version(here[:3])
    elif running is not None:
        eager.update_running(running, stats)
    return y, stats


def update_running(running: Running, stats: Tensor) -> None:
    if not _movable(running):
        return eager.update_running(running, stats)
    _library.update_running(stats.size(0) // 3, stats.data_ptr(), *_of_running(running))
    torch.autograd.graph.increment_version(running[:3])
    return None


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    x, layout = _laid_out(x)
    dy, affine, channels = _like(x, dy), _without_gaps(affine), layout.channels
    weight, bias, *_ = affine
    y, g = (None, dy) if y is None else (_like(x, y), torch.empty_like(x))
    packed = torch.empty(2 * channels, dtype=torch.float64)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    _library.grad_sums(
        *layout.record, _threads(layout), dy.data_ptr(), x.data_ptr(), _at(y), g.data_ptr(), stats.data_ptr(),
        packed.data_ptr(), _at(dweight), _at(dbias), *_of_affine(affine),
    )  # fmt: skip
    return Sums(packed, dweight, dbias, g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    x, layout = _laid_out(x)
    g, dx, affine = _like(x, g), torch.empty_like(x), _without_gaps(affine)
    mask = None if mask is None else _of_places(mask, x)
    _library.grad_input(
        *layout.record, _threads(layout), g.data_ptr(), x.data_ptr(), _at(mask), dx.data_ptr(), stats.data_ptr(),
        sums.data_ptr(), *_of_affine(affine),
    )  # fmt: skip
    return dx


class _Layout(NamedTuple):
    """record: as cpu.h has it, but for the threads."""

    record: tuple[int, ...]
    channels: int
    values: int


@lru_cache(1024)
def _layout_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> _Layout | None:
    """None for a tensor with gaps."""
    like = torch.empty(0, device="meta").as_strided(shape, stride)
    last = not like.is_contiguous()
    if last and not like.movedim(1, -1).is_contiguous():
        return None
    images, channels, *size = shape
    record = images, channels, torch.Size(size).numel(), last, _DTYPES[dtype]
    return _Layout(record, channels, shape.numel())


def _laid_out(x: Tensor) -> tuple[Tensor, _Layout]:
    """x without gaps, and how it lies."""
    layout = _layout_of(x.shape, x.stride(), x.dtype)
    if layout is not None:
        return x, layout
    x = x.contiguous()
    layout = _layout_of(x.shape, x.stride(), x.dtype)
    assert layout is not None
    return x, layout


def _like(x: Tensor, other: Tensor) -> Tensor:
    """other, which has x's shape, in x's memory format, dtype and place."""
    if other.stride() == x.stride() and other.dtype == x.dtype and other.is_cpu:
        return other
    return torch.empty_like(x).copy_(other)


def _threads(layout: _Layout) -> int:
    return 1 if layout.values < 2 * _GRAIN else min(torch.get_num_threads(), layout.values // _GRAIN)


def _of_places(mask: Tensor, x: Tensor) -> Tensor:
    """One byte for each place of x, [N, 1, *S]."""
    return mask.expand(x.size(0), 1, *x.shape[2:]).contiguous()


def _at(t: Tensor | None) -> int:
    """Where its values are, or 0 for None."""
    return 0 if t is None else t.data_ptr()


def _without_gaps(affine: Affine) -> Affine:
    weight, bias, *_ = affine
    if (weight is None or weight.is_contiguous()) and (bias is None or bias.is_contiguous()):
        return affine
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return affine._replace(weight=weight, bias=bias)


def _of_vector(t: Tensor | None) -> tuple[int, int]:
    if t is None:
        return 0, 0
    if not t.is_cpu:
        raise ValueError(f"x is on the CPU but a parameter or buffer of its layer on {t.device}: they must be together")
    return t.data_ptr(), _DTYPES[t.dtype]


def _of_affine(affine: Affine) -> tuple[float, ...]:
    weight, bias, relu, eps = affine
    return *_of_vector(weight), *_of_vector(bias), relu, eps


def _of_running(running: Running | None) -> tuple[float, ...]:
    if running is None:
        return 0, 0, 0, 0, 0, 0, 0.0
    mean, var, batches, momentum = running
    return *_of_vector(mean), *_of_vector(var), _at(batches), momentum is None, momentum or 0.0


def _movable(running: Running) -> bool:
    """Whether the buffers lie in memory as layers make them."""
    mean, var, batches, _ = running
    return mean.is_contiguous() and var.is_contiguous() and batches.dtype == torch.int64
