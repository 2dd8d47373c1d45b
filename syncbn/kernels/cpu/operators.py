"""The passes in C as operators that torch.compile leaves as they are: inductor's own are slower on CPUs.

Nothing is written in place, so that the running buffers are the compiled graph's to move.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import cpu, eager
from syncbn.kernels.contract import Affine, Form, Local, Running, Sums

__all__ = ["NEEDS_Y", "WHOLE", "grad_input", "grad_sums", "moments", "normalize", "update_running"]

NEEDS_Y = cpu.NEEDS_Y
# The graph has its own way to send a message
WHOLE = None
update_running = eager.update_running


def moments(x: Tensor, mask: Tensor | None, form: Form, per_image: bool = False) -> Local:
    packed, between = _moments(x, mask, form == "message", per_image)
    return Local(packed, None, between if per_image else None)


def normalize(
    x: Tensor,
    shared: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    running: Running | None = None,
    work: Any = None,
) -> tuple[Tensor, Tensor]:
    y, stats = _normalize(x, shared, *affine, residual)
    if running is not None:
        update_running(running, stats)
    return y, stats


def grad_sums(dy: Tensor, x: Tensor, stats: Tensor, affine: Affine, y: Tensor | None) -> Sums:
    packed, dweight, dbias, g = _grad_sums(dy, x, stats, *affine, y)
    weight, bias, *_ = affine
    return Sums(packed, None if weight is None else dweight, None if bias is None else dbias, dy if y is None else g)


def grad_input(g: Tensor, x: Tensor, stats: Tensor, affine: Affine, sums: Tensor, mask: Tensor | None) -> Tensor:
    return _grad_input(g, x, stats, *affine, sums, mask)


# custom_op would look at every argument and result anew in each call, 30 us a pass
_library = torch.library.Library("syncbn", "FRAGMENT")


def _operator(schema: str) -> Callable[[Callable], Any]:
    """Makes of a function on CPU tensors the operator of that schema."""

    def register(function: Callable) -> Any:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CPU")
        return getattr(torch.ops.syncbn, name).default

    return register


def _fake_of(operator: Any) -> Callable[[Callable], Any]:
    return torch.library.register_fake(operator.name(), lib=_library)


@_operator("moments(Tensor x, Tensor? mask, bool as_message, bool per_image) -> (Tensor, Tensor)")
def _moments(x, mask, as_message, per_image):
    packed, _, between = cpu.moments(x, mask, "message" if as_message else "row", per_image)
    return packed, packed.new_empty(0) if between is None else between


@_fake_of(_moments)
def _(x, mask, as_message, per_image):
    return _float64(x, 2 * x.size(1) + 1), _float64(x, x.size(1) + 1 if per_image else 0)


@_operator(
    "normalize(Tensor x, Tensor shared, Tensor? weight, Tensor? bias, bool relu, float eps, Tensor? residual)"
    " -> (Tensor, Tensor)"
)
def _normalize(x, shared, weight, bias, relu, eps, residual):
    y, stats = cpu.normalize(x, shared, Affine(weight, bias, relu, eps), residual)
    return _like(x, y), stats


@_fake_of(_normalize)
def _(x, shared, weight, bias, relu, eps, residual):
    return torch.empty_like(x), _float64(x, 3 * x.size(1) + 1)


@_operator(
    "grad_sums(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, bool relu, float eps, Tensor? y)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _grad_sums(dy, x, stats, weight, bias, relu, eps, y):
    packed, dweight, dbias, g = cpu.grad_sums(dy, x, stats, Affine(weight, bias, relu, eps), y)
    # What an operator returns may be none of its inputs, and no result twice
    dweight, dbias, g = (packed.new_empty(0) if t is None else t for t in (dweight, dbias, None if y is None else g))
    return packed, dweight, dbias, g if y is None else _like(x, g)


@_fake_of(_grad_sums)
def _(dy, x, stats, weight, bias, relu, eps, y):
    dweight, dbias = (_float64(x, 0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return _float64(x, 2 * x.size(1)), dweight, dbias, _float64(x, 0) if y is None else torch.empty_like(x)


@_operator(
    "grad_input(Tensor g, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, bool relu, float eps, Tensor sums, "
    "Tensor? mask) -> Tensor"
)
def _grad_input(g, x, stats, weight, bias, relu, eps, sums, mask):
    return _like(x, cpu.grad_input(g, x, stats, Affine(weight, bias, relu, eps), sums, mask))


@_fake_of(_grad_input)
def _(g, x, stats, weight, bias, relu, eps, sums, mask):
    return torch.empty_like(x)


def _float64(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64)


def _like(x: Tensor, result: Tensor) -> Tensor:
    """result as the fake said that it lies: an x with gaps was copied first."""
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)
