"""What a call of batch norm is refused for: before its message, and, of the whole batch, after it.

A rank that refuses before the message sends NaN in its place, so that its peers refuse too, after it.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["relu"] | None


class Inputs(NamedTuple):
    """The tensors of a call of batch norm: see functional.sync_batch_norm."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    residual: Tensor | None = None


_ONE_VALUE = "the whole batch has one value per channel: a variance needs more"
_REFUSED = "another rank of the group refused its input to this layer: its own error says why"


def check_activation(activation: Activation) -> Activation:
    """activation, or ValueError."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation is {activation!r}: it must be 'relu' or None")
    return activation


def check_inputs(inputs: Inputs, channels: int, eps: float, activation: Activation) -> Tensor | None:
    """mask, as [N, 1, *S] or [N, 1, 1, ...]; TypeError or ValueError for what does not fit together."""
    x, weight, bias, mask, residual = inputs
    if mask is None and residual is None and _plainly_fit(x, weight, bias, channels, eps, activation):
        return None
    check_activation(activation)
    _check_tensors(x, weight=weight, bias=bias)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: batch norm takes a floating dtype, say x.float()")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: it must not be below 0, or a root of a negative number is taken")
    if x.dim() < 2 or x.size(1) != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be [N, {channels or 'C'}, *S]")
    if x.size(0) > 0 and x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: a spatial size of 0 holds no values; a rank without data has N = 0"
        )
    for name, parameter in ("weight", weight), ("bias", bias):
        if parameter is not None and parameter.numel() != channels:
            raise ValueError(f"x has {channels} channels but {name} has {parameter.numel()}: they must match")
    return check_beside(x, mask, residual)


def _plainly_fit(
    x: Any, weight: Tensor | None, bias: Tensor | None, channels: int, eps: float, activation: Activation
) -> bool:
    """Whether x and the parameters pass all that follows, by the shortest way: a layer of a small map is in a hurry."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.is_floating_point()
        and x.dim() > 1
        and x.size(1) == channels
        and x.numel() > 0
        and eps >= 0
        and (weight is None or (isinstance(weight, Tensor) and weight.is_cpu and weight.numel() == channels))
        and (bias is None or (isinstance(bias, Tensor) and bias.is_cpu and bias.numel() == channels))
        and activation in (None, "relu")
    )


def check_beside(x: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """mask, as [N, 1, *S] or [N, 1, 1, ...]; TypeError or ValueError for what does not fit to x."""
    _check_tensors(x, mask=mask, residual=residual)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but residual {tuple(residual.shape)}: they must be the same")
    return None if mask is None else _fitting(mask, x)


def check_count(shared: Tensor, shape: Sequence[int], enough: bool = False) -> None:
    """Refuse, on every rank, a whole batch that has no variance, or part of which was refused.

    shared: the messages' sum [2C + 1], or rows [W, 2C + 1].
    shape: of this rank's x.
    enough: whether this rank alone is known to have more than one value per channel.
    """
    if shared.device.type != "cpu" or torch.compiler.is_compiling():
        size = shared[..., -1].sum()
        if not enough:
            torch._assert_async(size != 1, _ONE_VALUE)  # pyright: ignore[reportPrivateImportUsage]
        if shared.device.type == "cpu":
            torch._assert_async(size == size, _REFUSED)  # pyright: ignore[reportPrivateImportUsage]
        return
    size = (shared[-1] if shared.dim() == 1 else shared[:, -1].sum()).item()
    if size == 1:
        raise ValueError(f"{_ONE_VALUE}; x has shape {tuple(shape)} on this rank")
    if size != size:
        raise ValueError(_REFUSED)


def _check_tensors(x: Any, **others: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: it must be a Tensor [N, C, *S]")
    device = x.device
    for name, value in others.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: it must be a Tensor")
        if value.device != device:
            raise ValueError(f"x is on {device} but {name} on {value.device}: they must be on one device")


def _fitting(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: it must be bool, True where an element counts")
    if mask.shape == x.shape[:1]:
        return mask.view(-1, *[1] * (x.dim() - 1))
    if mask.shape != (x.size(0), 1, *x.shape[2:]):
        raise ValueError(f"x has shape {tuple(x.shape)} but mask {tuple(mask.shape)}: mask must be [N] or [N, 1, *S]")
    return mask
