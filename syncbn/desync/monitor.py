"""Notice when ranks run different layers: a fingerprint in each message, and a log to name them."""

import atexit
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import collectives
from syncbn.collectives import Direction, ProcessGroup
from syncbn.desync.journal import LOG, Journal, Stream, Streams, camps, compare, listed, name_of
from syncbn.desync.watchdog import Watchdog
from syncbn.module import SyncBatchNorm


class DesyncError(RuntimeError):
    """Ranks of one group ran different SyncBatchNorm layers, or a different number of them."""


class DesyncMonitor:
    """Name the rank and the layer when ranks run different SyncBatchNorm layers, or when one never comes.

    Every message carries the number f of its layer and direction as [f, f²]. Of W ranks that sum to [s1, s2], all ran
    the layer that this one ran if and only if s2 - 2 f s1 + W f² = Σ(f_i - f)² is 0: exact in float64, added up on the
    device, and read by `check`. Layers of different C make messages of different lengths, and no monitor survives that:
    gloo ends a process, NCCL hangs, which the watchdog tells, or goes on; out of shared memory all learn the lengths.

    The watchdog, a thread, tells when this rank has made no progress for patience_s, no message and no call of `alive`,
    while another rank is at an earlier step or not at its group's last message, or has fallen silent (stopped, killed,
    its machine gone), or when the process group's store, through which ranks hear of each other, is silent itself. So a
    pause that all ranks make, however long, is none. On CUDA the host runs ahead: the message that it names is the last
    one enqueued. Compiled layers carry fingerprints, but keep no log: of them, as of a model that has no SyncBatchNorm,
    the watchdog knows by `alive` alone, and without that only who is silent.

        with DesyncMonitor(model) as monitor:
            for step, batch in enumerate(batches):
                monitor.alive(step)

    Without a process group nothing is watched. The state is this process's: no state_dict, copy or pickle has it.

    Args:
        model: holds the layers to watch, if there are any, on their devices already.
        patience_s: seconds without progress, > 0, until the watchdog reports. Let it exceed what one rank alone may
            take between messages (a checkpoint written by rank 0), and be below the process group's timeout.
        report: what to do with the watchdog's text, once a stall, on a thread; None logs it as an error of "syncbn".
        fingerprints: mark messages. Without, they stay as they are, and `check` sees no more than uneven numbers.

    Raises:
        DesyncError: the ranks' models hold different layers.
        ValueError: patience_s is not positive; a layer is watched already.

    Collective: every rank opens it and closes it between the same two steps, as messages are 2 float64 longer while
    it is open (without fingerprints, as long as ever).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        patience_s: float = 60.0,
        report: Callable[[str], Any] | None = None,
        fingerprints: bool = True,
    ) -> None:
        if patience_s <= 0:
            raise ValueError(f"patience_s is {patience_s}: it must be positive")
        layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm))
        self._layers = {name or type(layer).__name__: layer for name, layer in layers}
        self._names = list(self._layers)
        self._journal = Journal()
        key = _agree(self._layers)
        _form_groups(self._layers.values())
        self._watchdog = None
        everyone = collectives.everyone()
        if everyone is not None and everyone.size() > 1:
            report = report or logging.getLogger("syncbn").error
            self._watchdog = Watchdog(self._names, self._journal, patience_s, report, everyone, key)
            # At exit no thread must be inside the store
            atexit.register(self.close)
        self._witnesses = [
            Witness(n, layer, self._journal, fingerprints) for n, layer in enumerate(self._layers.values())
        ]
        for layer, witness in zip(self._layers.values(), self._witnesses, strict=True):
            layer.witness = witness

    def alive(self, step: int | None = None) -> None:
        """Tell the watchdog that this rank gets on. It sets a number: it waits for nothing, and sends nothing.

        Args:
            step: grows in the same way on every rank, so that a rank at an earlier one is late: the step of training,
                told after its batch has come, before its first collective. None in what ranks may do unlike many times,
                as evaluation: it counts as progress, but nobody is late by it.
        """
        self._journal.alive(step)

    @property
    def stall(self) -> str | None:
        """What the watchdog reported of the stall that this rank is in; None without one, or without a cause.

        For whoever catches what a collective raised, to say why.
        """
        return None if self._watchdog is None else self._watchdog.stall

    def check(self) -> None:
        """Raise DesyncError on every rank if ranks of a group ran different layers since the last check.

        For log time: it waits for the device. Either way the next check starts from here.

        Raises:
            DesyncError: names the first message in which layers differed, which layer each rank ran, forward or
                backward; where there is no log (compiled layers, or a message too long ago), the layers involved.

        Collective: two small all_gathers over the default process group, never over the operator's own; every rank
        must call it, at the same point.
        """
        everyone = collectives.everyone()
        streams = {ranks: (m.at[0] - m.checked, list(m.log)) for ranks, m in self._journal.by_ranks.items()}
        wrong = {n: off for n, witness in enumerate(self._witnesses) if (off := float(witness.wrong)) != 0}
        counts = {ranks: count for ranks, (count, _) in streams.items()}
        reports = collectives.gather_objects((counts, bool(wrong)), everyone)
        self._journal.clear()
        for witness in self._witnesses:
            witness.wrong.zero_()
        groups = {ranks for counts, _ in reports for ranks in counts}
        uneven = any(len({reports[rank][0].get(ranks, 0) for rank in ranks}) > 1 for ranks in groups)
        if uneven or any(off for _, off in reports):
            evidence = collectives.gather_objects((streams, wrong), everyone)
            raise DesyncError(_verdict([s for s, _ in evidence], [w for _, w in evidence], self._names))

    def close(self) -> None:
        """Watch no more: stop the thread and leave the layers as they were."""
        atexit.unregister(self.close)
        if self._watchdog is not None:
            self._watchdog.stop()
        for layer, witness in zip(self._layers.values(), self._witnesses, strict=True):
            if vars(layer).get("witness") is witness:
                del layer.witness

    def __enter__(self) -> "DesyncMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _agree(layers: dict[str, SyncBatchNorm]) -> str:
    """A key that is the same on every rank and was never used, if all hold the same layers."""
    mine = [f"{name} of {layer.num_features} channels" for name, layer in layers.items()]
    watched = [name for name, layer in layers.items() if "witness" in vars(layer)]
    reports = collectives.gather_objects((uuid.uuid4().hex, mine, watched), collectives.everyone())
    for n in range(max(len(theirs) for _, theirs, _ in reports)):
        held = camps((rank, theirs[n] if n < len(theirs) else "none") for rank, (_, theirs, _) in enumerate(reports))
        if len(held) > 1:
            raise DesyncError(f"the ranks' models differ in layer {n + 1}: {compare(held, 'registered')}")
    for rank, (_, _, theirs) in enumerate(reports):
        if theirs:
            raise ValueError(f"{theirs[0]} is watched already on rank {rank}: close its monitor first")
    return reports[0][0]


def _form_groups(layers: Iterable[SyncBatchNorm]) -> None:
    """Here and now, in one order, as layers out of order would mistake each other's agreement for a message."""
    for layer in layers:
        # {"samples": n} has to see a batch first
        if not isinstance(layer.group, Mapping):
            layer.process_group()


