"""A SyncBatchNorm that learns its number of channels from its first input."""

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import is_lazy

from syncbn.checks import Activation, check_activation
from syncbn.collectives import Group, Reduction
from syncbn.module import SyncBatchNorm


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A SyncBatchNorm whose num_features is the C of its first input; then its class is SyncBatchNorm.

    Args:
        eps, momentum, affine, track_running_stats, bias, activation, group, reduction, device, dtype: as in
            SyncBatchNorm.

    Raises:
        ValueError: the first input is not [N, C, *S]. On the rank that saw it alone: without C, its peers cannot be
            told. N may be 0.

    Collective: as SyncBatchNorm, from the first forward on; learning C sends nothing. DDP wants it to have happened:
    run one forward, in eval for instance, before wrapping the model.
    """

    cls_to_become = SyncBatchNorm

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        activation: Activation = None,
        group: Group = "world",
        reduction: Reduction = "auto",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(eps, 0.1, affine, track_running_stats, device=device, dtype=dtype)
        self.momentum = momentum
        if not bias:
            self.register_parameter("bias", None)
        self.activation = check_activation(activation)
        self.synchronise(group, reduction)

    def initialize_parameters(self, input: Tensor, *others: Any, **named: Any) -> None:
        """Learn num_features from input; called before the first forward, with its arguments."""
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "running_mean", "running_var")}
        tensors = {name: t for name, t in tensors.items() if t is not None}
        # A state_dict that was loaded knows C already, and holds some or all of the values
        channels = [t.numel() for t in tensors.values() if not is_lazy(t)]
        if not channels and input.dim() < 2:
            raise ValueError(f"x has shape {tuple(input.shape)}: it must be [N, C, *S]")
        self.num_features = channels[0] if channels else input.size(1)
        for name, t in tensors.items():
            if is_lazy(t):
                t.materialize((self.num_features,))
                t.data.fill_(1 if name in ("weight", "running_var") else 0)
