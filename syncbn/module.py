"""SyncBatchNorm, the layer: parameters, buffers and the choice of statistics. The arithmetic is functional.py's."""

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn import collectives, functional, recompute
from syncbn.checks import Activation, Inputs, check_activation, check_beside
from syncbn.collectives import Exchange, Group, ProcessGroup, Reduction, Spec, Witness
from syncbn.functional import Call, Observer
from syncbn.kernels import Running, unpacked
from syncbn.moments import Moments


def _leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward, which torch.fx takes for one call of the layer, as it does with torch's own layers."""

    @functools.wraps(forward)
    def call(self: nn.Module, input: Any, *args: Any, **named: Any) -> Any:
        if isinstance(input, fx.Proxy):
            return _as_one_call(self, input, args, named)
        return forward(self, input, *args, **named)

    return call


def _as_one_call(layer: nn.Module, input: fx.Proxy, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    target = input.tracer.path_of_module(layer)  # pyright: ignore[reportAttributeAccessIssue]
    return input.tracer.create_proxy("call_module", target, (input, *args), named)


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
        bias: learn bias, if affine.
        activation: "relu" or None. On a GPU it is a part of the layer's own passes, and so is the sum with a residual.
        group: the ranks that form one batch: see `syncbn.Group`. It may be set anew at any time. A process group is
            shared by deep copies and pickled as its ranks.
        reduction: "auto", "all_reduce", "gather" or "one_shot": see `syncbn.Reduction`.
        device, dtype: of parameters and buffers; running buffers are never in half precision, whatever the dtype.

    Collective: in training, one message of 2C + 1 float64 forward, one of 2C backward; every rank of the group must
    reach the layer as often, in the same order, with grad mode alike. The first forward also forms the group, with
    every rank of the world, once for all layers of one `convert`; not so a ProcessGroup or DeviceMesh. DDP needs no
    buffer broadcast. Under activation checkpointing the second run of forward sends nothing and leaves the buffers.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; over devices, Peng et al. 2018, arXiv:1711.07240.
    """

    activation: Activation = None
    reduction: Reduction = "auto"
    witness: Witness | None = None
    observer: Observer | None = None

    def __init__(
        self,
        num_features: int,
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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.bias = None
        self.activation = check_activation(activation)
        self.synchronise(group, reduction)

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "forward" in vars(cls):
            cls.forward = _leaf(cls.forward)

    def synchronise(self, group: Group | Spec, reduction: Reduction = "auto") -> None:
        """Set the group and the reduction; what __init__ adds to that of nn.BatchNorm."""
        self.reduction = collectives.check_reduction(reduction)
        self.group = group
        keep_buffers_precise(self)

    @property
    def group(self) -> Group:
        """The ranks that form one batch."""
        return vars(self)["_spec"].group

    @group.setter
    def group(self, group: Group | Spec) -> None:
        # Layers that share a Spec agree on their ranks once for all
        vars(self)["_spec"] = group if isinstance(group, Spec) else Spec(group)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: Activation = None,
    ) -> Tensor:
        """Normalise input, add residual, apply the activation.

        Args:
            input: [N, C, *S].
            residual: [N, C, *S], or None for 0.
            mask: [N] or [N, 1, *S] bool, the elements that count in training's mean and variance; None for all.
            activation: "relu", or None for the layer's own.
        """
        if isinstance(input, fx.Proxy):
            # For torch.fx the layer is one call, as torch's own are
            given = {"residual": residual, "mask": mask, "activation": activation}
            return _as_one_call(self, input, (), {name: value for name, value in given.items() if value is not None})
        activation = activation or self.activation
        if not self.training:
            return self._by_running_statistics(input, residual, mask, activation)
        weight, bias = self._held(self._parameters, "weight", "bias")
        return self._by_batch(Inputs(input, weight, bias, mask, residual), activation)[0]

    def by_batch(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Moments]:
        """What forward does in training, by another weight and bias: y, and the Moments of the whole batch.

        For subclasses that do more with them. The running buffers have moved afterwards.
        """
        y, stats = self._by_batch(Inputs(x, weight, bias, mask, residual), "relu" if relu else None)
        return y, unpacked(stats)[0]

    def _by_batch(self, inputs: Inputs, activation: Activation) -> tuple[Tensor, Tensor]:
        exchange = Exchange(self._process_group(inputs.x), self.reduction, self.witness)
        checkpointing = not torch.compiler.is_compiling() and recompute.possible()
        recalled = recompute.recall(self) if checkpointing else None
        if recalled is None:
            call = Call(exchange, self.num_features, self.eps, activation, self._running(), self.observer)
        else:
            call = Call(exchange, self.num_features, self.eps, activation, stats=recalled)
        y, stats = functional.batch_norm(inputs, call)
        if checkpointing:
            recompute.remember(self, stats)
        return y, stats

    def _held(self, by: Mapping[str, Any], *names: str) -> Sequence[Tensor | None]:
        """The parameters or buffers of these names: getattr, which a parametrised one needs, takes the host longer."""
        try:
            return [by[name] for name in names]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _running(self) -> Running | None:
        mean, var, batches = self._held(self._buffers, *_RUNNING, "num_batches_tracked")
        if (mean is None) != (var is None):
            raise ValueError(_ONE_IS_NONE)
        # Read here, as torch's layers do: whoever turns it off for a while leaves the buffers alone
        if mean is None or var is None or not self.track_running_stats:
            return None
        if batches is None:
            if self.momentum is None:
                # Nothing to average by; nor do torch's layers
                return None
            batches = torch.zeros((), dtype=torch.int64, device=mean.device)
        return Running(mean, var, batches, self.momentum)

    def _running_statistics(self) -> tuple[Tensor | None, Tensor | None]:
        mean, var = self.running_mean, self.running_var
        if (mean is None) != (var is None):
            raise ValueError(_ONE_IS_NONE)
        return mean, var

    def process_group(self) -> ProcessGroup | None:
        """The ranks whose batches are one to this layer; None: this process alone.

        Not for group={"samples": n} before its first batch, which decides. Collective the first time, as it forms the
        group: every rank of the world must ask its layers in the same order.
        """
        return collectives.resolve(vars(self)["_spec"].key)

    def _process_group(self, x: Tensor) -> ProcessGroup | None:
        spec = vars(self)["_spec"]
        process_group = collectives.resolve(spec.key, x.size(0) if spec.by_samples and x.dim() else 0)
        if torch.compiler.is_compiling():
            return process_group
        if process_group is not None:
            vars(self)["_has_peers"] = True
            _refuse_join()
        elif "_has_peers" in vars(self) and not collectives.available():
            raise RuntimeError(
                "the process group that this layer synchronised over was destroyed: initialise one, or "
                "syncbn.revert(model) to train in this process alone"
            )
        return process_group

    def _by_running_statistics(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: Activation
    ) -> Tensor:
        check_activation(activation)
        check_beside(x, mask, residual)
        self._check_input_dim(x)
        # Parameters may be in half precision, where buffers never are
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, var, weight, bias = (
            None if t is None else t.to(dtype) for t in (*self._running_statistics(), self.weight, self.bias)
        )
        y = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, self.eps)
        y = y if residual is None else y + residual.to(x.dtype)
        return y if activation is None else F.relu(y)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.size(1) != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be [N, {self.num_features}, *S]")

    @property
    def affine(self) -> bool:
        """Whether weight and bias are learnt."""
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                "convert_sync_batchnorm would put torch.nn.SyncBatchNorm in the place of syncbn's layer, which is "
                "synchronised already, and lose its activation: leave that call out (Lightning's sync_batchnorm=True, "
                "timm's --sync-bn), or take syncbn.revert(model) first"
            )
        return vars(self)["affine"]

    @affine.setter
    def affine(self, affine: bool) -> None:
        vars(self)["affine"] = affine

    def _apply(self, fn: Any, recurse: bool = True) -> "SyncBatchNorm":
        before = {name: getattr(self, name) for name in _RUNNING}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after is not None and after.dtype not in _PRECISE:
                # .half() and .bfloat16() go for the parameters alone
                setattr(self, name, buffer.to(after.device))
        return self

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in OF_THIS_PROCESS}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        # That of a parametrised layer would pass by __getstate__
        twin = memo[id(self)] = self.__new__(type(self))
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        reduction = "" if self.reduction == "auto" else f", reduction={self.reduction!r}"
        return f"{super().extra_repr()}{activation}, group={vars(self)['_spec']!r}{reduction}"


def _refuse_join() -> None:
    """Ranks whose data ended would leave the others waiting: they have DDP's messages to answer, not the layers'."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        raise RuntimeError(
            "a SyncBatchNorm within DDP's join(): a rank whose data ended would no longer send its statistics; let "
            "every rank make as many steps, with empty batches [0, C, ...] where it has no data, or take "
            "join(throw_on_early_termination=True)"
        )


OF_THIS_PROCESS = ("_has_peers", "witness", "observer")
_RUNNING = ("running_mean", "running_var")
_ONE_IS_NONE = "one of running_mean and running_var is None: both must be, or neither"
_PRECISE = (torch.float32, torch.float64)


def keep_buffers_precise(layer: nn.Module) -> None:
    """Make half-precision running buffers float32; they remain the tensors that they are."""
    for name in _RUNNING:
        buffer = getattr(layer, name)
        if buffer is not None and buffer.dtype not in _PRECISE:
            buffer.data = buffer.data.float()