class Witness:
    """Marks one layer's messages with its code, 2n forward and 2n + 1 backward, and adds up what else came along."""

    def __init__(self, n: int, layer: nn.Module, journal: Journal, fingerprints: bool):
        self._journal, self.marks = journal, fingerprints
        self._codes: dict[Direction, int] = {"forward": 2 * n, "backward": 2 * n + 1}
        held = next((t for t in (*layer.parameters(), *layer.buffers())), None)
        self._place(torch.device("cpu") if held is None else held.device, 0.0)

    def _place(self, device: torch.device, wrong: float) -> None:
        def on_device(*row: float) -> Tensor:
            return torch.tensor(row, dtype=torch.float64, device=device)

        self.wrong = on_device(wrong)
        self._stamps = {direction: on_device(f, f * f) for direction, f in self._codes.items()}
        self._weights = {direction: on_device(-2 * f, 1) for direction, f in self._codes.items()}

    def stamp(self, direction: Direction, group: ProcessGroup, device: torch.device) -> Tensor | None:
        if not torch.compiler.is_compiling():
            self._journal.add(group, self._codes[direction])
            if self.wrong.device != device:
                self._place(device, float(self.wrong))
        return self._stamps[direction] if self.marks else None

    def received(self, direction: Direction, stamps: Tensor | None, size: int) -> None:
        if not torch.compiler.is_compiling():
            self._journal.in_flight = False
        if stamps is not None:
            self.wrong.add_(stamps.dot(self._weights[direction]) + size * self._codes[direction] ** 2)


def _verdict(streams: Sequence[Streams], wrong: Sequence[dict[int, float]], names: Sequence[str]) -> str:
    """What check has to say, from each rank's messages and from the layers whose fingerprints did not fit."""
    mend = "From there on statistics and gradients are mixed up: make every rank run the same layers in the same order"
    for ranks in sorted({ranks for of_rank in streams for ranks in of_rank}):
        difference = _first_difference({rank: streams[rank].get(ranks, (0, [])) for rank in ranks})
        if difference is not None:
            n, codes = difference
            ran = compare({name_of(code, names): camp for code, camp in codes.items()}, "ran")
            group = "" if len(ranks) == len(streams) else f" of {listed(ranks)}"
            return f"message {n} since the last check{group}: {ran}. {mend}"
    layers = ", ".join(names[n] for n in sorted({n for of_rank in wrong for n in of_rank}))
    off = [sum(of_rank.values()) for of_rank in wrong]
    furthest = listed([rank for rank, total in enumerate(off) if total == max(off)])
    return (
        f"messages of {layers} met those of other layers since the last check, furthest astray on {furthest}. Their "
        f"order is not known: compiled layers keep no log, others one of {LOG} messages. {mend}"
    )


def _first_difference(streams: dict[int, Stream]) -> tuple[int, dict[int, list[int]]] | None:
    """The number of the first message, from 1, in which ranks differ, and who ran what; -1 stands for nothing."""
    for n in range(max(count - len(log) for count, log in streams.values()), max(c for c, _ in streams.values())):
        ran = camps((rank, log[n - (count - len(log))] if n < count else -1) for rank, (count, log) in streams.items())
        if len(ran) > 1:
            return n + 1, ran
    return None
