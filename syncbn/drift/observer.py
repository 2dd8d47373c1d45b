"""What batches of SyncBatchNorms were like, kept on the device as they go by: nothing is sent, the host never waits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.drift.statistics import CHANNEL, LAYER, Layers, Running, add_up, unpack_moments
from syncbn.kernels import Form, Slot, unpacked
from syncbn.moments import Moments

# Forwards that are added up at a time, of all layers together, so that one costs a small copy and little more; and more
# of them where that takes few bytes, as adding up takes its time however little it is
_SLOTS, _MANY_SLOTS, _FEW_BYTES = 16, 128, 2**22
# What a layer keeps between readings, in tensors on the CPU
Held = dict[str, Any]


def stores(layers: Sequence[Any], per_image: bool) -> list["Store"]:
    """A Store for each device, of the layers on it."""
    by_device: dict[torch.device, list[Any]] = {}
    for layer in layers:
        by_device.setdefault(device_of(layer), []).append(layer)
    return [Store(of_device, per_image) for of_device in by_device.values()]


class Store:
    """Of all SyncBatchNorms on a device: what they saw, forward by forward, and the Sums of it."""

    def __init__(self, layers: Sequence[Any], per_image: bool):
        self.layers = Layers([layer.num_features for layer in layers])
        device = device_of(layers[0])
        channels = self.layers.channels
        width = sum(5 * n + 3 for n in channels)
        rows = min(max(_SLOTS, _FEW_BYTES // (8 * width)), _MANY_SLOTS)
        self._rows = torch.zeros(rows, width, dtype=torch.float64, device=device)
        # Apart, as a copy of two dtypes at once is a slow one
        self._running = torch.zeros(rows, 2 * sum(channels), dtype=_dtype_of_running(layers), device=device)
        self._of = self.layers.of.to(device)
        eps = torch.tensor([layer.eps for layer in layers], dtype=torch.float64)
        # Above 0, as a slot that was left empty has no variance
        self._eps = eps[self.layers.of].clamp(min=torch.finfo(eps.dtype).tiny).to(device)
        self._fields, self._of_running = (order.to(device) for order in _orders(channels))
        # On the device, as to send it there would be a wait
        self._is_message = torch.zeros(sum(channels), dtype=torch.bool, device=device)
        self._sums = torch.zeros(len(self.layers.of_all), dtype=torch.float64, device=device)
        slots = self._rows.split([5 * n + 3 for n in channels], dim=1)
        running = self._running.split([2 * n for n in channels], dim=1)
        forms = self._is_message.split(channels)
        of_each = zip(layers, slots, running, forms, strict=True)
        self.observers = [Observer(*one, per_image, self) for one in of_each]

    def settle(self) -> None:
        """Add up the forwards that are kept, and keep none."""
        filled = max(observer.filled for observer in self.observers)
        if not filled:
            return
        channels, layers = len(self._of), len(self.observers)
        fields = self._rows[:filled, self._fields].split([channels] * 5 + [layers] * 3, dim=1)
        first, second, mean, m2, between, count, whole_count, images = fields
        running = Running(*self._running[:filled, self._of_running].double().chunk(2, dim=1))
        local = unpack_moments(count, self._of, first, second, self._is_message)
        whole = Moments(whole_count, mean, m2)
        scale = 1 / (running.var + self._eps)
        sums = add_up(local, whole, between, images, whole, running, scale, self._eps, self._of)
        self._sums += sums.packed()
        self._rows[:filled] = 0
        # What is left of a forward that was not finite would spoil a slot that stays empty
        self._running[:filled] = 0
        for observer in self.observers:
            observer.filled = 0

    def read(self) -> list[tuple[Any, Tensor]]:
        """Each layer and its packed Sums since the last reading."""
        self.settle()
        own = [observer.sums for observer in self.observers]
        read = self.layers.apart(self._sums + self.layers.pack(own).to(self._sums.device))
        self._sums.zero_()
        torch._foreach_zero_(own)  # pyright: ignore[reportPrivateImportUsage]
        return [(observer.layer, sums) for observer, sums in zip(self.observers, read, strict=True)]

    def clear(self) -> None:
        """Forget all that was seen since the last reading."""
        # In its place, where a CUDA graph adds to it
        for kept in (self._rows, self._running, self._sums, *(observer.sums for observer in self.observers)):
            kept.zero_()
        for observer in self.observers:
            observer.filled = 0

    def held(self) -> Iterator[tuple[Any, Held]]:
        """Each layer and what it saw since the last reading: forwards as they are kept, and Sums of those before."""
        for observer, sums in zip(self.observers, self.layers.apart(self._sums.cpu()), strict=True):
            # Apart from those of forwards that repeat; of nothing, none
            both = torch.stack([sums, observer.sums.cpu()])
            rows = 2 if both[1].any() else 1 if both[0].any() else 0
            yield observer.layer, observer.held() | {"sums": both[:rows].clone()}

    def hold(self, held: Mapping[Any, Held]) -> None:
        """Go on from what `held` said, on this device or another, where nothing is kept."""
        sums = []
        for observer in self.observers:
            one = held[observer.layer]
            both = torch.zeros(2, len(observer.sums), dtype=torch.float64)
            both[: len(one["sums"])] = one["sums"]
            sums.append(both[0])
            observer.sums.copy_(both[1])
            observer.hold(one)
        self._sums.copy_(self.layers.pack(sums))


class Observer:
    """Of a SyncBatchNorm: it is told this rank's moments and the group's, and keeps them in the Store's slots.

    sums: of forwards that are compiled, or captured in a CUDA graph, which do the same each time and count nothing.
    """

    def __init__(self, layer: Any, slots: Tensor, running: Tensor, is_message: Tensor, per_image: bool, store: Store):
        self.per_image, self.filled, self._form = per_image, 0, "row"
        self.layer, self._store, self._channels = layer, store, layer.num_features
        self._slots, self._running, self._is_message = slots, running, is_message
        self._slot = [_apart(row, before, per_image) for row, before in zip(slots, running, strict=True)]
        self._running_in_c = running.dtype if slots.is_cpu else None
        self._place(slots.device)
        layer.observer = self

    def _place(self, device: torch.device) -> None:
        n = self._channels
        self.sums = torch.zeros(CHANNEL * n + LAYER, dtype=torch.float64, device=device)
        self._nothing = torch.zeros(n + 1, dtype=torch.float64, device=device)
        self._of = torch.zeros(n, dtype=torch.int64, device=device)

    def held(self) -> Held:
        """The slots that are filled, and how the moments in them are packed."""
        slots, running = (t[: self.filled].to("cpu", copy=True) for t in (self._slots, self._running))
        return {"form": self._form, "slots": slots, "running": running}

    def hold(self, held: Held) -> None:
        """Go on in the next slot."""
        self.filled = len(held["slots"])
        self._slots[: self.filled].copy_(held["slots"])
        self._running[: self.filled].copy_(held["running"])
        self._begin(held["form"])

    def _begin(self, form: str) -> None:
        self._form = form
        self._is_message.fill_(form == "message")

    def slot(self, form: Form) -> Slot | None:
        """The next one, for a forward on the CPU."""
        running = self.layer._buffers.get("running_mean")
        if running is None or running.dtype != self._running_in_c:
            return None
        self._make_room(form)
        return self._slot[self.filled]

    def observe(self, packed: Tensor, form: Form, between_images: Tensor | None, stats: Tensor) -> None:
        layer, between = self.layer, self._nothing if between_images is None else between_images
        mean, var = layer.running_mean, layer.running_var
        if mean is None:
            moments, _ = unpacked(stats)
            mean, var = moments.mean, moments.unbiased_var
        if is_recorded(packed):
            self._add(packed, form, between, stats, Running(mean, var))
            return
        if self._slots.device != packed.device:
            # The model was moved
            if self.sums.device != packed.device:
                self._place(packed.device)
            self._add(packed, form, between.to(packed.device), stats, Running(mean, var))
            return
        self._make_room(form)
        torch.cat((packed, stats.narrow(0, 0, packed.size(0)), between), out=self._slots[self.filled])
        torch.cat((mean, var), out=self._running[self.filled])
        self.filled += 1

    def _make_room(self, form: str) -> None:
        if form != self._form or self.filled == len(self._slots):
            self._store.settle()
            self._begin(form)

    def _add(self, packed: Tensor, form: str, between: Tensor, stats: Tensor, running: Running) -> None:
        n, eps, (moments, _) = self._channels, self.layer.eps, unpacked(stats)
        first, second, count = packed.unsqueeze(0).split([n, n, 1], dim=1)
        local = unpack_moments(count, self._of, first, second, form == "message")
        whole = Moments(moments.count.view(1, 1), moments.mean.unsqueeze(0), moments.m2.unsqueeze(0))
        between, images = between.unsqueeze(0).split([n, 1], dim=1)
        running = Running(*(t.double().unsqueeze(0) for t in running))
        scale = 1 / (running.var + eps)
        self.sums.add_(add_up(local, whole, between, images, whole, running, scale, eps, self._of).packed())

    def close(self) -> None:
        if vars(self.layer).get("observer") is self:
            del self.layer.observer


def _apart(row: Tensor, before: Tensor, per_image: bool) -> Slot:
    packed, whole, between = row.tensor_split([2 * (n := before.size(0) // 2) + 1, 4 * n + 2])
    places = between.data_ptr() if per_image else 0, whole.data_ptr(), before.data_ptr()
    return Slot(packed, between if per_image else None, (packed.data_ptr(), *places))


def _orders(channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where in the rows of all layers the five fields of channels are, and then the three of layers; and in the running
    statistics all means, and then all variances."""
    rows = torch.arange(sum(5 * n + 3 for n in channels)).split([5 * n + 3 for n in channels])
    of_each = [row.split([n, n, 1, n, n, 1, n, 1]) for n, row in zip(channels, rows, strict=True)]
    running = [both.chunk(2) for both in torch.arange(2 * sum(channels)).split([2 * n for n in channels])]
    return (
        torch.cat([fields[which] for which in (0, 1, 3, 4, 6, 2, 5, 7) for fields in of_each]),
        torch.cat([both[which] for which in (0, 1) for both in running]),
    )


def _dtype_of_running(layers: Sequence[Any]) -> torch.dtype:
    dtypes = {torch.float64 if layer.running_var is None else layer.running_var.dtype for layer in layers}
    return dtypes.pop() if len(dtypes) == 1 else torch.float64


def is_recorded(x: Tensor) -> bool:
    """Whether this is compiled or captured to be run again: then it must do the same each time."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def device_of(layer: nn.Module) -> torch.device:
    held = next((t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))), None)
    return torch.device("cpu") if held is None else held.device
