"""Norms that are the activation too: EvoNorm-S0 and FRN with its thresholded linear unit."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.norms.sample import groups_of
from syncbn.trainer.norms.swap import per_channel, scaled


class Activated(nn.Module):
    """A norm in one of two forms: with its own nonlinearity, or, where none follows in the model, without.

    own, start: name and first value of the parameter [C] of the nonlinearity.
    activates: whether a call that does not say so is one of the first kind.
    nonlinear: whether any call is; without, there are no parameters for it.
    """

    own: str
    start: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    eps: float = 1e-5

    def __init__(self, like: Tensor, *, activates: bool, nonlinear: bool):
        super().__init__()
        self.activates = activates
        for name in "weight", "bias":
            self.register_parameter(name, None)
        self.register_parameter(self.own, nn.Parameter(torch.full_like(like, self.start)) if nonlinear else None)

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: Literal["relu"] | None = None) -> Tensor:
        """The norm of x [N, C, *S]. activation: one followed here, before which residual was added, or None."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if residual is not None:  # what follows an addition stays the model's own
            return F.relu(self.linear(wide).to(x.dtype) + residual.to(x.dtype))
        return (self.activated(wide) if activation or self.activates else self.linear(wide)).to(x.dtype)

    def linear(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def activated(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class EvoNormS0(Activated):
    """x · sigmoid(v · x) / std · weight + bias, std = √(var + eps) of a group of channels of each image; v starts as 1.

    Without nonlinearity it is x · weight + bias, as the authors have it. Source: Liu et al. 2020, arXiv:2004.02967.
    """

    own, start = "v", 1.0
    v: nn.Parameter

    def __init__(self, like: Tensor, *, activates: bool, nonlinear: bool, most_groups: int):
        super().__init__(like, activates=activates, nonlinear=nonlinear)
        self.groups = groups_of(like.numel(), most_groups)

    def linear(self, x: Tensor) -> Tensor:
        return scaled(x, self.weight, self.bias)

    def activated(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        dims = tuple(range(2, grouped.dim()))
        var = (grouped - grouped.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)  # var() warns if N is 0
        normalised = (grouped * (var + self.eps).rsqrt()).flatten(1, 2)
        return scaled(normalised * torch.sigmoid(x * per_channel(self.v, x)), self.weight, self.bias)


class FilterResponseNorm(Activated):
    """max(y, tau), where y = x / √(mean of x² + eps) · weight + bias by image and channel; tau starts as 0.

    Without nonlinearity it is y. eps is the batch norm's (the paper: 1e-6, and learnt where maps are 1×1, on which y is
    little more than a sign). Source: Singh & Krishnan 2020, arXiv:1911.09737.
    """

    own, start = "tau", 0.0
    tau: nn.Parameter

    def linear(self, x: Tensor) -> Tensor:
        squares = x.square()
        if x.dim() > 2:
            squares = squares.mean(tuple(range(2, x.dim())), keepdim=True)
        return scaled(x * (squares + self.eps).rsqrt(), self.weight, self.bias)

    def activated(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.maximum(y, per_channel(self.tau, y))
