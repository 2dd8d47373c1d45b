"""Turn a model's batch norm layers into SyncBatchNorm and back: a layer changes its class, never its identity."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from syncbn.collectives import Group, ProcessGroup, Reduction, Spec, check_reduction
from syncbn.fuse import change_class, fuse_calls, fused_calls, unfuse
from syncbn.lazy import LazySyncBatchNorm
from syncbn.module import OF_THIS_PROCESS, SyncBatchNorm

Model = TypeVar("Model", bound=nn.Module)
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Conversion:
    """What convert or revert did to a model; its str() is for people to read.

    changed: a name of each layer that changed its class.
    left: a name of each batch norm layer that could not -> why.
    others: class -> number, of all normalisation layers that are as they were.
    fused: "BN→ReLU" and "BN→add→ReLU" -> number of places where the model now has one call for it.
    unfused: a name of each layer, or of the module that calls it -> why fuse=True did not fuse it.
    """

    changed: tuple[str, ...]
    left: Mapping[str, str]
    others: Mapping[str, int]
    fused: Mapping[str, int] = field(default_factory=dict)
    unfused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"changed {_some(self.changed)}"]
        if self.fused:
            lines.append("fused " + ", ".join(f"{count} {what}" for what, count in self.fused.items()))
        for verb, reasons in (("left", self.left), ("not fused", self.unfused)):
            for reason in dict.fromkeys(reasons.values()):
                lines.append(f"{verb} {_some([name for name in reasons if reasons[name] == reason])}: {reason}")
        others = ", ".join(f"{count} {kind}" for kind, count in self.others.items())
        return "\n".join([*lines, f"normalisation layers as they were: {others or 'none'}"])


def convert(
    model: Model,
    *,
    group: Group = "world",
    reduction: Reduction = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    fuse: bool = False,
    report: Callable[[Conversion], object] | None = None,
) -> Model:
    """Make every batch norm layer in model a SyncBatchNorm, in place and without loss.

    Each layer stays the object it was, with its parameters, buffers, hooks and attributes: shared layers,
    parametrisations, optimisers, DDP and any other reference remain valid. Half-precision running buffers become
    float32. Converted are nn.BatchNorm1d, 2d and 3d, their Lazy kin, nn.SyncBatchNorm and timm's BatchNormAct2d.
    Subclasses, frozen and scripted layers are left alone. So is a SyncBatchNorm, with the group that it has: for
    several groups in one model, convert it part by part.

    With fuse, a layer does the ReLU after it too, and the addition between (BN→ReLU, BN→add→ReLU), where one module
    calls them, as those of torchvision's ResNets do. Outputs, gradients, buffers and state_dict are the same. The
    module around, say a Bottleneck, becomes a FusedBottleneck: the same object, with a forward made from a trace of
    its own (an nn.Sequential looks for pairs as it runs). So do it last, and revert before you change such a module:
    the flags and numbers that its forward read are kept, a ReLU or a shortcut that it gets later has no effect, nor
    has a hook of such a ReLU, and a hook of the layer sees what the ReLU gave. The terms of a fused addition must be
    of one shape; the sum has the dtype of the layer's output.

    momentum stays the weight of the new batch, as torch has it, and running_var unbiased. Keras' momentum is 1 - that,
    and its moving variance biased: docs/norms.md tells how weights are carried over.

    Args:
        model: any module; a batch norm layer itself converts too.
        group: the ranks that form one batch: see `syncbn.Group`. An nn.SyncBatchNorm with a process_group of its own
            keeps that, if group is "world".
        reduction: "auto", "all_reduce", "gather" or "one_shot": see `syncbn.Reduction`.
        include: a glob pattern or several, of names as in model.named_modules(), say "backbone.*"; None for all.
        exclude: the same, of layers not to convert. Any name of a shared layer includes it, and any excludes it.
        fuse: let the layers, those that were SyncBatchNorm before among them, do ReLU and addition where that is safe.
        report: called with the Conversion: `report=print` tells what was changed, and what was not and why. Without
            it, a model in which there is nothing to convert is warned of.

    Returns:
        model. Every rank must convert alike; nothing is sent.

    Raises:
        ValueError: group or reduction is none, or a pattern matches no batch norm layer. Then nothing was changed.
    """
    spec = Spec(group)
    check_reduction(reduction)
    batch_norms = _batch_norms(model)
    selected = _selected(batch_norms, include, exclude)
    changed, left = _change_classes(selected, spec, reduction)
    layers = {layer for layer in selected.values() if isinstance(layer, SyncBatchNorm)}
    unfused = fuse_calls(model, layers) if fuse else {}
    conversion = _conversion(model, changed, left, unfused)
    if report is not None:
        report(conversion)
    elif not any(isinstance(layer, SyncBatchNorm) for _, layer in batch_norms):
        warnings.warn(f"convert found nothing to convert.\n{conversion}", stacklevel=2)
    return model


def revert(model: Model, *, report: Callable[[Conversion], object] | None = None) -> Model:
    """Undo convert in place: all that it converted or fused is of its former class again, with nothing of ours in it.

    For export, for one process alone, and for tools that know torch's classes. Running buffers take the dtype of
    half-precision parameters, as nn.BatchNorm wants. A lazy layer that knows its channels becomes what it would have.

    Args:
        model: any module. Layers that were built as SyncBatchNorm stay so.
        report: called with the Conversion: `report=print` tells what was changed, and what was not and why.

    Returns:
        model.
    """
    unfuse(model)
    changed, left = [], {}
    for (name, *_), layer in _batch_norms(model):
        if isinstance(layer, SyncBatchNorm):
            if "_origin" in vars(layer):
                _restore(name, layer)
                changed.append(name)
            else:
                left[name] = "built as SyncBatchNorm, so there is no class to go back to"
    if report is not None:
        report(_conversion(model, changed, left))
    return model


def _change_classes(
    layers: Mapping[str, nn.Module], spec: Spec, reduction: Reduction
) -> tuple[list[str], dict[str, str]]:
    """Make SyncBatchNorms of what can become one: the names of the layers that did, and why the others did not."""
    plan, left = [], {}
    for name, layer in layers.items():
        to, why_not = _successor(layer)
        if to is not None:
            plan.append((name, layer, to, _origin(layer)))
        elif why_not:
            left[name] = why_not
    # Nothing is changed before all that may be refused was looked at
    for _, layer, to, origin in plan:
        change_class(layer, to)
        vars(layer).pop("process_group", None)
        vars(layer)["_origin"] = origin
        own = origin.process_group if spec.group == "world" else None
        cast(SyncBatchNorm, layer).synchronise(own or spec, reduction)
    return [name for name, *_ in plan], left


class SyncBatchNormAct(SyncBatchNorm):
    """What timm's BatchNormAct2d becomes: batch norm, drop, activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.act(self.drop(super().forward(input, residual, mask)))


