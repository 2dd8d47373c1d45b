"""Optimiser steps that leave no trace if a loss or gradient is not finite, decided on the device without a wait."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

HIGHEST = 2.0**16  # loss scale to begin with, and a step at a time it is doubled after GROW good ones
GROW = 2000


class Guard:
    """Takes optimiser steps, but for bad ones: those leave weights, optimiser and buffers as they were.

    A step has one part or several, each with a loss of its own. A part is bad if the loss of some rank, or the
    gradient's norm, is inf or nan; a step, if a part is. `backward` makes a loss that is not finite a gradient that is
    not, and DDP adds up gradients: so all ranks agree, and send no message for it.

    Args:
        model: its buffers are put back after a bad step.
        optimizer: a fused one, which leaves out a step by itself, given a flag on the device.
        scaled: multiply losses before backward, for fp16: halved after each bad step, doubled after 2000 good ones
            (Micikevicius et al. 2018, arXiv:1710.03740).
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, scaled: bool = False):
        self.optimizer, self.scaled = optimizer, scaled
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_dtype = sorted(model.buffers(), key=lambda b: str(b.dtype))
        self.buffers = [list(group) for _, group in groupby(by_dtype, key=lambda b: b.dtype)]
        self.kept = [_flat(group) for group in self.buffers]
        device = self.parameters[0].device
        self.in_a_row = torch.zeros((), device=device)  # bad steps, up to now
        self.good = torch.zeros((), device=device)  # steps since the scale changed
        self.scale = torch.full((), HIGHEST if scaled else 1.0, device=device)

    def backward(self, loss: Tensor, times: float) -> None:
        """Add the gradient of times · loss; of a loss that is not finite, nan."""
        # 0 times nan or inf is nan
        loss.backward((loss.detach() * 0 + self.scale) * times)

    def step(self, clip_norm: float = 0.0, times: Tensor | None = None) -> Tensor:
        """Step the optimiser on the parameters that have a gradient, unless that is bad: whether it was, [] bool.

        clip_norm: largest norm of the gradient; 0: any. times: [], what the gradient is to be multiplied by; None: 1.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaled:
            torch._foreach_div_(gradients, self.scale)  # pyright: ignore[reportPrivateImportUsage]
        if times is not None:
            torch._foreach_mul_(gradients, times)  # pyright: ignore[reportPrivateImportUsage]
        norm = nn.utils.get_total_norm(gradients)
        if clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        bad = ~norm.isfinite()
        # As torch's GradScaler tells fused optimisers
        self.optimizer.found_inf, self.optimizer.grad_scale = bad.float(), None  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self._put_back(bad)
        return bad

    def count(self, bad: Tensor) -> None:
        """Take note of a step of all parts, of which one was bad or none: [] bool."""
        self.in_a_row.add_(1).mul_(bad)
        if self.scaled:
            self._rescale(bad)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "good": self.good, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, once the model has taken over its own."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])
        for kept, group in zip(self.kept, self.buffers, strict=True):
            kept.copy_(_flat(group))

    def _put_back(self, bad: Tensor) -> None:
        for kept, group in zip(self.kept, self.buffers, strict=True):
            torch.where(bad, kept, _flat(group), out=kept)
            pieces = kept.split([b.numel() for b in group])
            views = [piece.view_as(b) for piece, b in zip(pieces, group, strict=True)]
            torch._foreach_copy_(group, views)  # pyright: ignore[reportPrivateImportUsage]

    def _rescale(self, bad: Tensor) -> None:
        self.good.add_(1).mul_(~bad)
        grown = self.good >= GROW
        self.scale.mul_(torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0)))
        self.good.mul_(~grown)


@torch.no_grad()
def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
