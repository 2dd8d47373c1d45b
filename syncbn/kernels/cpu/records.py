"""How tensors and options become the fields of a record that C reads, see cpu.h. A pointer keeps no tensor alive."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels.contract import Affine, Running

# As cpu.h numbers them
_DTYPES = {dtype: i for i, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16))}
# Values that are not worth waking a thread for, as torch has it
_GRAIN = 2**15


class Layout(NamedTuple):
    """record: as cpu.h has it, but for the threads."""

    record: tuple[int, ...]
    channels: int
    values: int


@lru_cache(1024)
def layout_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
    """None for a tensor with gaps."""
    empty = torch.empty(0, device="meta").as_strided(shape, stride)
    last = not empty.is_contiguous()
    if last and not empty.movedim(1, -1).is_contiguous():
        return None
    images, channels, *size = shape
    record = images, channels, torch.Size(size).numel(), last, _DTYPES[dtype]
    return Layout(record, channels, shape.numel())


def laid_out(x: Tensor) -> tuple[Tensor, Layout]:
    """x without gaps, and how it lies."""
    layout = layout_of(x.shape, x.stride(), x.dtype)
    if layout is not None:
        return x, layout
    x = x.contiguous()
    layout = layout_of(x.shape, x.stride(), x.dtype)
    assert layout is not None
    return x, layout


def like(x: Tensor, other: Tensor) -> Tensor:
    """other, which has x's shape, in x's memory format, dtype and place."""
    if other.stride() == x.stride() and other.dtype == x.dtype and other.is_cpu:
        return other
    return torch.empty_like(x).copy_(other)


def threads(layout: Layout) -> int:
    return 1 if layout.values < 2 * _GRAIN else min(torch.get_num_threads(), layout.values // _GRAIN)


def of_places(mask: Tensor, x: Tensor) -> Tensor:
    """One byte for each place of x, [N, 1, *S]."""
    return mask.expand(x.size(0), 1, *x.shape[2:]).contiguous()


def address(t: Tensor | None) -> int:
    """Where its values are, or 0 for None."""
    return 0 if t is None else t.data_ptr()


def without_gaps(affine: Affine) -> Affine:
    weight, bias, _, _ = affine
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


def of_affine(affine: Affine) -> tuple[float, ...]:
    weight, bias, relu, eps = affine
    return *_of_vector(weight), *_of_vector(bias), relu, eps


def of_running(running: Running | None) -> tuple[float, ...]:
    if running is None:
        return 0, 0, 0, 0, 0, 0, 0.0
    mean, var, batches, momentum = running
    return *_of_vector(mean), *_of_vector(var), address(batches), momentum is None, momentum or 0.0


def movable(running: Running) -> bool:
    """Whether the buffers lie in memory as layers make them."""
    mean, var, batches, _ = running
    return mean.is_contiguous() and var.is_contiguous() and batches.dtype == torch.int64
