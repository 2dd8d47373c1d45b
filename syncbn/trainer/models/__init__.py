"""Models by name: ours for small images, torchvision's, or the user's own. All of them know nn.BatchNorm2d only."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncbn.trainer.errors import UserError, first_line, some
from syncbn.trainer.models import anchors, backbones, detection, smp, weights
from syncbn.trainer.models.detection import card as card
from syncbn.trainer.models.residual import SmallResNet
from syncbn.trainer.models.ssd import small_ssd
from syncbn.trainer.models.unet import UNet
from syncbn.trainer.option import option


@dataclass
class ModelConfig:
    name: str = option("resnet8", "ours, torchvision's, smp/ARCHITECTURE/ENCODER, or package.module:builder")
    weights: str | None = option(None, "torchvision's name of trained weights (DEFAULT, ...), or a state_dict's file")
    backbone_weights: str | None = option(None, "the same for the backbone alone, of the classifier that it is from")
    unfreeze_norms: bool = option(False, "batch norm that comes frozen takes statistics, and its weights train")
    image_size: int = option(0, "torchvision's detectors: SSD's side, others' shorter side, in pixels; 0: its own")
    anchor_sizes: list[float] = option(
        list, "the same: sides of anchors, of each map; docs/detection.md; none: its own"
    )
    anchor_ratios: list[float] = option(list, "the same: ratios of their sides, on every map; none: its own")
    options: dict[str, Any] = option(dict, "keyword arguments of its builder: model.options.width=32")

    def __post_init__(self) -> None:
        if self.image_size < 0:
            raise UserError(f"model.image_size={self.image_size}: give a side in pixels, or 0 for the model's own")
        for key in "anchor_sizes", "anchor_ratios":
            if not all(number > 0 for number in getattr(self, key)):
                raise UserError(f"model.{key}={getattr(self, key)}: give numbers above 0")
        if self.weights and self.backbone_weights:
            raise UserError(
                f"model.weights={self.weights} with model.backbone_weights={self.backbone_weights}: the former hold a "
                "backbone too; choose one of the two"
            )
        if "num_classes" in self.options:
            raise UserError("model.options.num_classes: the data tells how many classes there are; leave it out")


DETECTORS = {"small_ssd": small_ssd}
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(SmallResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "unet": UNet,
    **DETECTORS,
}


def build(config: ModelConfig, num_classes: int, say: Callable[[str], Any] = lambda said: None) -> nn.Module:
    """The model of the config, for images [N, 3, H, W] and scores of num_classes; say is told what was loaded.

    A detector takes a list of images [3, H, W], and counts the background among its classes.

    Raises UserError for a name that is none of ours, not one of torchvision's classification, segmentation and
    detection models or of segmentation-models-pytorch, and not package.module:builder, where
    builder(num_classes=..., **options) returns an nn.Module whose parameters have their shapes; and for options that
    the builder does not take.
    """
    model = build_blank(config, num_classes)
    if config.weights:
        say(weights.load_weights(model, config.name, config.weights, num_classes))
    if config.backbone_weights:
        say(weights.load_backbone(model, config.name, config.backbone_weights))
    return model


def build_blank(config: ModelConfig, num_classes: int) -> nn.Module:
    """The same with none of its weights loaded yet, as it is to take them, or those of a checkpoint."""
    model = _built(config, num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name={config.name} returned {type(model).__name__}: it must return an nn.Module")
    if lazy := [name for name, tensor in tensors(model) if is_lazy(tensor)]:
        raise UserError(
            f"model.name={config.name} has lazy layers, which take their shapes from the first images "
            f"({some(lazy, 3)}): show it a batch of the images' shape in its "
            "builder, model(torch.zeros(2, 3, 224, 224)) say, or take layers that are told their shapes"
        )
    if is_detector(config.name):
        _shape_detector(model, config, num_classes)
    else:
        _refuse_keys_of_detectors(config)
    if config.unfreeze_norms:
        backbones.thaw(model)
    return model


def is_detector(name: str) -> bool:
    """Whether it is one of ours or of torchvision's, by its name."""
    if name in DETECTORS:
        return True
    return ":" not in name and not name.startswith(smp.PREFIX) and name not in MODELS and name in detection.names()


