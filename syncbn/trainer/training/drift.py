"""Drift of the ranks' statistics, as the trainer measures and tells it; the measuring is syncbn.DriftMonitor's."""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn import Reading, Verdict
from syncbn.trainer.data import Batch
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option
from syncbn.trainer.runs.drift_figures import DRIFT_FIGURES

log = logging.getLogger(__name__)

CHANCE = 0.1  # an ICC that batches of two have now and then


@dataclass
class DriftConfig:
    level: str = option("image", "what to compare between ranks: image (ranks and images), rank, or off")
    every: int = option(100, "steps from one reading to the next, at a log step; each eval has one too")
    alpha: float = option(1e-3, "chance of a false alarm that is taken at each reading")

    def __post_init__(self) -> None:
        if self.level not in ("image", "rank", "off"):
            raise UserError(f"drift.level={self.level}: choose one of image, rank, off")
        if self.every < 1:
            raise UserError(f"drift.every={self.every}: give 1 (at each log step) or more")
        if not 0 < self.alpha < 1:
            raise UserError(f"drift.alpha={self.alpha}: give a probability between 0 and 1, such as 0.001")


def monitor(model: nn.Module, config: DriftConfig, *, expected: bool = True) -> syncbn.DriftMonitor | None:
    """Watch the model's batch norm layers as the config says; none if it says off, or if there are none. Collective.

    Frozen layers are none. expected: whether to warn of that; not where the norm that was chosen is such a one.
    """
    if config.level == "off":
        return None
    if not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        if expected:
            log.warning("the model has no batch norm layer that takes statistics: there is no drift to measure")
        return None
    return syncbn.DriftMonitor(model, level=config.level, alpha=config.alpha)  # pyright: ignore[reportArgumentType]


def flat(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """drift/<layer>/<figure>, as a line of metrics.jsonl and W&B have them."""
    return {f"drift/{layer}/{name}": value for layer, figures in layers.items() for name, value in figures.items()}


class Story:
    """What the verdicts of a run were, and from which step to which."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """state: of the story that this one goes on with."""
        state = state or {"told": {}, "last": None}
        self.by_kind: dict[str, dict[str, Any]] = state["told"]
        self.last: Reading | None = None
        if state["last"]:
            layers, rank_z, verdicts = state["last"]
            self.last = Reading(layers, rank_z, [Verdict(**verdict) for verdict in verdicts])

    def state_dict(self) -> dict[str, Any]:
        last = self.last and [*self.last[:2], [verdict._asdict() for verdict in self.last.verdicts]]
        return {"told": self.by_kind, "last": last}

    def add(self, step: int, reading: Reading) -> list[Verdict]:
        """Those of its verdicts whose kind has not been seen before."""
        self.last = reading
        new = [verdict for verdict in reading.verdicts if verdict.kind not in self.by_kind]
        for verdict in reading.verdicts:
            first = self.by_kind.get(verdict.kind, {"first_step": step})["first_step"]
            self.by_kind[verdict.kind] = {**verdict._asdict(), "first_step": first, "last_step": step}
        return new

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The last verdict of each kind, with its first and last step, in order of weight."""
        return [self.by_kind[kind] for kind in KINDS if kind in self.by_kind]

    def worst_layers(self, most: int = 3) -> dict[str, dict[str, float]]:
        """The figures of the layers where ranks differ most or, where that is not known, batches are worth least."""
        layers = self.last.layers if self.last else {}
        measured = {name: figures for name, figures in layers.items() if figures}

        def badness(name: str) -> tuple[float, float]:
            return max(measured[name].get("icc", 0.0), CHANCE), -measured[name].get("n_eff", 0.0)

        shown = [figure for figure, read in DRIFT_FIGURES.items() if read.on_screen]
        worst = sorted(measured, key=badness, reverse=True)[:most]
        return {name: {f: measured[name][f] for f in shown if f in measured[name]} for name in worst}


KINDS = ("buffers diverged", "shards differ", "running statistics lag", "batch too small")


def recalibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    autocast: AbstractContextManager,
    forward: Callable[[nn.Module, Batch], Any] = lambda model, batch: model(batch.images),
) -> tuple[nn.Module, dict[str, float]] | None:
    """A copy of the model with the statistics of these batches of all ranks, and what the model's own miss, in nats.

    The latter is drift/<layer>/gap, the mean over channels of KL(N(running_mean, running_var) ‖ N(mean, var)).
    forward: runs the model on a batch. Collective. None, on every rank, if no layer of the model moves running
    statistics in training.

    Source: Wu & Johnson 2021, arXiv:2105.07576 (PreciseBN).
    """
    exact = deepcopy(model).train()  # in which frozen layers stay in eval
    if not any(isinstance(m, _BatchNorm) and m.training and m.running_mean is not None for m in exact.modules()):
        return None
    with autocast:
        population = syncbn.recalibrate(exact, batches, forward=forward)
    own: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    gaps = {}
    for name, moments in population.items():
        layer = own[name]
        mean, var = layer.running_mean.double() - moments.mean, layer.running_var.double() + layer.eps
        exact_var = moments.unbiased_var + layer.eps
        kl = 0.5 * ((var + mean.square()) / exact_var - 1 + (exact_var / var).log())
        gaps[f"drift/{name}/gap"] = kl.mean()
    values = torch.stack(list(gaps.values())).tolist()
    return exact, dict(zip(gaps, values, strict=True))
