"""Models by name: ours for small images, torchvision's, or the user's own. All of them know nn.BatchNorm2d only."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncbn.trainer.errors import UserError, some
from syncbn.trainer.models import weights
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.models.unet import UNet
from syncbn.trainer.option import option


@dataclass
class ModelConfig:
    name: str = option("resnet8", "ours, torchvision's, or package.module:builder")
    weights: str | None = option(None, "torchvision's name of trained weights (DEFAULT, ...), or a state_dict's file")


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(SmallResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "unet": UNet,
}


def build(config: ModelConfig, num_classes: int, say: Callable[[str], Any] = lambda said: None) -> nn.Module:
    """The model of the config, for images [N, 3, H, W] and scores [N, num_classes]; say is told what was loaded.

    Raises UserError for a name that is none of ours, not one of torchvision's classification models, and not
    package.module:builder, where builder(num_classes=...) returns an nn.Module whose parameters have their shapes.
    """
    builder = _builder(config.name)
    try:
        model = builder(num_classes=num_classes)
    except TypeError as error:
        if error.__traceback__ and error.__traceback__.tb_next and "num_classes" not in str(error):
            raise  # of something inside
        raise UserError(
            f"model.name={config.name} cannot be called ({error}): it must be a function or a class that takes "
            f"num_classes=, as in builder(num_classes={num_classes})"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={config.name} returned {type(model).__name__}: it must return an nn.Module")
    if lazy := [name for name, tensor in tensors(model) if is_lazy(tensor)]:
        raise UserError(
            f"model.name={config.name} has lazy layers, which take their shapes from the first images "
            f"({some(lazy, 3)}): show it a batch of the images' shape in its "
            "builder, model(torch.zeros(2, 3, 224, 224)) say, or take layers that are told their shapes"
        )
    if config.weights:
        say(weights.load_weights(model, config.name, config.weights, num_classes))
    return model


def refuse_missing(config: ModelConfig) -> None:
    """Raise UserError if model.weights is a path, as no name that torchvision has, and no file is there."""
    if config.weights and not config.weights.isidentifier() and not Path(config.weights).is_file():
        raise UserError(
            f"model.weights={config.weights}: neither a file nor weights that torchvision has for {config.name}"
        )


def load_all(model: nn.Module, state: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Load the whole state_dict of a model of this name, found at path. Raises UserError if it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        why = shorten(" ".join(str(error).splitlines()[1:]), 120, placeholder=" ...")
        raise UserError(f"{path} does not fit model.name={name} ({why}): name the model that was trained") from None


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters and buffers, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _builder(name: str) -> Callable[..., Any]:
    if ":" in name:
        return _own(name)
    if name in MODELS:
        return MODELS[name]
    import torchvision  # takes seconds

    names = torchvision.models.list_models(module=torchvision.models)
    if name in names:
        options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return partial(torchvision.models.get_model, name, **options)
    near = difflib.get_close_matches(name, [*MODELS, *names], n=3) or ["resnet20", "resnet50"]
    raise UserError(f"model.name={name}: no such model; near it: {', '.join(near)}; your own: package.module:builder")


def _own(name: str) -> Callable[..., Any]:
    module, _, builder = name.partition(":")
    try:
        return getattr(importlib.import_module(module), builder)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"model.name={name}: {error}; it must be package.module:builder, importable from here"
        ) from error
