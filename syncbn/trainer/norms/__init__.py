"""Every normalisation that the trainer can put in a model's place for batch norm, by name."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn.trainer.errors import UserError
from syncbn.trainer.norms import activations, local, renorm, sample, swap
from syncbn.trainer.norms.activated import EvoNormS0, FilterResponseNorm
from syncbn.trainer.option import option

THAW = "model.unfreeze_norms=true makes them live"


@dataclass
class NormConfig:
    name: str = option(
        "sync", "sync, local, torch, group, layer, instance, batch_renorm, ghost, frozen, ...: see conf/norm"
    )
    group: Any = option("world", "ranks that form one batch: world, node, so many consecutive ones, or {samples: n}")
    reduction: str = option(
        "auto", "how ranks add up: auto, all_reduce, gather (in the order of ranks), one_shot (GPUs)"
    )
    fuse: bool = option(False, "the layers also do the ReLU after them and the addition between")
    momentum: int | float | str | None = option(
        None, "of running statistics, if there are any; none: the model's; auto: docs/norms.md"
    )
    groups: int = option(32, "groups of channels, at most: the largest number that divides them and leaves two in each")
    sub_batch: int = option(32, "norm=ghost: images of a rank that are one batch; 32 as in docs/norms.md")
    renorm_steps: int = option(1000, "norm=batch_renorm: forwards until r and d may be as large as the paper has them")

    def __post_init__(self) -> None:
        if self.name not in NORMS:
            raise UserError(f"norm={self.name}: choose one of {', '.join(NORMS)}")
        if not _is_group(self.group):
            raise UserError(
                f"norm.group={self.group}: give world, node, a number of ranks, 1 or more, or {{samples: n}}, n 1 or "
                "more, for the fewest ranks that hold so many images"
            )
        if self.reduction not in get_args(syncbn.Reduction):
            raise UserError(f"norm.reduction={self.reduction}: choose one of {', '.join(get_args(syncbn.Reduction))}")
        if not _is_momentum(self.momentum):
            raise UserError(f"norm.momentum={self.momentum}: give a number above 0 up to 1, auto, or null")
        for key in "groups", "sub_batch", "renorm_steps":
            if getattr(self, key) < 1:
                raise UserError(f"norm.{key}={getattr(self, key)}: give 1 or more")
        for key in fields(self)[1:]:
            value, able = getattr(self, key.name), [word for word, norm in NORMS.items() if key.name in norm.keys]
            # No norm has momentum for its own: a recipe may give it to all
            if able and value != key.default and self.name not in able:
                raise UserError(
                    f"norm.{key.name}={_spelled(value)} with norm={self.name}: only norm={', '.join(able)} "
                    f"{'has' if len(able) == 1 else 'have'} that; take it, or no norm.{key.name}="
                )


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_group(group: Any) -> bool:
    """Whether it is one that every rank can ask for alike: a list of ranks is for its members alone."""
    try:
        syncbn.check_group(group)
    except ValueError:
        return False
    return isinstance(group, str | int | Mapping)


def _is_momentum(momentum: Any) -> bool:
    number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
    return momentum in (None, "auto") or (number and 0 < momentum <= 1)


class Place(NamedTuple):
    """What a norm can know of the job. images: of one forward of all ranks. node_ranks: ranks on this machine."""

    device: torch.device
    ranks: int = 1
    node_ranks: int = 1
    images: int = 1


class Converted(NamedTuple):
    """What was done to a model: of so many batch norm layers `changed`; and notes, for people to read."""

    changed: int
    layers: int
    notes: list[str]


def refuse_misfit(config: NormConfig, ranks: int) -> None:
    """Raise UserError if so many ranks cannot be divided into the groups that the config asks for."""
    if not _divides(config.group, ranks):
        fit = ", ".join(str(group) for group in range(1, ranks + 1) if _divides(group, ranks))
        raise UserError(
            f"norm.group={config.group} does not divide the {ranks} ranks of this job: give it as many ranks as make "
            f"whole groups, or norm.group= one of {fit}, world, node",
            on_every_rank=True,
        )


def _divides(group: Any, ranks: int) -> bool:
    try:
        syncbn.group_size(group, ranks)
    except ValueError:
        return False
    return True


def of_one_rank(config: NormConfig) -> NormConfig:
    """The same norm where no rank sends anything, for measuring one alone."""
    if config.name == "torch":
        return NormConfig("local")
    return replace(config, group=1) if "group" in NORMS[config.name].keys else config


def convert(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Converted]:
    """The model with its batch norm layers replaced as the config says, and what was done.

    A layer stays the object that it is, with its weight, bias, eps and hooks (norm=torch aside, where torch makes new
    ones). Call it once, last: after weights are loaded and before the model is wrapped for the ranks.
    """
    before = {layer: type(layer) for layer in batch_norms(model)}
    model, notes = NORMS[config.name].convert(model, config, place)
    momentum = momentum_of(config, place)
    for layer in batch_norms(model) if momentum is not None else ():
        layer.momentum = momentum
    after = set(model.modules())
    changed = sum(layer not in after or type(layer) is not kind for layer, kind in before.items())
    return model, Converted(changed, len(before) + len(frozen_batch_norms(model)), list(notes))


def momentum_of(config: NormConfig, place: Place) -> float | None:
    """The momentum of running statistics that the config asks for; None: as the model has it.

    "auto" is 1 - 0.9 ** (n / 32), n the images of one norm batch: running statistics then forget as much by 32 images
    as torch's 0.1 does by a batch of 32, whatever the batch. Each forward moves them once, so train.accumulate has no
    part in it. docs/norms.md derives it.
    """
    if config.momentum != "auto":
        return config.momentum  # pyright: ignore[reportReturnType]
    return 1 - 0.9 ** (images_of_a_batch(config, place) / 32)


def images_of_a_batch(config: NormConfig, place: Place) -> float:
    """The images that a norm takes its statistics of, on average over ranks."""
    each = place.images / place.ranks
    scope = NORMS[config.name].scope
    if scope == "sub-batch":
        return min(each, config.sub_batch)
    if scope != "group":
        return each
    samples = place.images // place.ranks
    return each * syncbn.group_size(config.group, place.ranks, node_ranks=place.node_ranks, samples=samples)


def nothing_converted(model: nn.Module) -> str:
    """Why a conversion found nothing, in words: what the model normalises with instead."""
    kinds = Counter(type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower())
    if not kinds:
        return "the model has no normalisation layer"
    has = ", ".join(f"{name} ×{n}" for name, n in kinds.items())
    mend = f"; {THAW}" if frozen_batch_norms(model) else ""
    return f"the model has {has}, and only batch norm layers that take statistics are converted{mend}"


def batch_norms(model: nn.Module) -> list[Any]:
    """Every batch norm layer of the model, synchronised or not."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Those that are no batch norm to torch, with four buffers: torchvision's, or a copy of it."""
    return [m for m in model.modules() if type(m).__name__ == "FrozenBatchNorm2d"]