_SUCCESSORS: dict[type, type[SyncBatchNorm]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), SyncBatchNorm),
    **dict.fromkeys((nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d), LazySyncBatchNorm),
}
# By name, so that timm need not be there
_SUCCESSORS_BY_NAME = {
    "timm.layers.norm_act.BatchNormAct2d": SyncBatchNormAct,
    "timm.layers.norm_act.SyncBatchNormAct": SyncBatchNormAct,
}


def _successor(layer: nn.Module) -> tuple[type[SyncBatchNorm] | None, str]:
    """The class that layer is to become, or why there is none; neither if it is a SyncBatchNorm."""
    kind = type_before_parametrizations(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(layer, SyncBatchNorm):
        return None, ""
    if isinstance(layer, torch.jit.ScriptModule):
        return None, "TorchScript: convert before scripting"
    if "FrozenBatchNorm" in kind.__name__:
        return None, f"{name} is frozen: it takes no statistics of the batch"
    if "forward" in vars(layer):
        return None, f"{name} had its forward replaced on the object"
    if to := _SUCCESSORS.get(kind) or _SUCCESSORS_BY_NAME.get(name):
        return to, ""
    if not isinstance(layer, _BatchNorm):
        return None, f"{name} has running statistics, but is no subclass of torch's"
    inherited = kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return None, f"{name} is a subclass {'that adds to its base' if inherited else 'with a forward of its own'}"


class _Origin(NamedTuple):
    """What revert needs to know of a layer: its class, and the process_group of an nn.SyncBatchNorm."""

    kind: type[nn.Module]
    process_group: Spec | None


def _origin(layer: nn.Module) -> _Origin:
    own = layer.process_group if isinstance(layer, nn.SyncBatchNorm) else None
    return _Origin(type_before_parametrizations(layer), None if own is None else Spec(own))


def _restore(name: str, layer: SyncBatchNorm) -> None:
    kind, process_group = vars(layer)["_origin"]
    if not isinstance(layer, LazySyncBatchNorm):
        kind = getattr(kind, "cls_to_become", None) or kind
    change_class(layer, kind)
    for ours in ("_origin", "_spec", "reduction", *OF_THIS_PROCESS):
        vars(layer).pop(ours, None)
    if isinstance(layer, nn.SyncBatchNorm):
        group, restored = process_group and process_group.group, cast(Any, layer)
        restored.process_group = group if isinstance(group, ProcessGroup) else None
        if restored.process_group is not group:
            warnings.warn(f"{name}: of its process_group a pickle kept the ranks alone, {group}: set it", stacklevel=3)
    if layer.weight is not None and layer.weight.dtype in (torch.float16, torch.bfloat16):
        for buffer in (layer.running_mean, layer.running_var):
            if buffer is not None:
                buffer.data = buffer.data.to(layer.weight.dtype)


def _batch_norms(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every batch norm layer, whether or not it can convert, once, with all its names."""
    by_id: dict[int, tuple[list[str], nn.Module]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(layer):
            by_id.setdefault(id(layer), ([], layer))[0].append(name)
    return list(by_id.values())


def _is_batch_norm(layer: nn.Module) -> bool:
    if isinstance(layer, _BatchNorm) or "FrozenBatchNorm" in type(layer).__name__:
        return True
    return not isinstance(layer, _InstanceNorm) and "running_var" in dict(layer.named_buffers(recurse=False))


def _selected(
    layers: list[tuple[list[str], nn.Module]], include: Patterns | None, exclude: Patterns | None
) -> dict[str, nn.Module]:
    all_names = [name for names, _ in layers for name in names]
    included, excluded = ([p] if isinstance(p, str) else p or () for p in (include, exclude))
    for pattern in (*included, *excluded):
        if not _match(all_names, [pattern]):
            raise ValueError(f"the pattern {pattern!r} matches none of the batch norm layers: {_some(all_names)}")
    return {
        names[0]: layer
        for names, layer in layers
        if (include is None or _match(names, included)) and not _match(names, excluded)
    }


def _match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _conversion(
    model: nn.Module, changed: Sequence[str], left: Mapping[str, str], unfused: Mapping[str, str] | None = None
) -> Conversion:
    # A container that is named for the norm within it has no parameters, not even None
    others = Counter(
        type_before_parametrizations(layer).__name__
        for name, layer in model.named_modules()
        if name not in changed
        and (_is_batch_norm(layer) or ("norm" in type(layer).__name__.lower() and layer._parameters))
    )
    return Conversion(tuple(changed), left, dict(others), fused_calls(model), unfused or {})


def _some(names: Sequence[str], most: int = 6) -> str:
    """Their number and the first of them."""
    shown = ", ".join([*(name or "the model itself" for name in names[:most]), *["..."] * (len(names) > most)])
    return f"{len(names)} ({shown})" if names else "0"
