"""Batch renormalisation, synchronised."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.trainer.norms.swap import scaled

R_MAX, D_MAX = 3.0, 5.0  # the paper's


class BatchRenorm(syncbn.SyncBatchNorm):
    """Batch norm of all ranks' batch, moved in training towards what the running statistics would have given.

    y = ((x - mean) / std · r + d) · weight + bias, by channel, where mean and std = √(var + eps) are over all ranks of
    the group, as in SyncBatchNorm, and without gradient

        r = std / running_std, clipped to 1/r_max .. r_max        d = (mean - running_mean) / running_std, to ± d_max

    with running_std = √(running_var + eps) from before this batch. r_max grows from 1 to 3 and d_max from 0 to 5 over
    the first `renorm_steps` forwards, which num_batches_tracked counts. Until something is clipped, training and eval
    are the same function. In eval it is SyncBatchNorm. (The paper averages std; here running_var is the operator's.)

    Collective: as SyncBatchNorm, the same two messages. It is no layer to recompute by activation checkpointing:
    the running statistics of the first time are gone by then, which it refuses.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1.
    """

    renorm_steps: int = 1000

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: Literal["relu"] | None = None,
    ) -> Tensor:
        running = self._running_now() if self.training else None
        if running is None:
            return super().forward(input, residual, mask, activation)
        y, moments = self.by_batch(input, None, None, mask)
        r, d = self._corrections(moments, running)
        weight = r if self.weight is None else r * self.weight
        bias = d if self.weight is None else d * self.weight
        bias = bias if self.bias is None else bias + self.bias
        dtype = torch.promote_types(input.dtype, torch.float32)
        y = scaled(y, weight.to(dtype), bias.to(dtype)).to(input.dtype)
        y = y if residual is None else y + residual.to(input.dtype)
        return F.relu(y) if (activation or self.activation) else y

    def _running_now(self) -> "_Running | None":
        """The running statistics, before this batch moves them; None if the layer has none."""
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or batches is None:
            return None
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "norm=batch_renorm inside an activation checkpoint: its second forward would find other running "
                "statistics than the first; take norm=sync, or no checkpoint around this layer"
            )
        ramp = (batches.double() / self.renorm_steps).clamp(max=1)
        # A copy: this batch moves the buffers before they are asked
        mean = mean.to(torch.float64, copy=True)
        return _Running(mean, (var.double() + self.eps).sqrt(), 1 + ramp * (R_MAX - 1), ramp * D_MAX)

    def _corrections(self, moments: syncbn.Moments, running: "_Running") -> tuple[Tensor, Tensor]:
        """r and d, [C] each."""
        r = (moments.var + self.eps).sqrt() / running.std
        d = (moments.mean - running.mean) / running.std
        return r.clamp(1 / running.r_max, running.r_max), d.clamp(-running.d_max, running.d_max)


class _Running(NamedTuple):
    """mean and std [C] float64 before a batch; r_max and d_max [], as the layer's age has them."""

    mean: Tensor
    std: Tensor
    r_max: Tensor
    d_max: Tensor


def convert(model: nn.Module, group: Any, steps: int) -> nn.Module:
    """Make every batch norm layer a BatchRenorm over the group."""
    model = syncbn.convert(model, group=group, report=lambda _: None)
    for layer in model.modules():
        if type(layer) is syncbn.SyncBatchNorm:
            layer.__class__ = BatchRenorm
            vars(layer)["renorm_steps"] = steps
    return model
