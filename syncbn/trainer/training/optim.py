"""The optimiser and its learning rate over time."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from syncbn.trainer.errors import UserError, some
from syncbn.trainer.option import flat, option

# By what the rate is multiplied for r times the images a step
SCALINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,  # SGD: Goyal et al. 2017, arXiv:1706.02677
    "sqrt": math.sqrt,  # Adam: Malladi et al. 2022, arXiv:2205.10287
    "none": lambda _: 1.0,
}
SCHEDULES = ("cosine", "poly", "multistep")
# What is left of the peak once a share of the steps after the warm-up is done; power: of poly
FALLS: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda done, power: (1 + math.cos(math.pi * done)) / 2,  # Loshchilov & Hutter 2017, arXiv:1608.03983
    "poly": lambda done, power: (1 - done) ** power,  # Chen et al. 2018, arXiv:1606.00915, section 4.1
}


@dataclass
class OptimConfig:
    name: str = option("sgd", "sgd or adamw")
    lr: float = option(0.1, "at lr_batch images a step")
    lr_batch: int = option(256, "images of a step that lr is meant for; the rate of another number is by scaling")
    scaling: str = option(
        "linear", "the rate used is lr * r, r = images a step / lr_batch; sqrt: lr * sqrt(r); none: lr"
    )
    lr_factors: dict[str, Any] = option(
        dict, "another rate, lr times so much, for parameters by what their names begin with: {classifier: 10}"
    )
    weight_decay: float = option(5e-4, "on matrices and filters: added to the gradient; adamw: decoupled")
    decay_norms_and_biases: bool = option(False, "weight decay on vectors too: norms' weights and all biases")
    momentum: float = option(0.9, "sgd")
    nesterov: bool = option(True, "sgd")
    betas: list[float] = option(lambda: [0.9, 0.999], "adamw")

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise UserError(f"optim={self.name}: choose one of sgd, adamw")
        if not self.lr > 0:
            raise UserError(f"optim.lr={self.lr}: give a rate above 0")
        if self.scaling not in SCALINGS:
            raise UserError(f"optim.scaling={self.scaling}: choose one of {', '.join(SCALINGS)}")
        if self.lr_batch < 1:
            raise UserError(
                f"optim.lr_batch={self.lr_batch}: give 1 or more images; optim.scaling=none takes lr as it is"
            )
        self.lr_factors = flat(self.lr_factors)
        for prefix, factor in self.lr_factors.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
                raise UserError(f"optim.lr_factors.{prefix}={factor}: give a factor above 0")
        for name in "weight_decay", "momentum":
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: give two decays from 0 up to 1, such as [0.9,0.999]")


@dataclass
class ScheduleConfig:
    name: str = option(
        "cosine", "how the rate falls: cosine, half of one; poly, (1 - share of steps done)^power; multistep"
    )
    warmup_epochs: float = option(1.0, "before that it rises linearly from 0")
    warmup_steps: int = option(0, "the same in steps; above 0 it takes the place of warmup_epochs")
    final: float = option(0.0, "share of its peak that it falls to; multistep: never")
    power: float = option(0.9, "poly")
    milestones: list[float] = option(list, "multistep: epochs, from each of which on the rate is gamma times as high")
    gamma: float = option(0.1, "multistep")

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"schedule.name={self.name}: choose one of {', '.join(SCHEDULES)}")
        if not self.power > 0:
            raise UserError(f"schedule.power={self.power}: give a power above 0")
        for name in "warmup_epochs", "warmup_steps":
            if getattr(self, name) < 0:
                raise UserError(f"schedule.{name}={getattr(self, name)}: give 0 or more")
        if not 0 < self.gamma <= 1:
            raise UserError(f"schedule.gamma={self.gamma}: give a factor above 0 up to 1")
        self._refuse_milestones()

    def _refuse_milestones(self) -> None:
        given = f"schedule.milestones={self.milestones}"
        if (self.name == "multistep") != bool(self.milestones):
            raise UserError(
                f"schedule.name={self.name} with {given}: the rate falls at milestones with multistep, and with "
                "nothing else; schedule.name=multistep schedule.milestones=[16,22], say, or schedule.milestones=[]"
            )
        if any(not 0 < one < two for one, two in pairwise([*self.milestones, math.inf])):
            raise UserError(f"{given}: give epochs above 0, each later than the one before it, such as [16,22]")


def build(config: OptimConfig, model: nn.Module, images_per_step: int) -> Optimizer:
    """The optimiser over the model's parameters that need a gradient, its rate scaled to the images of a step.

    Its first groups have the rate itself, those behind them that of lr_factors. It is a fused one, which reads on the
    device what its rate is and whether to leave out a step. Raises UserError for a factor that no parameter has.
    """
    lr = config.lr * SCALINGS[config.scaling](images_per_step / config.lr_batch)
    decays = {True: config.weight_decay, False: config.weight_decay if config.decay_norms_and_biases else 0.0}
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == matrices], "weight_decay": decay, "lr": lr * factor}
        for factor, parameters in _by_factor(config.lr_factors, model).items()
        for matrices, decay in decays.items()
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(config.betas[0], config.betas[1]), fused=True)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    if config.momentum:
        # torch 2.15 leaves momentum as it found the memory if the first step of all is left out
        for p in (p for group in groups for p in group["params"]):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _by_factor(factors: Mapping[str, float], model: nn.Module) -> dict[float, list[nn.Parameter]]:
    """The parameters that train, by the factor of their rate, 1 first. Raises UserError for one that none has."""
    by_factor: dict[float, list[nn.Parameter]] = {1.0: []}
    unused = dict(factors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            begins = [prefix for prefix in factors if f"{_plain(name)}.".startswith(f"{_plain(prefix)}.")]
            factor = factors[max(begins, key=len)] if begins else 1.0
            by_factor.setdefault(factor, []).append(parameter)
            unused = {prefix: factor for prefix, factor in unused.items() if prefix not in begins}
    for prefix, factor in unused.items():
        parts = [part for part, module in model.named_children() if any(p.requires_grad for p in module.parameters())]
        raise UserError(
            f"optim.lr_factors.{prefix}={factor}: no parameter that trains has a name that begins so; the parts of the "
            f"model are {some(parts, 8)}",
            on_every_rank=True,
        )
    return by_factor


def _plain(name: str) -> str:
    """A parameter's name, or the beginning of one, without what DDP and torch.compile put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def build_schedule(config: ScheduleConfig, optimizer: Optimizer, *, steps: int, steps_per_epoch: int) -> LambdaLR:
    """Warm-up, then the fall, by step; step it after each optimiser step."""
    warmup = min(config.warmup_steps or round(config.warmup_epochs * steps_per_epoch), steps)
    milestones = [round(epoch * steps_per_epoch) for epoch in config.milestones]

    def share_of_peak(step: int) -> float:
        risen = min(1.0, (step + 1) / (warmup + 1))
        if config.name == "multistep":
            return risen * config.gamma ** bisect_right(milestones, step)
        if step < warmup:
            return risen
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return config.final + (1 - config.final) * FALLS[config.name](done, config.power)

    return LambdaLR(optimizer, share_of_peak)
