"""Trained weights out of a file or torchvision's store, however they are wrapped and named there."""

import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.trainer.errors import UserError, some
from syncbn.trainer.models.backbones import classifier_part

# Where files keep the state_dict beside other things; of a checkpoint of this trainer, its average comes first
WRAPPERS = ("average", "state_dict", "model_state_dict", "model", "net", "module", "ema", "weights")
BACKBONES = ("backbone", "encoder")  # what torchvision and segmentation-models-pytorch call it
MOST_CLASSIFIERS = 2  # that a file may lack: of two resolutions, or one beside it for an auxiliary loss
# What is around the classifier's name in a model's that is made of it: deeplabv3_resnet50, smp/unet/resnet50,
# fasterrcnn_resnet50_fpn_v2, ssdlite320_mobilenet_v3_large
AROUND = (
    r"^(lraspp|deeplabv3|fcn|fasterrcnn|maskrcnn|retinanet|fcos|ssd\d+|ssdlite\d+)_|^smp/[^/]*/?"
    r"|(_320)?_fpn(_v2)?$"
)
# Of VGG's weights, those for images of SSD's mean and std
OF_BACKBONES = {("ssd300_vgg16", "DEFAULT"): "IMAGENET1K_FEATURES"}
# What torchvision's first trained detectors call some layers, by what they are called since
FORMER = (
    (r"(rpn\.head\.conv)\.0\.0\.(\w+)$", lambda m: f"{m[1]}.{m[2]}"),
    (r"(mask_head)\.(\d+)\.0\.(\w+)$", lambda m: f"{m[1]}.mask_fcn{int(m[2]) + 1}.{m[3]}"),
    (r"(head\.\w+_head\.conv)\.(\d+)\.0\.(\w+)$", lambda m: f"{m[1]}.{2 * int(m[2])}.{m[3]}"),
)


def load_weights(model: nn.Module, name: str, weights: str, num_classes: int) -> str:
    """Load what fits the model of this name; what was loaded, in words.

    The classifier, if it is one of other classes, keeps its own start. Raises UserError for a file that cannot be
    read, and if more is missing.
    """
    given = f"model.weights={weights}"
    return _load(model, _read(given, weights, name), given, f"model.name={name}", num_classes)


def load_backbone(model: nn.Module, name: str, weights: str) -> str:
    """Load the backbone of a classifier into that of the model of this name; what was loaded, in words.

    Raises UserError for a model without a backbone, a file that cannot be read, and if anything is missing.
    """
    given = f"model.backbone_weights={weights}"
    backbone = next((module for part, module in model.named_children() if part in BACKBONES), None)
    if backbone is None:
        raise UserError(
            f"{given}: model.name={name} has no part named {' or '.join(BACKBONES)}; model.weights=FILE loads it whole"
        )
    state = _read(given, OF_BACKBONES.get((name, weights), weights), re.sub(AROUND, "", name))
    return _load(classifier_part(backbone), state, given, f"the backbone of model.name={name}")


def _load(model: nn.Module, state: Mapping[str, Any], given: str, of_what: str, num_classes: int | None = None) -> str:
    """Load what fits; num_classes: of its classifiers, which may be missing; None: it has none."""
    own = model.state_dict()
    prefix = _prefix(state, own)
    there = {key: state.get(prefix + key, state.get(prefix + _former(key))) for key in own}
    fits = {key: tensor for key, tensor in there.items() if _fits(tensor, own[key])}
    left = [key for key in own if key not in fits]
    # Files from before torch 0.4.1 have no num_batches_tracked
    missing = [key for key in left if not key.endswith("num_batches_tracked")]
    if missing and not (fits and num_classes and _are_classifiers(missing, own, there, num_classes)):
        tensor = there[missing[0]]
        shape = f"is {[*tensor.shape]} there" if isinstance(tensor, Tensor) else "is not there"
        raise UserError(
            f"{given} has {len(fits)} of the {len(own)} tensors of {of_what} "
            f"({missing[0]} {[*own[missing[0]].shape]} {shape}): name the model that was trained"
        )
    model.load_state_dict(fits, strict=False)
    kept = f" (left: {some(left, 4)})" if left else ""
    return f"loaded {len(fits)} of {len(own)} tensors from {given.partition('=')[2]}{kept}"


def _read(given: str, weights: str, name: str) -> Mapping[str, Any]:
    """The state_dict in a file, or of the model by that name in torchvision's store. given: the key and its value."""
    return _of_file(given, weights) if Path(weights).is_file() else _of_torchvision(given, weights, name)


def _of_torchvision(given: str, weights: str, name: str) -> Mapping[str, Any]:
    import torchvision

    try:
        return torchvision.models.get_model_weights(name)[weights].get_state_dict(progress=False)
    except (ValueError, KeyError) as error:
        raise UserError(f"{given}: neither a file nor weights that torchvision has for {name}") from error


def _of_file(given: str, path: str) -> Mapping[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{given} holds more than tensors (a pickled module?), and is not read, as it may run code: "
            "torch.save(model.state_dict(), FILE) makes a file that is"
        ) from error
    except Exception as error:  # a file that is cut short or of another kind raises many kinds
        raise UserError(f"{given} is no file of torch.save ({type(error).__name__}), or broken") from error
    state = _state_dict(held)
    if state is None:
        raise UserError(f"{given} holds no state_dict but a {type(held).__name__}: save a state_dict")
    return state


def _state_dict(held: Any) -> Mapping[str, Any] | None:
    """held, or what it wraps, if that is one."""
    if not isinstance(held, Mapping):
        return None
    if any(isinstance(value, Tensor) for value in held.values()):
        return held
    wrapped = (_state_dict(held[key]) for key in WRAPPERS if held.get(key))
    return next((state for state in wrapped if state is not None), None)


def _prefix(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    """What the names of most tensors that fit begin with: module., of DDP, say, or _orig_mod., of torch.compile."""
    fitting: Counter[str] = Counter()
    for key, tensor in state.items():
        parts = key.split(".")
        for cut in range(len(parts)):
            if _fits(tensor, own.get(".".join(parts[cut:]))):
                fitting[key.removesuffix(".".join(parts[cut:]))] += 1
    return fitting.most_common(1)[0][0] if fitting else ""


def _fits(tensor: Any, own: Tensor | None) -> bool:
    return isinstance(tensor, Tensor) and own is not None and tensor.shape == own.shape


def _former(key: str) -> str:
    """What a tensor's name was in earlier files; the same if it has not changed."""
    for pattern, name in FORMER:
        if match := re.search(pattern, key):
            return key[: match.start()] + name(match)
    return key


def _are_classifiers(keys: list[str], own: Mapping[str, Tensor], there: Mapping[str, Any], num_classes: int) -> bool:
    """Whether they are of few modules with a score for each class, or all of another number of classes there.

    The latter may have several outputs of each class: for each anchor, or the sides of a box.
    """
    modules = {key.rpartition(".")[0] for key in keys}
    if len(modules) <= MOST_CLASSIFIERS and all(own[key].shape[:1] == (num_classes,) for key in keys):
        return True
    classes = {_classes(there[key], own[key], num_classes) for key in keys}
    return len(classes) == 1 and None not in classes


def _classes(tensor: Any, own: Tensor, num_classes: int) -> int | None:
    """Of how many classes a tensor is, if it differs from own in nothing but these; else None."""
    if not isinstance(tensor, Tensor) or not own.ndim or tensor.shape[1:] != own.shape[1:]:
        return None
    of_each, rest = divmod(len(own), num_classes)
    classes, left = divmod(len(tensor), of_each or 1)
    return None if rest or left else classes
