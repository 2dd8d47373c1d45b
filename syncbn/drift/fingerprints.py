"""Whether ranks hold the same running statistics, by a number for each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Fingerprints:
    """Marks of layers' running statistics: equal on two ranks if and, but for a miracle, only if their bits are."""

    def __init__(self, layers: Sequence[Any]):
        self._layers = layers
        lengths = [0 if b is None else b.numel() * b.element_size() // 4 for b in self._buffers()]
        self._of = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        # Odd factors, which lose no bit, and another for each place
        places = [torch.arange(n) for n in lengths]
        self._factors = (2 * torch.cat(places) + 3) * 0x9E3779B97F4A7C1

    def _buffers(self) -> list[Tensor | None]:
        return [b for layer in self._layers for b in (layer.running_mean, layer.running_var)]

    def take(self, device: torch.device) -> Tensor:
        """[L, 2] int64, of running_mean and running_var; 0 where there is none."""
        bits = [b.detach().reshape(-1).view(torch.int32).to(device) for b in self._buffers() if b is not None]
        marks = torch.zeros(2 * len(self._layers), dtype=torch.int64, device=device)
        if bits:
            marks.index_add_(0, self._of.to(device), torch.cat(bits).long() * self._factors.to(device))
        return marks.view(-1, 2)
