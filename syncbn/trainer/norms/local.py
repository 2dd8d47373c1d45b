"""Batch norms of each rank by itself that torch has not: of parts of its batch, and of no batch at all."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.trainer.norms import swap


class _AnyShape(_BatchNorm):
    """x [N, C, *S] of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(f"x has shape {tuple(input.shape)}: it must be [N, {self.num_features}, *S]")


class GhostBatchNorm(_AnyShape):
    """Batch norm of parts of this rank's batch: each `sub_batch` images, the last part those that are left.

    Running statistics move once for each part. In eval it is nn.BatchNorm. The drift monitor and recalibrate look at
    the rank's whole batch.

    Source: Hoffer et al. 2017, arXiv:1705.08741, algorithm 1.
    """

    sub_batch: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # Not what this split: a view of it might be changed in place by what follows
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in input.split(self.sub_batch)])


class FrozenBatchNorm(_AnyShape):
    """Batch norm with fixed running statistics, weight and bias, in training too; state_dicts of nn.BatchNorm.

    It means something with trained weights alone. Source: as detectors fine-tune, He et al. 2017, arXiv:1703.06870.
    """

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def ghost(model: nn.Module, sub_batch: int) -> None:
    """Make every batch norm layer a GhostBatchNorm."""
    for layer in swap.plain(model).values():
        vars(layer).pop("process_group", None)
        layer.__class__ = GhostBatchNorm
        vars(layer)["sub_batch"] = sub_batch


def freeze(model: nn.Module) -> None:
    """Make every batch norm layer that has running statistics a FrozenBatchNorm."""
    for layer in swap.plain(model).values():
        if layer.running_mean is not None:
            vars(layer).pop("process_group", None)
            layer.__class__ = FrozenBatchNorm
            layer.eval().requires_grad_(False)
