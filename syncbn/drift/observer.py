"""What a layer's batches were like, kept on the device as they go by: nothing is sent, and the host never waits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import kernels
from syncbn.drift.statistics import CHANNEL, LAYER, Running, add_up
from syncbn.kernels import Form
from syncbn.moments import Moments

# Forwards that are added up at a time: so a forward costs one small copy, and the arithmetic a sixteenth
_SLOTS = 16
# Forwards since the last reading that are kept of a layer that does not synchronise, to be compared when it is read
_KEPT = 8


class Observer:
    """Of a SyncBatchNorm: it is told this rank's moments and the group's, and adds them up to Sums."""

    def __init__(self, layer: Any, per_image: bool):
        self.per_image = per_image
        self._layer, self._channels = layer, layer.num_features
        self._filled, self._form = 0, "row"
        self._place(_device(layer))
        layer.observer = self

    def _place(self, device: torch.device) -> None:
        self._rows = torch.zeros(_SLOTS, 7 * self._channels + 3, dtype=torch.float64, device=device)
        self._sums = torch.zeros(CHANNEL * self._channels + LAYER, dtype=torch.float64, device=device)

    def observe(self, packed: Tensor, form: Form, between_images: Tensor | None, moments: Moments) -> None:
        layer, between = self._layer, between_images
        if between is None:
            between = packed.new_zeros(self._channels + 1)
        mean, var = layer.running_mean, layer.running_var
        if mean is None:
            mean, var = moments.mean, moments.unbiased_var
        parts = (packed, moments.mean, moments.m2, moments.count.view(1), between, mean, var)
        if _is_recorded(packed):
            self._sums.add_(self._added(torch.cat(parts).unsqueeze(0), form))
            return
        if self._sums.device != packed.device:
            self._place(packed.device)
            self._filled = 0
        if form != self._form or self._filled == _SLOTS:
            self._settle()
            self._form = form
        torch.cat(parts, out=self._rows[self._filled])
        self._filled += 1

    def close(self) -> None:
        if vars(self._layer).get("observer") is self:
            del self._layer.observer

    def read(self) -> Tensor:
        """The packed Sums since the last reading, on the layer's device."""
        self._settle()
        sums = self._sums.clone()
        self._sums.zero_()
        return sums

    def _settle(self) -> None:
        if self._filled:
            self._sums += self._added(self._rows[: self._filled], self._form)
            self._filled = 0

    def _added(self, rows: Tensor, form: str) -> Tensor:
        n = self._channels
        packed, mean, m2, count, between, images, *running = rows.split([2 * n + 1, n, n, 1, n, 1, n, n], dim=1)
        whole, eps = Moments(count, mean, m2), self._layer.eps
        scale = 1 / (running[1] + eps)
        return add_up(_moments(packed, form), whole, between, images, whole, Running(*running), scale, eps).packed()


class LocalObserver:
    """Of a layer that does not synchronise: a hook that measures the first forwards after each reading.

    What the other ranks' batches were like is asked for when it is read, in one message for all such layers.
    """

    def __init__(self, layer: Any, per_image: bool):
        self._per_image, self._layer, self._channels = per_image, layer, layer.num_features
        self._filled = 0
        self._place(_device(layer))
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
        if _is_recorded(x):
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
        layer, local = self._layer, kernels.choose(x).moments(x.detach(), None, "row", self._per_image)
        between = local.between_images
        if between is None:
            between = local.packed.new_zeros(self._channels + 1)
        if layer.running_mean is None:
            mean, m2, count = local.packed.split([self._channels, self._channels, 1])
            return torch.cat([local.packed, between, mean, m2 / (count - 1).clamp(min=1)])
        return torch.cat([local.packed, between, layer.running_mean, layer.running_var])

    def messages(self) -> Tensor:
        """[K, 2C + 1]: the moments of each forward that was kept, as messages: added over ranks, the whole's."""
        count, mean, m2 = self._moments()
        return torch.cat([count * mean, m2 + count * mean.square(), count], dim=1)

    def compare_with(self, summed: Tensor) -> None:
        """summed: what all ranks' messages add up to; to be told before each reading."""
        self._whole = _moments(summed, "message")

    def read(self) -> Tensor:
        """The packed Sums since the last reading, on the layer's device."""
        n = self._channels
        whole, local = self._whole, self._moments()
        between, images, *running = self._rows[:, 2 * n + 1 :].split([n, 1, n, n], dim=1)
        # One scale for all ranks, whose running statistics differ
        scale = whole.count.sum() / (whole.m2.sum(0) + self._layer.eps * whole.count.sum()).clamp(min=1e-300)
        sums = add_up(local, whole, between, images, local, Running(*running), scale, self._layer.eps).packed()
        self._rows.zero_()
        self._filled = 0
        return sums

    def _moments(self) -> Moments:
        return _moments(self._rows[:, : 2 * self._channels + 1], "row")


def _moments(packed: Tensor, form: str) -> Moments:
    """Moments of each of K packed ones, [K, 2C + 1]: count [K, 1], mean and m2 [K, C]."""
    count, (first, second) = packed[:, -1:], packed[:, :-1].chunk(2, dim=1)
    if form == "row":
        return Moments(count, first, second)
    mean = first / count.clamp(min=1)
    return Moments(count, mean, (second - first * mean).clamp(min=0))


def _is_recorded(x: Tensor) -> bool:
    """Whether this is compiled or captured to be run again: then it must do the same each time."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _device(layer: nn.Module) -> torch.device:
    held = next((t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))), None)
    return torch.device("cpu") if held is None else held.device


def observed(model: nn.Module) -> dict[str, Any]:
    """The batch norm layers of a model by name, synchronised or not."""
    return {
        name or type(layer).__name__: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)
    }


def prints(layer: Any) -> Tensor:
    """[2] int64, of running_mean and running_var: equal on two ranks if and, but for a miracle, only if they are."""
    return torch.stack([_print(layer.running_mean, layer), _print(layer.running_var, layer)])


def _print(buffer: Tensor | None, layer: nn.Module) -> Tensor:
    if buffer is None:
        return torch.zeros((), dtype=torch.int64, device=_device(layer))
    bits = buffer.detach().contiguous().view(torch.int64 if buffer.dtype == torch.float64 else torch.int32).long()
    # Odd factors, which lose no bit, and another for each place
    places = 2 * torch.arange(1, bits.numel() + 1, device=bits.device) + 1
    return (bits * places * 0x9E3779B97F4A7C1).sum()
