"""Every normalisation that the trainer can put in a model's place for batch norm, by name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn.trainer.errors import UserError


@dataclass
class NormConfig:
    name: str = "sync"  # sync: over all ranks (ours); local: each rank's own; torch: torch.nn.SyncBatchNorm, GPUs only
    group: int | str = "world"  # ranks that form one batch: world, node, or so many consecutive ones; for norm=sync
    fuse: bool = False  # the layers also do the ReLU after them and the addition between; for norm=sync

    def __post_init__(self) -> None:
        if self.name not in NORMS:
            raise UserError(f"norm={self.name}: choose one of {', '.join(NORMS)}")
        if self.group not in ("world", "node") and not (isinstance(self.group, int) and self.group >= 1):
            raise UserError(f"norm.group={self.group}: give world, node, or a number of ranks, 1 or more")
        if self.group != "world" and self.name != "sync":
            raise UserError(
                f"norm.group={self.group} with norm={self.name}: only norm=sync has groups; take it, or no norm.group="
            )
        if self.fuse and self.name != "sync":
            raise UserError(f"norm.fuse=true with norm={self.name}: only norm=sync fuses; take it, or norm.fuse=false")


def refuse_misfit(config: NormConfig, ranks: int) -> None:
    """Raise UserError if so many ranks cannot be divided into the groups that the config asks for."""
    if isinstance(config.group, int) and ranks % config.group:
        fit = ", ".join(str(group) for group in range(1, ranks + 1) if ranks % group == 0)
        raise UserError(
            f"norm.group={config.group} does not divide the {ranks} ranks of this job: give it as many ranks as make "
            f"whole groups, or norm.group= one of {fit}, world, node",
            on_every_rank=True,
        )


def of_one_rank(config: NormConfig) -> NormConfig:
    """The same norm where no rank sends anything, for measuring one alone."""
    if config.name == "torch":
        return NormConfig("local")
    return replace(config, group=1) if config.name == "sync" else config


def convert(model: nn.Module, config: NormConfig, device: torch.device) -> tuple[nn.Module, int]:
    """The model with its batch norm layers replaced as the config says, and how many were replaced.

    Call it once, last: after weights are loaded and before the model is wrapped for the ranks.
    """
    before = list(map(type, model.modules()))
    model = NORMS[config.name](model, config, device)
    changed = [new for old, new in zip(before, model.modules(), strict=True) if old is not type(new)]
    # A fused module around a layer changed its class too
    return model, sum(isinstance(module, _BatchNorm) for module in changed)


def nothing_converted(model: nn.Module) -> str:
    """Why a conversion found nothing, in words: what the model normalises with instead."""
    kinds = Counter(type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower())
    if not kinds:
        return "the model has no normalisation layer"
    has = ", ".join(f"{name} ×{n}" for name, n in kinds.items())
    return f"the model has {has}, and only batch norm layers that take statistics are converted"


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every batch norm layer of the model, synchronised or not."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def synchronised(model: nn.Module) -> bool:
    """Whether every batch norm of the model has the same buffers on every rank by construction."""
    return all(_of_all_ranks(layer) for layer in batch_norms(model))


def _of_all_ranks(layer: nn.Module) -> bool:
    if isinstance(layer, syncbn.SyncBatchNorm):
        return layer.group == "world"
    return isinstance(layer, nn.SyncBatchNorm)


def _sync(model: nn.Module, config: NormConfig, device: torch.device) -> nn.Module:
    # That nothing was found is said once, by rank 0's Watch
    group: Any = config.group
    return syncbn.convert(model, group=group, fuse=config.fuse, report=lambda _: None)


def _local(model: nn.Module, config: NormConfig, device: torch.device) -> nn.Module:
    return model


def _torch(model: nn.Module, config: NormConfig, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise UserError(f"norm=torch on {device.type}: torch.nn.SyncBatchNorm runs on GPUs only; take norm=sync")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


NORMS: dict[str, Callable[[nn.Module, NormConfig, torch.device], nn.Module]] = {
    "sync": _sync,
    "local": _local,
    "torch": _torch,
}
