"""Activation checkpointing runs a forward again within backward: then its moments are remembered, not asked for.

The peers' part is the same the second time, so a second collective would be waste, and a second running update wrong
(pytorch#96136). What the first run learnt lives as long as the autograd node that will cause the second.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor


class Recall:
    """What one layer remembers of the forwards that may be run again."""

    def __init__(self) -> None:
        self._kept: list[weakref.ref[_Forward]] = []

    def due(self) -> bool:
        """Whether the forward about to run is the second run of one that was kept."""
        return torch._C._current_graph_task_id() != -1 and bool(self._alive())

    def keep(self, local: Tensor, shared: Tensor, ctx: Any) -> None:
        """Remember this forward, of which ctx is the autograd context, if checkpointing may run it again.

        local: this rank's packed moments. shared: what became of them among the group's.
        """
        owner = _reentrant_checkpoint() or (ctx if _saving_is_hooked() else None)
        if owner is not None:
            forward = _Forward(local, shared)
            owner.syncbn_forwards = [*getattr(owner, "syncbn_forwards", ()), forward]
            self._kept = [weakref.ref(one) for one in (*self._alive(), forward)]

    def find(self, local: Tensor) -> Tensor:
        """What was shared in the forward whose own moments were local; no host wait."""
        kept = self._alive()
        if len(kept) == 1:
            return kept[0].shared
        # The nearest, not the equal: some kernels add in another order each time
        distance = (torch.stack([one.local for one in kept]) - local).abs().sum(1)
        return torch.stack([one.shared for one in kept]).index_select(0, distance.argmin(0, keepdim=True))[0]

    def _alive(self) -> list["_Forward"]:
        return [forward for forward in (kept() for kept in self._kept) if forward is not None]


class _Forward:
    def __init__(self, local: Tensor, shared: Tensor):
        self.local, self.shared = local, shared


def possible() -> bool:
    """Whether checkpointing may be about, so that a layer needs its Recall. Always cheap."""
    return _saving_is_hooked() or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1


def _saving_is_hooked() -> bool:
    """Non-reentrant checkpointing hooks what is saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore


def _reentrant_checkpoint() -> Any | None:
    """The autograd node of the outermost reentrant checkpoint: torch's, or its kin in Megatron and DeepSpeed."""
    node, frame = None, sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_qualname.endswith("CheckpointFunction.forward"):
            node = frame.f_locals[code.co_varnames[0]]
        frame = frame.f_back
    return node
