"""Collect from all ranks, at log time, what layers saw, and judge it."""

import logging
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import collectives
from syncbn.drift import compatibility, verdicts
from syncbn.drift.compatibility import Level, observed
from syncbn.drift.figures import Traits, apart, chance, figures, sizes
from syncbn.drift.fingerprints import Fingerprints
from syncbn.drift.local_observer import LocalObserver
from syncbn.drift.observer import stores
from syncbn.drift.statistics import Layers, Sums
from syncbn.drift.verdicts import Evidence, Reading, Verdict
from syncbn.drift.windows import ENOUGH, Windows
from syncbn.module import SyncBatchNorm

log = logging.getLogger("syncbn")


class DriftMonitor:
    """Measure how far apart the ranks' statistics are, layer by layer, and say so if it is more than chance.

        monitor = DriftMonitor(model)
        for step, batch in enumerate(batches, start=1):
            ...                                    # forward, backward, optimiser, as ever
            if step % 10 == 0:
                reading = monitor.read()           # on every rank
                print([verdict.text for verdict in reading.verdicts] or "ok")

    A rank knows its own moments and, by the message that SyncBatchNorm sends anyway, those of the whole batch. What is
    left to be told is a sum over ranks, which may as well be added up over steps first, on the device. So messages do
    not grow, no step has one more, and the host waits in `read` alone. A layer that does not synchronise (nn.BatchNorm)
    is watched in the first 4 forwards after each reading; what comes after such a layer it has levelled, so that ranks
    are best compared in the first layers of a model that does not synchronise.

    Figures of a layer, over the last `horizon` readings:
        f, icc: F = MSB / MSI between ranks and between their images, and the intraclass correlation; 1 and 0 by chance.
            With level "image", of layers whose first dimension is that of the batch, and two images on some rank.
        n_eff: independent values per channel that the batch is worth which it normalises by; the variance of such a
            batch is on average (1 - 1 / n_eff) of the true one. n_eff_synced: what it would be if it synchronised.
        dmean_z, dlogvar_z: how far mean and ln variance of batches lie from the running ones, as multiples of chance
            (root mean square over channels). lag, lag_logvar: how far on average, in standard deviations and in nats.
        kl: mean KL of the ranks' Gaussians from the whole batch's, in nats; of small batches mostly noise.
        dead, eps_dominated: channels that are constant; whose variance is below eps.
        conditioning: the largest |mean| / sqrt(var + eps) of a channel.

    Verdicts hold for the number of layers, channels and ranks (Bonferroni). But for diverged buffers, a matter of bits,
    they come from the third reading on, and the one reading that speaks most for a verdict does not count.

    Args:
        model: holds the layers to watch, converted already. If there are none, it says so, and reads nothing.
        level: "rank", or "image", which also measures what differs between images: on a CPU one more pass over x.
        alpha: the chance of a false alarm that is taken at each reading.
        horizon: readings that are judged together, 3 or more.

    Raises:
        ValueError: level, alpha or horizon is none of these; a layer is observed already, or has no channels yet; the
            ranks' models or levels differ (the same on every rank).

    Collective: every rank opens it, and reads it at the same steps. Opening sends a small message. Reading sends, over
    the default process group, 11 C + 9 float64 for each layer in one all_reduce, and 6 in one all_gather; for layers
    that do not synchronise, 4 (2 C + 1) in one all_reduce more.

    Source: docs/math.md, "Drift".
    """

    def __init__(self, model: nn.Module, *, level: Level = "image", alpha: float = 1e-3, horizon: int = 10):
        compatibility.check_options(level, alpha, horizon)
        self._modules, self._everyone = observed(model), collectives.everyone()
        self._level: Level = level
        self._alpha = alpha
        self._ranks = 1 if self._everyone is None else self._everyone.size()
        compatibility.agree_on_layers(self._modules, level, self._everyone)
        layers = list(self._modules.values())
        self._stores = stores([layer for layer in layers if isinstance(layer, SyncBatchNorm)], level == "image")
        self._local = [LocalObserver(one, level == "image") for one in layers if not isinstance(one, SyncBatchNorm)]
        if not layers:
            self._say(f"{type(model).__name__} has no batch norm layer: there is no drift to measure")
            return
        self._layers, self._fingerprints = Layers([layer.num_features for layer in layers]), Fingerprints(layers)
        self._windows = Windows(self._layers, horizon)
        self._hidden: set[str] = set()
        self._said: set[str] = set()
        self._began = self._tracked().cpu()
        self._batches = torch.zeros_like(self._began)

    def read(self) -> Reading:
        """The figures and verdicts of now. It waits for the device, once. Collective: see DriftMonitor."""
        if not self._modules:
            return Reading({}, {}, [])
        mine, batches, marks = self._collect()
        summed = collectives.sum_rows(torch.cat([mine, batches]), self._everyone)
        whole, batches = summed.split([len(mine), len(batches)])
        self._batches = batches / self._ranks
        layers = self._layers
        broken = torch.zeros(len(layers.channels)).index_add_(0, layers.of_all, (~whole.isfinite()).float()) > 0
        mine, whole = (t.masked_fill(broken[layers.of_all], 0.0) for t in (mine, whole))
        sums = self._seen(layers.unpack(whole))
        self._windows.add(mine, whole, self._warm(sizes(sums, layers, self._traits())))
        return self._judge(marks)

    def state_dict(self) -> dict[str, Any]:
        """All that a monitor must be given to read on as this one would, bit for bit; it goes on undisturbed.

        {"shared": what is the same on every rank, "own": what is this rank's}, tensors on the CPU in plain containers,
        as torch.load(weights_only=True) takes them. C channels in L layers, after H <= horizon readings, take
        H (88 C + 88 L) bytes in "shared" and H (8 C + 24 L) in "own", and some bytes for each layer. Forwards since the
        last reading are more in "own": 48 C + 24 L for each of the last, up to 16, or 128 where that is less than 4 MiB
        (56 C where running statistics are float64), and 88 C + 64 L for all before (as much again if some are
        compiled); of layers that do not synchronise 40 C + 16 L for each of up to 4. So the end of a reading is the
        time to ask for it: then there are none.

        It waits for the device, and is no collective: "shared" of any one rank goes with "own" of each.
        """
        shared = {"layers": compatibility.channels(self._modules), "level": self._level}
        if not self._modules:
            return {"shared": shared, "own": None}
        windows, mine = self._windows.state()
        shared |= windows | {
            "ranks": self._ranks,
            "began": self._began.clone(),
            "hidden": sorted(self._hidden),
            "said": sorted(self._said),
        }
        held = dict(pair for store in self._stores for pair in store.held())
        held |= {one.layer: one.held() for one in self._local}
        own = {"windows": mine, "layers": [held[layer] for layer in self._modules.values()]}
        return {"shared": shared, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on where the monitor of a state_dict was, with a model whose buffers are those of then.

        Of more readings than this horizon, the newest count. "own" is what this rank had; None, on every rank, if there
        are now more ranks or fewer: then ranks are compared afresh, and only how long layers have trained is known.

        Raises:
            ValueError: layers or level are not this model's and monitor's, or "own" is of another number of ranks.

        Not a collective, but every rank loads, at the same step.
        """
        shared, own = state["shared"], state["own"]
        compatibility.check_state(shared, self._modules, self._level, self._ranks if own is not None else None)
        if not self._modules:
            return
        began = shared.get("began", torch.zeros_like(self._began))  # older states have none
        self._began, self._hidden = began.clone(), set(shared["hidden"])
        self._windows.clear()
        self._said = set() if own is None else set(shared["said"])
        for one in (*self._stores, *self._local):
            one.clear()
        if own is None:
            return
        self._windows.load(shared, own["windows"])
        held = dict(zip(self._modules.values(), own["layers"], strict=True))
        for store in self._stores:
            store.hold(held)
        for one in self._local:
            one.hold(held[one.layer])

    def close(self) -> None:
        """Observe no more."""
        for observer in (*self._local, *(observer for store in self._stores for observer in store.observers)):
            observer.close()

    def __enter__(self) -> "DriftMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's packed Sums, the batches [L] that moved its running statistics while they were watched, and marks
        [L, 2] int64 of them; on the CPU, by one copy."""
        read = dict(pair for store in self._stores for pair in store.read())
        if self._local:
            messages = [one.messages() for one in self._local]
            together = collectives.sum_rows(torch.cat([m.flatten() for m in messages]), self._everyone)
            summed = together.split([m.numel() for m in messages])
            read |= {one.layer: one.read(s.view_as(m)) for one, s, m in zip(self._local, summed, messages, strict=True)}
        sums = self._layers.pack([read[layer] for layer in self._modules.values()])
        marks = self._fingerprints.take(sums.device)
        parts = [sums, self._tracked(sums.device), marks.flatten().view(torch.float64)]
        sums, tracked, marks = torch.cat(parts).cpu().split([len(part) for part in parts])
        return sums, tracked - self._began, marks.view(torch.int64).view(-1, 2)

    def _tracked(self, device: torch.device | None = None) -> Tensor:
        """[L] float64: the batches that have moved each layer's running statistics; 0 where there are none."""
        counts = [m.num_batches_tracked for m in self._modules.values()]
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        return torch.stack([nothing if count is None else count.to(nothing.device) for count in counts]).double()

    def _judge(self, marks: Tensor) -> Reading:
        layers, traits = self._layers, self._traits()
        mine, whole = self._windows.together()
        whole = self._seen(whole)
        by_figure = figures(whole, layers, traits, self._ranks, len(self._windows))
        calm_mine, calm_whole = self._windows.calm()
        likely = chance(calm_mine, self._seen(calm_whole), layers)
        # What is tested: F of each layer, and the offset of each rank there
        tests = math.log(2 * len(layers.channels))
        offset_chance = likely.offset + tests + math.log(self._ranks)
        row = torch.stack([*apart(mine, whole, layers), offset_chance, self._groups(whole)])
        row = torch.cat([row, marks.T.contiguous().view(torch.float64)])
        rows = collectives.gather_rows(row.flatten(), self._everyone).view(-1, 6, len(layers.channels))
        z, offsets, offset_chance, groups = rows[:, :4].unbind(1)
        evidence = [
            Evidence(*one)
            for one in zip(
                self._modules,
                _by_layer(by_figure),
                _by_layer(self._windows.typical()),
                traits.synced.tolist(),
                (likely.between_ranks + tests).tolist(),
                offset_chance.T.tolist(),
                offsets.T.tolist(),
                [m.momentum for m in self._modules.values()],
                self._batches.tolist(),
                strict=True,
            )
        ]
        wrong = self._diverged(rows[:, 4:].contiguous().view(torch.int64), groups)
        if len(self._windows) >= ENOUGH:
            wrong.append(verdicts.shards_differ(evidence, self._alpha))
            wrong.append(verdicts.running_statistics_lag(evidence, "running statistics lag" in self._said))
            wrong.append(verdicts.batch_too_small(evidence, "batch too small" in self._said))
        self._said = {one.kind for one in wrong if one}
        by_layer = {one.layer: dict(one.figures) for one in evidence}
        return Reading(by_layer, dict(zip(self._modules, z.T.tolist(), strict=True)), [one for one in wrong if one])

    def _seen(self, sums: Sums) -> Sums:
        """sums, without what images say in layers whose first dimension is not that of the batch."""
        if self._level == "rank":
            return sums
        images = (sums.images / sums.forwards).round(decimals=6).nan_to_num(0)
        # Of two numbers that are as frequent, that of the earlier layers
        usual = Counter(images[images > 0].tolist()).most_common(1)
        hidden = (images > 0) & (images != (usual[0][0] if usual else 0.0))
        for name in [name for name, off in zip(self._modules, hidden.tolist(), strict=True) if off]:
            if name not in self._hidden:
                self._hidden.add(name)
                self._say(
                    f"{name} does not see the batch's images as other layers do (a reshape?): f and icc need them, so "
                    "it is judged by what differs between ranks alone"
                )
        if not hidden.any():
            return sums
        of_channel = hidden[self._layers.of]
        return sums._replace(
            between_images=sums.between_images.masked_fill(of_channel, 0.0),
            image_freedom=sums.image_freedom.masked_fill(hidden, 0.0),
        )

    def _warm(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """figures, without a lag while running statistics may still be on their way from where they began."""
        cold = self._batches <= (3 / self._traits().momentum).clamp(max=_WARM)
        return figures | {name: figures[name].masked_fill(cold, torch.nan) for name in ("lag", "lag_logvar")}

    def _traits(self) -> Traits:
        modules = self._modules.values()
        momentum = [
            1 / max(1.0, float(m.num_batches_tracked or 0)) if m.momentum is None else m.momentum for m in modules
        ]
        return Traits(
            torch.tensor([isinstance(m, SyncBatchNorm | nn.SyncBatchNorm) for m in modules]),
            torch.tensor([m.running_mean is not None for m in modules]),
            torch.tensor(momentum, dtype=torch.float64),
            torch.tensor([m.eps for m in modules], dtype=torch.float64),
        )

    def _groups(self, sums: Sums) -> Tensor:
        """[L] a number for the ranks that have this one's running statistics; NaN if there are none."""
        groups = []
        for layer, ran in zip(self._modules.values(), (sums.forwards > 0).tolist(), strict=True):
            synced = ran and isinstance(layer, SyncBatchNorm) and layer.running_mean is not None
            group = layer.process_group() if synced else None
            groups.append(math.nan if group is None else float(collectives.ranks_of(group)[0]))
        return torch.tensor(groups, dtype=torch.float64)

    def _diverged(self, marks: Tensor, groups: Tensor) -> list[Verdict | None]:
        """The first layer whose running statistics differ. marks: [W, 2, L]; groups: [W, L]."""
        if (marks == marks[0]).all():
            return []
        for n, layer in enumerate(self._modules):
            for which, buffer in enumerate(("running_mean", "running_var")):
                for group in sorted(set(groups[groups[:, n].isfinite(), n].tolist())):
                    in_group = (groups[:, n] == group).tolist()
                    held = [mark if g else None for mark, g in zip(marks[:, which, n].tolist(), in_group, strict=True)]
                    verdict = verdicts.buffers_diverged(buffer, held, layer)
                    if verdict:
                        return [verdict]
        return []

    def _say(self, text: str) -> None:
        if self._everyone is None or self._everyone.rank() == 0:
            log.warning(text)


# Batches after which running statistics have no excuse, however slow they are
_WARM = 100.0


def _by_layer(figures: dict[str, Tensor]) -> list[dict[str, float]]:
    """A dict for each layer, without what is undefined."""
    rows = zip(*(values.tolist() for values in figures.values()), strict=True)
    return [{name: v for name, v in zip(figures, row, strict=True) if math.isfinite(v)} for row in rows]
