"""SyncBatchNorm, the layer: parameters, buffers and the choice of statistics. The arithmetic is functional.py's."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import Group
from syncbn.functional import sync_batch_norm
from syncbn.moments import update_running


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all ranks together: a drop-in for nn.BatchNorm1d, 2d and 3d.

    In training, x is normalised by the mean and biased variance over N and *S of every rank in the group, and the
    running buffers move towards that mean and the unbiased variance: they are the same bits on every rank. In eval
    the running buffers are used and nothing is sent. Without a process group, or alone in it, it is nn.BatchNorm.

    Args:
        num_features: C of an input [N, C, *S]; *S may be absent, and differ between ranks, as may N; N may be 0.
        eps: added to the variance.
        momentum: weight of a new batch in the running buffers; None for the cumulative average.
        affine: learn weight [C] and bias [C].
        track_running_stats: keep running_mean [C], running_var [C] and num_batches_tracked []; without them eval
            normalises by the statistics of this rank's batch.
        group: "world", or the ProcessGroup whose ranks form the batch.

    Collective: in training, one all_reduce of 2C + 1 float64 forward, one of 2C backward; every rank of the group
    must reach the layer as often, in the same order. DDP needs no buffer broadcast for it.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; over devices, Peng et al. 2018, arXiv:1711.07240.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: Group = "world",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.group: Group = group

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training:
            y, moments = sync_batch_norm(x, self.weight, self.bias, eps=self.eps, group=self.group)
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                update_running(self.running_mean, self.running_var, self.num_batches_tracked, moments, self.momentum)
            return y
        from_batch = self.running_mean is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, from_batch, 0.0, self.eps)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.size(1) != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be [N, {self.num_features}, *S]")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group!r}"
