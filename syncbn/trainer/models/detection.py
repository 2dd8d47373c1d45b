"""torchvision's detectors by name: from scratch, for images of any size; and what one has to know to use one."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from syncbn.trainer.errors import UserError, some

# What torchvision's builders fill in themselves, and what would fetch something
NO_OPTIONS = {"num_classes", "weights", "weights_backbone", "progress", "norm_layer"}
NO_OPTIONS |= {"trainable_backbone_layers"}  # heeded with weights alone, that are to be loaded afterwards here
# What torchvision's generators of anchors are made of; SSD's scales are shares of the size
ANCHORS = ("sizes", "scales", "aspect_ratios", "steps")


def names() -> list[str]:
    import torchvision  # takes seconds

    return torchvision.models.list_models(module=torchvision.models.detection)


def builder(name: str) -> Callable[..., nn.Module]:
    """That of one of `names`. Raises UserError for one that wants what no data here has."""
    if name.startswith("keypointrcnn"):
        raise UserError(
            f"model.name={name} wants keypoints, which no data here has; near it: {name.replace('keypoint', 'faster')}"
        )
    return partial(_build, name)


def _build(name: str, num_classes: int, **options: Any) -> nn.Module:
    import torchvision

    build = torchvision.models.get_model_builder(name)
    if unknown := options.keys() & NO_OPTIONS:
        raise TypeError(f"{name} takes no '{min(unknown)}' here")
    model = build(weights=None, weights_backbone=None, num_classes=num_classes, **options)
    # Its classes hand on what they do not know, and the last one takes all
    taken = _keywords(build, model)
    if unknown := options.keys() - set(taken):
        raise TypeError(f"{name} takes no '{min(unknown)}', but {some(taken, 12)}")
    return model


def _keywords(build: Callable[..., nn.Module], model: nn.Module) -> list[str]:
    """The keyword arguments that are a number or a list, of a builder and the classes of its model."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    kinds = [kind for kind in type(model).__mro__ if kind is not nn.Module and issubclass(kind, nn.Module)]
    called = [build, *(kind.__init__ for kind in [*kinds, GeneralizedRCNNTransform])]
    parameters = [p for call in called for p in inspect.signature(call).parameters.values()]
    optional = [p.name for p in parameters if p.default is None or isinstance(p.default, int | float)]
    return [*dict.fromkeys(name for name in optional if name not in NO_OPTIONS)]


def card(model: Any) -> dict[str, Any]:
    """What one has to know of a detector of torchvision's to use it; nothing of another."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    if not isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform):
        return {}
    transform = model.transform
    anchors = model.anchor_generator if hasattr(model, "anchor_generator") else model.rpn.anchor_generator
    choice = model if hasattr(model, "score_thresh") else model.roi_heads
    fixed = transform.fixed_size  # width, height
    sides = {"height": fixed[1], "width": fixed[0]} if fixed else {}
    # Of several shorter sides evaluation takes the last
    return {
        "size": sides or {"shorter_side": transform.min_size[-1], "longest_side": transform.max_size},
        "mean": transform.image_mean,
        "std": transform.image_std,
        "anchors": {key: getattr(anchors, key) for key in ANCHORS if hasattr(anchors, key)},
        "scores": _scores(model),
        **{key: getattr(choice, key) for key in ("score_thresh", "nms_thresh", "detections_per_img")},
    }


def _scores(model: nn.Module) -> str:
    """What the score of a box is, in words."""
    from torchvision.models.detection.fcos import FCOS
    from torchvision.models.detection.retinanet import RetinaNet

    if isinstance(model, RetinaNet):
        return "sigmoid of the box's class"
    if isinstance(model, FCOS):
        return "square root of the sigmoid of the box's class times that of its centredness"
    return "the class's share of a softmax over the background and all classes"
