"""The models of segmentation-models-pytorch, where it is installed, for images of any size."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.errors import UserError

PREFIX = "smp/"


class Padded:
    """Before a model's class: images are padded below and on the right with zeros to sides that its strides divide."""

    def forward(self, x: Tensor) -> Tensor:
        stride = self.encoder.output_stride  # pyright: ignore[reportAttributeAccessIssue]
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % stride, 0, -height % stride))
        return super().forward(padded)[..., :height, :width]  # pyright: ignore[reportAttributeAccessIssue]


def builder(name: str) -> Callable[..., nn.Module]:
    """That of smp/ARCHITECTURE/ENCODER, smp/unet/resnet34 say; without an encoder, of the library's own choice."""
    try:
        library = importlib.import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise UserError(
            f"model.name={name}: segmentation-models-pytorch is not installed ({error}): pip install -e '.[segment]'"
        ) from None
    _, architecture, *encoder = name.split("/", 2)
    architectures, encoders = library.MODEL_ARCHITECTURES_MAPPING, library.encoders.get_encoder_names()
    _refuse_unknown(name, "architecture", architecture.lower(), list(architectures))
    if encoder and not encoder[0].startswith("tu-"):  # of timm, as many as it has
        _refuse_unknown(name, "encoder", encoder[0], encoders)
    return partial(_build, library, architecture, *encoder)


def _refuse_unknown(name: str, what: str, given: str, there_are: list[str]) -> None:
    if given not in there_are:
        near = difflib.get_close_matches(given, there_are, n=3) or sorted(there_are)[:3]
        raise UserError(f"model.name={name}, as in smp/unet/resnet34: no such {what}; near it: {', '.join(near)}")


def _build(library: Any, architecture: str, encoder: str = "resnet34", *, num_classes: int, **given: Any) -> nn.Module:
    taken = inspect.signature(library.MODEL_ARCHITECTURES_MAPPING[architecture.lower()]).parameters
    # The library takes any, and hands those that it does not know to timm
    if (unknown := given.keys() - taken.keys()) and not encoder.startswith("tu-"):
        raise TypeError(f"{architecture} takes no {min(unknown)}, but {', '.join(taken)}")
    options = {"encoder_weights": None, **given}  # nothing is fetched unless asked for
    model = library.create_model(architecture, encoder, classes=num_classes, **options)
    if model.requires_divisible_input_shape:
        model.__class__ = type(type(model).__name__, (Padded, type(model)), {})
    return model
