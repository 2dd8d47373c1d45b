"""Whether options are sound, and ranks, and a state and a model, fit together."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import collectives
from syncbn.collectives import ProcessGroup
from syncbn.drift.windows import ENOUGH

Level = Literal["rank", "image"]


def observed(model: nn.Module) -> dict[str, Any]:
    """The batch norm layers of a model by name, synchronised or not."""
    return {
        name or type(layer).__name__: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)
    }


def check_options(level: str, alpha: float, horizon: int) -> None:
    if level not in ("rank", "image"):
        raise ValueError(f"level is {level!r}: it must be 'rank' or 'image'; for none, open no monitor")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: it must be a probability between 0 and 1")
    if horizon < ENOUGH:
        raise ValueError(f"horizon is {horizon}: it must be {ENOUGH} readings or more, as one alone never counts")


def agree_on_layers(layers: Mapping[str, Any], level: Level, everyone: ProcessGroup | None) -> None:
    """ValueError, on every rank, if ranks watch different layers or one of them cannot be watched."""
    taken = [name for name, layer in layers.items() if getattr(layer, "observer", None) is not None]
    reports = collectives.gather_objects((level, _described(channels(layers)), taken), everyone)
    for rank, (theirs_level, theirs, theirs_taken) in enumerate(reports):
        if theirs_level != reports[0][0]:
            raise ValueError(
                f"level is {theirs_level!r} on rank {rank} and {reports[0][0]!r} on rank 0: it must be the same"
            )
        if theirs != reports[0][1]:
            differ = sorted(set(theirs) ^ set(reports[0][1])) or ["their order"]
            raise ValueError(f"the models of rank {rank} and rank 0 hold different layers: {differ[0]}")
        if theirs_taken:
            raise ValueError(f"{theirs_taken[0]} is observed already on rank {rank}: close its monitor first")
    for name, layer in layers.items():
        if layer.num_features == 0:
            raise ValueError(f"{name} has no channels yet: run one forward before it is watched")


def check_state(shared: Mapping[str, Any], layers: Mapping[str, Any], level: Level, ranks: int | None) -> None:
    """ValueError if a state's shared part is of other layers, another level or, unless ranks is None, other ranks."""
    for theirs, ours in zip_longest(
        _described(shared["layers"]), _described(channels(layers)), fillvalue="no more layers"
    ):
        if theirs != ours:
            raise ValueError(f"the state is of {theirs} where the model holds {ours}: load it into its own model")
    if shared["level"] != level:
        raise ValueError(f"level is {level!r}, and {shared['level']!r} in the state: it must be the same")
    if layers and ranks is not None and shared["ranks"] != ranks:
        raise ValueError(
            f"own is of one of {shared['ranks']} ranks where there are {ranks}: give None for it, on every rank"
        )


def channels(layers: Mapping[str, Any]) -> dict[str, int]:
    """The channels of each layer."""
    return {name: layer.num_features for name, layer in layers.items()}


def _described(sizes: Mapping[str, int]) -> list[str]:
    return [f"{name} of {count} channels" for name, count in sizes.items()]