def synchronised(model: nn.Module) -> bool:
    """Whether every batch norm of the model has the same buffers on every rank by construction."""
    return all(_of_all_ranks(layer) for layer in batch_norms(model))


def _of_all_ranks(layer: nn.Module) -> bool:
    if isinstance(layer, syncbn.SyncBatchNorm):
        return layer.group == "world"
    return isinstance(layer, nn.SyncBatchNorm | local.FrozenBatchNorm)


class Norm(NamedTuple):
    """One word.

    convert: changes the model, in place where it can; what is to be told.
    scope: what its statistics are taken over: the images of a group of ranks, of a rank, of a part of a rank's, one
    image, or nothing.
    keys: of NormConfig, those that it has.
    running: its state is nn.BatchNorm's, with running statistics; a model with it is plain batch norm in eval.
    """

    convert: Callable[[nn.Module, NormConfig, Place], tuple[nn.Module, Iterable[str]]]
    scope: Literal["group", "rank", "sub-batch", "image", "none"]
    keys: tuple[str, ...] = ()
    running: bool = False


def _sync(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    # That nothing was found is said once, by rank 0 (job/rank0.py)
    reduction: Any = config.reduction
    model = syncbn.convert(model, group=config.group, reduction=reduction, fuse=config.fuse, report=lambda _: None)
    return model, ()


def _local(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    return model, ()


def _torch(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    if place.device.type != "cuda":
        raise UserError(f"norm=torch on {place.device.type}: torch.nn.SyncBatchNorm runs on GPUs only; take norm=sync")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model), ()


def _each(make: Callable[[_BatchNorm, NormConfig], nn.Module]) -> Callable[..., tuple[nn.Module, Iterable[str]]]:
    def convert(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
        swap.each(model, lambda layer: make(layer, config))
        return model, ()

    return convert


def _batch_renorm(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    return renorm.convert(model, config.group, config.renorm_steps), ()


def _ghost(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    local.ghost(model, config.sub_batch)
    return model, ()


def _frozen(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    local.freeze(model)
    return model, ()


def _group(layer: _BatchNorm, config: NormConfig) -> nn.Module:
    return sample.group_norm(layer, config.groups)


def _ws_group(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    if swap.plain(model):
        sample.standardise(model)
    return _each(_group)(model, config, place)


def _evonorm_s0(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    return model, activations.convert(model, partial(EvoNormS0, most_groups=config.groups))


def _frn(model: nn.Module, config: NormConfig, place: Place) -> tuple[nn.Module, Iterable[str]]:
    return model, activations.convert(model, FilterResponseNorm)


NORMS = {
    # Peng et al. 2018, arXiv:1711.07240
    "sync": Norm(_sync, "group", ("group", "reduction", "fuse"), running=True),
    # Ioffe & Szegedy 2015, arXiv:1502.03167
    "local": Norm(_local, "rank", running=True),
    "torch": Norm(_torch, "group", running=True),
    # Wu & He 2018, arXiv:1803.08494
    "group": Norm(_each(_group), "image", ("groups",)),
    # Ba et al. 2016, arXiv:1607.06450
    "layer": Norm(_each(lambda layer, _: nn.GroupNorm(1, layer.num_features, affine=False)), "image"),
    # Ulyanov et al. 2016, arXiv:1607.08022
    "instance": Norm(_each(lambda layer, _: sample.InstanceNorm(layer.num_features)), "image"),
    # Ioffe 2017, arXiv:1702.03275
    "batch_renorm": Norm(_batch_renorm, "group", ("group", "renorm_steps"), running=True),
    # Hoffer et al. 2017, arXiv:1705.08741
    "ghost": Norm(_ghost, "sub-batch", ("sub_batch",), running=True),
    "frozen": Norm(_frozen, "none", running=True),
    # Qiao et al. 2019, arXiv:1903.10520
    "ws_group": Norm(_ws_group, "image", ("groups",)),
    # Liu et al. 2020, arXiv:2004.02967
    "evonorm_s0": Norm(_evonorm_s0, "image", ("groups",)),
    # Singh & Krishnan 2020, arXiv:1911.09737
    "frn": Norm(_frn, "image"),
    # As Fixup's and SkipInit's baselines, arXiv:1901.09321, 2002.10444
    "none": Norm(_each(lambda layer, _: sample.Scale()), "none"),
}
