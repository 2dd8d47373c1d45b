"""The specification: batch norm of the whole batch in plain torch, differentiable, in one process."""

import torch
from torch import Tensor


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise x [N, C, *S] by the mean and the biased variance of each channel over N and *S."""
    dims = [d for d in range(x.dim()) if d != 1]
    channel = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    y = (x - mean) / torch.sqrt(var + eps)
    if weight is not None:
        y = y * weight.view(channel)
    if bias is not None:
        y = y + bias.view(channel)
    return y


def running(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    """The running mean and (unbiased) variance after seeing x [N, C, *S]."""
    values = x.detach().transpose(0, 1).flatten(1)
    mean, var = values.mean(1), values.var(1, correction=1)
    return (1 - momentum) * running_mean + momentum * mean, (1 - momentum) * running_var + momentum * var
