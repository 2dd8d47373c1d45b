"""A sum over ranks that torch may differentiate and map, for what differentiates batch norm itself."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

_torch: Any = torch


def summed(message: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of message over the group's ranks, which torch may differentiate and map in any way, any number of times.

    Collective: one all_reduce, and one for each backward through it; forward-mode AD sends one for the tangent. What
    is mapped travels as one message.
    """
    if not is_hidden_batch(message):
        return _Summed.apply(message, group)
    level = _torch._C._vmapmode_increment_nesting() - 1
    _torch._C._vmapmode_decrement_nesting()
    whole = _torch._remove_batch_dim(message, level, 1, 0)
    return _torch._add_batch_dim(summed(whole, group), 0, level)


def is_hidden_batch(tensor: Tensor) -> bool:
    """Whether tensor is of torch's older vmap, that of is_grads_batched, which knows no Function's own rule."""
    return _torch._C._functorch.is_legacy_batchedtensor(tensor)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(message: Tensor, group: ProcessGroup) -> Tensor:
        message = message.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(message, group=group)
        return message

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return summed(gradient, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return summed(tangent, ctx.group)

    @staticmethod
    def vmap(info, in_dims: tuple[Any, ...], message: Tensor, group: ProcessGroup):
        return summed(message.movedim(in_dims[0], 0), group), 0
