"""The last readings, as far as they must be kept to be judged together."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.drift.statistics import Layers, Offsets, Sums

# Readings of which one may be out of the ordinary
ENOUGH = 3


class _Window(NamedTuple):
    """Packed Offsets of this rank and Sums of all, since the reading before; of these, figures of layers, [L] each."""

    mine: Tensor
    whole: Tensor
    figures: dict[str, Tensor]


class Windows:
    """The newest `horizon` readings."""

    def __init__(self, layers: Layers, horizon: int):
        self._layers = layers
        self._kept: deque[_Window] = deque(maxlen=horizon)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, mine: Tensor, whole: Tensor, figures: dict[str, Tensor]) -> None:
        """mine, whole: packed Sums of this rank and of all. figures: of all, [L] each."""
        offsets = torch.cat(Offsets.of(self._layers.unpack(mine)))
        self._kept.append(_Window(offsets, whole, figures))

    def together(self) -> tuple[Offsets, Sums]:
        """This rank's, and those of all."""
        mine, whole, _ = self._stacked()
        return self._layers.unpack_offsets(mine.sum(0)), self._layers.unpack(whole.sum(0))

    def calm(self) -> tuple[Offsets, Sums]:
        """The same without that reading in which a layer's ranks differ most; of less than three, nothing but 0."""
        mine, whole, _ = self._stacked()
        sums = [self._layers.unpack(one) for one in whole]
        between_ranks = torch.stack([self._layers.total(s.between_ranks) / s.rank_freedom for s in sums]).nan_to_num(0)
        kept = torch.full_like(between_ranks, float(len(sums) >= ENOUGH))
        kept = kept.scatter_(0, between_ranks.argmax(0, keepdim=True), 0.0)
        mine, whole = mine * kept[:, self._layers.of_offsets], whole * kept[:, self._layers.of_all]
        return self._layers.unpack_offsets(mine.sum(0)), self._layers.unpack(whole.sum(0))

    def typical(self) -> dict[str, Tensor]:
        """The median of the readings' own figures."""
        return {name: values.nanmedian(0).values for name, values in self._stacked()[2].items()}

    def state(self) -> tuple[dict[str, Any], Tensor]:
        """What is the same on every rank, and what is this rank's."""
        mine, whole, figures = self._stacked()
        return {"whole": whole, "figures": figures}, mine

    def load(self, shared: dict[str, Any], mine: Tensor) -> None:
        for n in range(len(mine)):
            figures = {name: values[n] for name, values in shared["figures"].items()}
            self._kept.append(_Window(mine[n], shared["whole"][n], figures))

    def clear(self) -> None:
        self._kept.clear()

    def _stacked(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """All of it, [H, n] each."""
        if not self._kept:
            nothing = torch.zeros(0, dtype=torch.float64)
            return nothing, nothing, {}
        mine, whole, figures = zip(*self._kept, strict=True)
        return torch.stack(mine), torch.stack(whole), {k: torch.stack([f[k] for f in figures]) for k in figures[0]}
