"""The part of a detector that a classifier was: under its names, with all its layers, its norms frozen or live."""

from typing import Any

import torch
from torch import nn

from syncbn.trainer.models.anchors import SSDLITE_NORM, give_ssd_head

# torchvision's builders of these take batch norm as it was trained, wherever weights are named
FROZEN = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
)
# ... and the weights of these were trained when a frozen layer had no eps
WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")
TENSORS = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5  # torch's


def freeze(module: nn.Module, eps: float | None = None) -> None:
    """Put torchvision's FrozenBatchNorm2d in the place of each nn.BatchNorm2d. eps: None for that of each layer."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    for parent, name, layer in _children(module):
        if type(layer) is nn.BatchNorm2d:
            frozen = FrozenBatchNorm2d(layer.num_features, layer.eps if eps is None else eps)
            _take_over(frozen, layer)
            setattr(parent, name, frozen)


def thaw(module: nn.Module) -> int:
    """Put an nn.BatchNorm2d in the place of each FrozenBatchNorm2d, whoever wrote it; how many there were."""
    made: dict[nn.Module, nn.BatchNorm2d] = {}
    for parent, name, layer in _children(module):
        # torchvision's, or a copy of it, of which there are many
        if type(layer).__name__ == "FrozenBatchNorm2d" and all(hasattr(layer, tensor) for tensor in TENSORS):
            if layer not in made:
                # One without eps would divide by the 0 of a channel that is everywhere the same
                made[layer] = nn.BatchNorm2d(len(layer.weight), getattr(layer, "eps", EPS) or EPS)
                _take_over(made[layer], layer)
            setattr(parent, name, made[layer])
    return len(made)


def _children(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """All modules inside, each with what it is part of and its name there; one in two places is there twice."""
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


@torch.no_grad()
def _take_over(new: Any, old: Any) -> None:
    for tensor in TENSORS:
        getattr(new, tensor).copy_(getattr(old, tensor))
    new.train(old.training)


def give_full_tail(model: Any, name: str, num_classes: int) -> None:
    """Give an SSDlite the whole of its classifier's last layers, of which it has half of the channels from scratch."""
    from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
    from torchvision.models.mobilenetv3 import mobilenet_v3_large

    features = mobilenet_v3_large(norm_layer=SSDLITE_NORM).features
    fourth = max(i for i, block in enumerate(features) if getattr(block, "_is_cn", False))
    model.backbone = SSDLiteFeatureExtractorMobileNet(features, fourth, SSDLITE_NORM)
    give_ssd_head(model, name, num_classes)


def classifier_part(backbone: Any) -> nn.Module:
    """The part of a backbone that a classifier has too, with the same tensors under the classifier's names."""
    from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
    from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet

    if isinstance(backbone, SSDFeatureExtractorVGG):
        second: Any = backbone.extra[0]  # up to the layers that are SSD's own
        return nn.Sequential(*backbone.features, *second[:-1])
    if isinstance(backbone, SSDLiteFeatureExtractorMobileNet):
        features: Any = backbone.features
        first, second = features  # the last block of the one goes on in the other
        cut = nn.Module()
        cut.block = nn.Sequential(first[-1], *second[0])
        return nn.Sequential(*first[:-1], cut, *second[1:])
    body = getattr(backbone, "body", None)  # under a feature pyramid
    return body if isinstance(body, nn.Module) else backbone
