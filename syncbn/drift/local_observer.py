"""What the batches of layers that do not synchronise were like: in the first forwards after each reading."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn import kernels
from syncbn.drift import observer
from syncbn.drift.observer import Held
from syncbn.drift.statistics import Running, add_up, unpack_moments
from syncbn.moments import Moments

# Forwards since the last reading that are kept of a layer, to be compared when it is read
_KEPT = 4


class LocalObserver:
    """Of a layer that does not synchronise: a hook that measures the first forwards after each reading.

    What the other ranks' batches were like is asked for when it is read, in one message for all such layers.
    """

    def __init__(self, layer: Any, per_image: bool):
        self._per_image, self.layer, self._channels = per_image, layer, layer.num_features
        self._filled = 0
        self._place(observer.device_of(layer))
        self._hook = layer.register_forward_pre_hook(self._measure)

    def _place(self, device: torch.device) -> None:
        self._rows = torch.zeros(_KEPT, 5 * self._channels + 2, dtype=torch.float64, device=device)

    def close(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _measure(self, layer: Any, inputs: Sequence[Tensor]) -> None:
        x = inputs[0]
        # An input that fits no layer is the layer's to refuse
        if not layer.training or x.dim() < 2 or x.size(1) != self._channels:
            return
        if observer.is_recorded(x):
            self._rows[0].copy_(self._row(x))
            return
        # Backward runs a checkpointed forward again
        if torch._C._current_graph_task_id() != -1:
            return
        if self._rows.device != x.device:
            self._place(x.device)
        if self._filled < _KEPT:
            self._rows[self._filled].copy_(self._row(x))
            self._filled += 1

    def _row(self, x: Tensor) -> Tensor:
        layer, local = self.layer, kernels.choose(x).moments(x.detach(), None, "row", self._per_image)
        between = local.between_images
        if between is None:
            between = local.packed.new_zeros(self._channels + 1)
        if layer.running_mean is None:
            mean, m2, count = local.packed.split([self._channels, self._channels, 1])
            return torch.cat([local.packed, between, mean, m2 / (count - 1).clamp(min=1)])
        return torch.cat([local.packed, between, layer.running_mean, layer.running_var])

    def messages(self) -> Tensor:
        """[K, 2C + 1]: the moments of each forward that was kept, as messages: added over ranks, the whole's."""
        count, mean, m2 = self._moments(self._rows)
        return torch.cat([count * mean, m2 + count * mean.square(), count], dim=1)

    def read(self, summed: Tensor) -> Tensor:
        """The packed Sums since the last reading. summed: what all ranks' messages add up to."""
        n, eps = self._channels, self.layer.eps
        total, squares, count = summed.split([n, n, 1], dim=1)
        of = torch.zeros(n, dtype=torch.int64, device=summed.device)
        whole, local = unpack_moments(count, of, total, squares, True), self._moments(self._rows)
        between, images, *running = self._rows[:, 2 * n + 1 :].split([n, 1, n, n], dim=1)
        # One scale for all ranks, whose running statistics differ
        scale = whole.count.sum() / (whole.m2.sum(0) + eps * whole.count.sum()).clamp(min=1e-300)
        sums = add_up(local, whole, between, images, local, Running(*running), scale, eps, of).packed()
        self.clear()
        return sums

    def held(self) -> Held:
        """Rows of the forwards since the last reading."""
        # One that repeats counts nothing
        rows = max(self._filled, int(self._rows[0].any()))
        return {"filled": self._filled, "rows": self._rows[:rows].to("cpu", copy=True)}

    def hold(self, held: Held) -> None:
        """Go on from what `held` said, on this device or another, where nothing is kept."""
        self._filled = held["filled"]
        self._rows[: len(held["rows"])].copy_(held["rows"])

    def clear(self) -> None:
        """Forget all that was seen since the last reading."""
        self._rows.zero_()
        self._filled = 0

    def _moments(self, rows: Tensor) -> Moments:
        mean, m2, count, _ = rows.split(
            [self._channels, self._channels, 1, rows.size(1) - 2 * self._channels - 1], dim=1
        )
        return Moments(count, mean, m2)