def _shape_detector(model: Any, config: ModelConfig, num_classes: int) -> None:
    """Make a detector of torchvision's what the config says, and its own builder where weights are named."""
    if config.name.startswith("ssdlite") and config.backbone_weights:
        backbones.give_full_tail(model, config.name, num_classes)
    if config.image_size:
        anchors.resize(model, config.name, config.image_size)
    if config.anchor_sizes or config.anchor_ratios:
        anchors.give_anchors(model, config.name, num_classes, config.anchor_sizes, config.anchor_ratios)
    if (config.weights or config.backbone_weights) and config.name in backbones.FROZEN and not config.unfreeze_norms:
        of_coco = config.weights in ("COCO_V1", "DEFAULT") and config.name in backbones.WITHOUT_EPS
        backbones.freeze(model.backbone, eps=0.0 if of_coco else None)


def _refuse_keys_of_detectors(config: ModelConfig) -> None:
    for key in "image_size", "anchor_sizes", "anchor_ratios":
        if value := getattr(config, key):
            raise UserError(
                f"model.{key}={value} with model.name={config.name}: only detectors have that, by name "
                "(small_ssd, ssdlite320_mobilenet_v3_large, ...); leave it out"
            )


def _built(config: ModelConfig, num_classes: int) -> Any:
    builder = _builder(config.name)
    try:
        return builder(num_classes=num_classes, **config.options)
    except Exception as error:
        text, own = str(error), ":" in config.name
        named = isinstance(error, TypeError) and any(f"'{name}'" in text for name in config.options)
        if config.options and (named or not own):
            raise UserError(
                f"model.options={config.options} do not fit model.name={config.name} ({first_line(error)}): give "
                f"keyword arguments of its builder{_taken(builder)}"
            ) from error
        if config.name.startswith(smp.PREFIX):
            raise UserError(
                f"model.name={config.name} cannot be built ({first_line(error)}): choose another architecture or "
                "encoder"
            ) from error
        deeper = error.__traceback__ and error.__traceback__.tb_next
        if not isinstance(error, TypeError) or (deeper and "num_classes" not in text):
            raise  # of something inside
        raise UserError(
            f"model.name={config.name} cannot be called ({error}): it must be a function or a class that takes "
            f"num_classes=, as in builder(num_classes={num_classes})"
        ) from error


def _taken(builder: Callable[..., Any]) -> str:
    """Which keyword arguments it names, in brackets; nothing if it names none."""
    parameters = inspect.signature(builder).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [name for name in keywords if name not in ("num_classes", "name", "weights", "progress")]
    return f" ({some(keywords, 8)})" if keywords else ""


def refuse_missing(config: ModelConfig) -> None:
    """Raise UserError if weights are asked for by a path, as no name that torchvision has, and no file is there."""
    for key in "weights", "backbone_weights":
        path = getattr(config, key)
        if path and not path.isidentifier() and not Path(path).is_file():
            raise UserError(f"model.{key}={path}: neither a file nor weights that torchvision has for {config.name}")


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
    if name.startswith(smp.PREFIX):
        return smp.builder(name)
    if name in MODELS:
        return MODELS[name]
    import torchvision  # takes seconds

    classifiers, segmenters = (
        torchvision.models.list_models(module=module)
        for module in (torchvision.models, torchvision.models.segmentation)
    )
    if name in (detectors := detection.names()):
        return detection.builder(name)
    if name in classifiers or name in segmenters:
        builder = torchvision.models.get_model_builder(name)
        return partial(builder, **_from_scratch(name, inspect.signature(builder).parameters))
    names = [*MODELS, *classifiers, *segmenters, *detectors]
    near = difflib.get_close_matches(name, names, n=3) or ["resnet20", "resnet50"]
    raise UserError(f"model.name={name}: no such model; near it: {', '.join(near)}; your own: package.module:builder")


def _from_scratch(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which torchvision's builder of that name fetches nothing, and gives all heads that it has."""
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    scratch = {"weights_backbone": None, "aux_loss": True}  # as its trained weights have it
    return {key: value for key, value in scratch.items() if key in parameters}


def _own(name: str) -> Callable[..., Any]:
    module, _, builder = name.partition(":")
    try:
        return getattr(importlib.import_module(module), builder)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"model.name={name}: {error}; it must be package.module:builder, importable from here"
        ) from error
