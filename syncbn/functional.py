"""Synchronised batch norm as one function: the kernels of this rank, one message to the others, each way."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn import collectives, kernels
from syncbn.collectives import Group, ProcessGroup
from syncbn.moments import Moments, from_message, to_message


def sync_batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, group: Group = "world"
) -> tuple[Tensor, Moments]:
    """Normalise x with the mean and variance of every rank's batch taken together.

    Per channel, y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and the biased var are over all N and
    *S of all ranks. Ranks may differ in N and *S, and may be empty.

    Args:
        x: [N, C, *S], any floating dtype; passes over x compute in float32, or float64 if x is.
        weight: [C], or None for 1.
        bias: [C], or None for 0.
        eps: added to the variance.
        group: "world", or the ProcessGroup whose ranks form the batch.

    Returns:
        y, shaped and typed as x (memory format too), and the Moments of the whole batch, the same bits on every rank.
        Gradients of weight and bias are this rank's share: their sum over ranks is that of the whole batch.

    Raises:
        TypeError: x is not of a floating dtype.
        ValueError: C differs from the length of weight or bias; group is of another kind; a lone rank has one value
            per channel.

    Collective: one all_reduce of 2C + 1 float64 forward, one of 2C backward; every rank of the group must call it,
    and its backward, in the same order.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    _check(x, weight, bias)
    process_group = collectives.resolve(group)
    if process_group is None and 0 < x.numel() <= x.size(1):
        raise ValueError(
            f"x has shape {tuple(x.shape)}: a batch needs more than one value per channel to have a variance"
        )
    y, *moments = _SyncBatchNorm.apply(x, weight, bias, eps, process_group)
    return y, Moments(*moments)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup | None):
        kernel = kernels.choose(x)
        message = collectives.all_reduce(to_message(kernel.moments(x)), group)
        moments = from_message(message)
        invstd = (moments.var + eps).rsqrt()
        y = kernel.normalize(x, moments.mean, invstd, weight, bias)
        ctx.save_for_backward(x, weight, bias, moments.mean, invstd, moments.count)
        ctx.group = group
        ctx.mark_non_differentiable(*moments)
        return y, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, *_):
        x, weight, bias, mean, invstd, count = ctx.saved_tensors
        kernel = kernels.choose(x)
        sums = kernel.grad_sums(dy, x, mean, invstd)
        # Whatever this rank needs of it, its peers need its part
        mean_dy, mean_dy_xhat = (collectives.all_reduce(sums.clone(), ctx.group) / count.clamp(min=1)).chunk(2)
        dbias, dweight = sums.chunk(2)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = kernel.grad_input(dy, x, mean, invstd, weight, mean_dy, mean_dy_xhat)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: batch norm takes a floating dtype, say x.float()")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be [N, C, *S]")
    for name, parameter in ("weight", weight), ("bias", bias):
        if parameter is not None and parameter.numel() != x.size(1):
            raise ValueError(f"x has {x.size(1)} channels but {name} has {parameter.numel()}: they must match")
