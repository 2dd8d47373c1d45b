"""Turn a model's BatchNorm layers into SyncBatchNorm and back: a layer changes its class, never its identity."""

from typing import TypeVar, cast

from torch import nn

from syncbn.collectives import Group
from syncbn.module import SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, group: Group = "world") -> Model:
    """Make every nn.BatchNorm1d, 2d and 3d in model a SyncBatchNorm, in place.

    Each layer stays the object it was, so parameters, buffers, hooks, shared layers, optimisers and any other
    reference remain valid. Subclasses are left alone: their forward is their own.

    Args:
        model: any module; a BatchNorm itself converts too.
        group: the ranks that form one batch, as in SyncBatchNorm.

    Returns:
        model.
    """
    for layer in model.modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            vars(layer)["converted_from"] = type(layer)
            layer.__class__ = SyncBatchNorm
            cast(SyncBatchNorm, layer).synchronise(group)
    return model


def revert(model: Model) -> Model:
    """Undo convert in place: every converted layer is of its former class again. Returns model.

    For export and tools that know torch's classes. Layers that were built as SyncBatchNorm stay so.
    """
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm) and "converted_from" in vars(layer):
            layer.__class__ = vars(layer).pop("converted_from")
            for name in "_spec", "reduction", "_has_peers", "_recall":
                vars(layer).pop(name, None)
    return model
