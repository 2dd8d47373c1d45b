"""Norms of each image by itself, which know nothing of a batch, and none at all."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.trainer.norms import swap


def groups_of(channels: int, most: int) -> int:
    """The groups of a GroupNorm: the largest divisor of channels up to `most` that leaves two in a group, or 1."""
    return max((g for g in range(1, min(most, channels // 2) + 1) if channels % g == 0), default=1)


def group_norm(layer: _BatchNorm, most: int) -> nn.Module:
    """The GroupNorm for a batch norm layer's place; by `swap.become`."""
    return nn.GroupNorm(groups_of(layer.num_features, most), layer.num_features, affine=False)


class InstanceNorm(nn.GroupNorm):
    """Each channel of each image by itself: GroupNorm of as many groups as channels, for any number of dimensions.

    Source: Ulyanov et al. 2016, arXiv:1607.08022.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:].numel() == 1:  # as torch.nn.InstanceNorm2d has it: every output would be the bias
            raise ValueError(f"Expected more than 1 value per channel and image, got input size {input.shape}")
        return super().forward(input)


class Scale(nn.Module):
    """weight and bias of a norm and no normalisation: what a convolution without bias must not lose.

    Source: the baseline of Zhang et al. 2019, arXiv:1901.09321 (Fixup), and De & Smith 2020, arXiv:2002.10444.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return swap.scaled(x, self.weight, self.bias)


# Weight standardisation


def standardised(weight: Tensor) -> Tensor:
    """weight [O, ...] with each filter's mean 0 and variance 1. Source: Qiao et al. 2019, arXiv:1903.10520."""
    dims = tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(weight.to(_at_least_float32(weight)), dims, correction=0, keepdim=True)
    return ((weight - mean) * (var + 1e-10).rsqrt()).to(weight.dtype)  # 1e-10: as in Big Transfer, arXiv:1912.11370


class StandardisedConv1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), self.bias)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), self.bias)


class StandardisedConv3d(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), self.bias)


_STANDARDISED = {nn.Conv1d: StandardisedConv1d, nn.Conv2d: StandardisedConv2d, nn.Conv3d: StandardisedConv3d}


def standardise(model: nn.Module) -> None:
    """Standardise the weights of every convolution whose filters have more than one."""
    for layer in model.modules():
        if (to := _STANDARDISED.get(type(layer))) and layer.weight[0].numel() > 1:  # pyright: ignore
            layer.__class__ = to


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
