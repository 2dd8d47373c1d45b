"""The optimiser and its learning rate over time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from syncbn.trainer.errors import UserError
from syncbn.trainer.option import option

# By what the rate is multiplied for r times the images a step
SCALINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,  # SGD: Goyal et al. 2017, arXiv:1706.02677
    "sqrt": math.sqrt,  # Adam: Malladi et al. 2022, arXiv:2205.10287
    "none": lambda _: 1.0,
}


@dataclass
class OptimConfig:
    name: str = option("sgd", "sgd or adamw")
    lr: float = option(0.1, "at lr_batch images a step")
    lr_batch: int = option(256, "images of a step that lr is meant for; the rate of another number is by scaling")
    scaling: str = option(
        "linear", "the rate used is lr * r, r = images a step / lr_batch; sqrt: lr * sqrt(r); none: lr"
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
        for name in "weight_decay", "momentum":
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: give two decays from 0 up to 1, such as [0.9,0.999]")


@dataclass
class ScheduleConfig:
    warmup_epochs: float = option(1.0, "the rate rises linearly from 0 ...")
    final: float = option(0.0, "... then falls along half a cosine to this share of its peak")

    def __post_init__(self) -> None:
        if self.warmup_epochs < 0:
            raise UserError(f"schedule.warmup_epochs={self.warmup_epochs}: give 0 or more")


def build(config: OptimConfig, model: nn.Module, images_per_step: int) -> Optimizer:
    """The optimiser over the model's parameters that need a gradient, its rate scaled to the images of a step.

    It is a fused one, which reads on the device what its rate is and whether to leave out a step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms_and_biases else 0.0},
    ]
    lr = config.lr * SCALINGS[config.scaling](images_per_step / config.lr_batch)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(config.betas[0], config.betas[1]), fused=True)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    if config.momentum:
        # torch 2.15 leaves momentum as it found the memory if the first step of all is left out
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def build_schedule(config: ScheduleConfig, optimizer: Optimizer, *, steps: int, steps_per_epoch: int) -> LambdaLR:
    """Warm-up, then cosine, by step; step it after each optimiser step."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)

    def share_of_peak(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, share_of_peak)
