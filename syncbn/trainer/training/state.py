"""What trains, and everything of it that shapes the future: to be saved, and to be gone on with."""

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import syncbn
from syncbn.trainer.data import Data
from syncbn.trainer.data.sampler import seed_of
from syncbn.trainer.tasks import Task
from syncbn.trainer.training.bad_steps import Guard
from syncbn.trainer.training.ema import Average
from syncbn.trainer.training.totals import Totals
from syncbn.trainer.world import World

State = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass
class Training:
    """The objects that train, and how far they have come."""

    model: DistributedDataParallel
    task: Task
    data: Data
    optimizer: Optimizer
    schedule: LambdaLR
    guard: Guard
    totals: Totals
    average: Average | None = None
    drift: syncbn.DriftMonitor | None = None
    desync: syncbn.DesyncMonitor | None = None
    recalibrate: int = 0  # training batches to recalibrate from at each evaluation
    step: int = 0
    evaluated: int = 0  # the step of the last evaluation ...
    figures: dict[str, float] = field(default_factory=dict)  # ... and what it found
    best: float | None = None  # the objective, of the best evaluation

    @property
    def epoch(self) -> float:
        return self.step / self.data.steps_per_epoch

    @property
    def best_model(self) -> nn.Module:
        """The model to evaluate and to keep: the average, if there is one."""
        return self.average.module if self.average else self.model.module

    def alive(self) -> None:
        """Let the other ranks' watchdogs know that this one gets on."""
        if self.desync:
            self.desync.alive(self.step)

    def state(self, world: World) -> State:
        """Everything that shapes what comes; whole on rank 0 alone. Collective.

        "own" is a list, by rank, of what a rank has for itself; all else is the same on every rank.
        """
        drift = self.drift.state_dict() if self.drift else {"shared": None, "own": None}
        own = {"random": _random_state(world.device), "totals": self.totals.state_dict(), "drift": drift["own"]}
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "figures": self.figures,
            "best": self.best,
            "model": self.model.module.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "drift": drift["shared"],
            "global_batch": self.data.global_batch,
            "data": self.data.fingerprint,
            "classes": self.data.classes,
            "image_shape": self.data.train.shape,
            "own": world.gather(own),
        }

    def go_on_from(self, state: State, world: World, *, seed: int) -> None:
        """Take over a state of this training, from any number of ranks. No rank speaks to another."""
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.figures, self.best = state["figures"], state["best"]
        self.data.train.shape = state["image_shape"]
        self.model.module.load_state_dict(state["model"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self._load_optimizer(state)
        self.guard.load_state_dict(state["guard"])
        if len(state["own"]) == world.size:
            own = state["own"][world.rank]
            self.totals.load_state_dict(own["totals"])
            _set_random_state(own["random"], world.device)
        else:
            own = {"drift": None}
            self.totals.load_state_dict(_merged([one["totals"] for one in state["own"]], world.rank))
            seed_generators(seed_of(seed, self.step, world.rank))
        if self.drift and state["drift"]:
            try:
                self.drift.load_state_dict({"shared": state["drift"], "own": own["drift"]})
            except (KeyError, ValueError) as error:
                log.warning("drift is measured from here on only: %s", error)

    def _load_optimizer(self, state: State) -> None:
        """Take over what the optimiser has gathered; its settings stay those of this run's config."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.schedule._step_count = state["schedule"]["_step_count"]
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, own, (peak, share) in zip(self.optimizer.param_groups, settings, rates, strict=True):
            group.update(own, lr=peak * share(self.schedule.last_epoch))
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def best_weights(state: State) -> dict[str, Tensor]:
    """What `best_model` had, by the names that the model has for it: the average, if there is one."""
    if not state["average"]:
        return state["model"]
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in state["average"].items() if k.startswith(prefix)}


def _merged(totals: list[State], rank: int) -> State:
    """What some other number of ranks has added: all of it on rank 0, and nothing on the others."""
    values = torch.stack([one["values"] for one in totals]).sum(0)
    counts = {name: sum(one.get(name, 0) for one in totals) for name in ("images", "skipped")}
    whole = {**totals[0], "values": values, **counts}
    return whole if rank == 0 else {**whole, "values": torch.zeros_like(values), "images": 0, "skipped": 0}


def seed_generators(seed: int) -> None:
    """Seed every generator that a model or a data set may draw from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _random_state(device: torch.device) -> State:
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(numpy.asarray(keys).tolist()), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: State, device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
