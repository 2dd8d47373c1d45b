"""An average of a model over its steps, to evaluate in its place."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """The exponential average of a model's weights and buffers; whole numbers among them are copied.

    average = decay · average + (1 - decay) · model after each step; after the first, the model as it is then. State as
    torch's AveragedModel has it, whose update asks a counter on the host and sends it to the device: nothing that a
    CUDA graph can hold. Here the host waits in the first update alone.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay, self.begun = deepcopy(model), decay, False
        device = next(model.parameters()).device
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's weights and buffers into the average."""
        self.begun = self.begun or bool(self.n_averaged > 0)  # it may have been loaded
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        moving = [pair for pair in pairs if self.begun and pair[0].is_floating_point()]
        if moving:
            averages, values = zip(*moving, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, value in pairs:
            if not (self.begun and average.is_floating_point()):
                average.copy_(value)
        self.n_averaged += 1
        self.begun = True


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
