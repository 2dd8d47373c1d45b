"""The size at which torchvision's detectors take their images, and the anchors that they lay over them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from syncbn.trainer.errors import UserError, first_line

LONGER = 1333 / 800  # torchvision's longest side, of its shorter one
OCTAVE = (1, 2 ** (1 / 3), 2 ** (2 / 3))  # RetinaNet's sizes of a level, of its smallest
SSDLITE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision's


def is_ssd(model: nn.Module) -> bool:
    from torchvision.models.detection.ssd import SSD

    return isinstance(model, SSD)


def resize(model: Any, name: str, size: int) -> None:
    """Have a detector take its images at size×size, as SSD does, or at a shorter side of so many pixels."""
    transform = model.transform
    if is_ssd(model):
        transform.fixed_size, transform.min_size, transform.max_size = (size, size), (size,), size
        _channels(model, name)  # raises where nothing is left of the last maps
        # In pixels of torchvision's size; without them the maps tell
        model.anchor_generator.steps = None
    else:
        transform.min_size, transform.max_size = (size,), round(size * LONGER)


def give_anchors(model: Any, name: str, num_classes: int, sizes: Sequence[float], ratios: Sequence[float]) -> None:
    """Give a detector anchors of these sizes, in pixels of the image as it takes it, and ratios; empty: its own.

    Its heads are made anew where their number is another. Raises UserError for a wrong number of sizes, and for a model
    without anchors.
    """
    from torchvision.models.detection.fcos import FCOS
    from torchvision.models.detection.retinanet import RetinaNet

    if isinstance(model, FCOS):
        raise UserError(
            f"model.anchor_sizes={[*sizes]}, model.anchor_ratios={[*ratios]} with model.name={name}: FCOS has no "
            "anchors, but a point for each pixel of its maps; leave both out"
        )
    if is_ssd(model):
        _ssd(model, name, num_classes, sizes, ratios)
    elif isinstance(model, RetinaNet):
        _retinanet(model, name, num_classes, sizes, ratios)
    else:
        _rcnn(model, name, sizes, ratios)


def _ssd(model: Any, name: str, num_classes: int, sizes: Sequence[float], ratios: Sequence[float]) -> None:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    own = model.anchor_generator
    of_maps: Any = [[*ratios] for _ in own.aspect_ratios] if ratios else own.aspect_ratios
    maps, side = len(own.aspect_ratios), model.transform.fixed_size[0]
    if sizes and len(sizes) != maps + 1:
        raise UserError(
            f"model.anchor_sizes={[*sizes]}: model.name={name} has {maps} feature maps, and takes {maps + 1} sizes: "
            "one of each, and one behind the last"
        )
    model.anchor_generator = DefaultBoxGenerator(
        of_maps,
        scales=[size / side for size in sizes] or own.scales,
        steps=own.steps,
        clip=own.clip,
    )
    if ratios:
        give_ssd_head(model, name, num_classes)


def give_ssd_head(model: Any, name: str, num_classes: int) -> None:
    """A new head for the maps of an SSD model's backbone, with all its anchors."""
    from torchvision.models.detection.ssd import SSDHead
    from torchvision.models.detection.ssdlite import SSDLiteHead

    head = partial(SSDLiteHead, norm_layer=SSDLITE_NORM) if isinstance(model.head, SSDLiteHead) else SSDHead
    model.head = head(_channels(model, name), model.anchor_generator.num_anchors_per_location(), num_classes)


def _channels(model: Any, name: str) -> list[int]:
    """Those of each feature map of an SSD model. Raises UserError if its images are too small for the last."""
    from torchvision.models.detection._utils import retrieve_out_channels

    size = model.transform.fixed_size
    try:
        return retrieve_out_channels(model.backbone, size)
    except RuntimeError as error:
        raise UserError(
            f"model.image_size={size[0]}: nothing is left of such an image for the last maps of model.name={name} "
            f"({first_line(error)}): give more, or 0 for torchvision's own"
        ) from None


def _retinanet(model: Any, name: str, num_classes: int, sizes: Sequence[float], ratios: Sequence[float]) -> None:
    from torchvision.models.detection.retinanet import RetinaNetHead

    _refuse_number(model.anchor_generator, name, sizes)
    octaves = [tuple(int(size * step) for step in OCTAVE) for size in sizes]
    model.anchor_generator, changed = _generator(model.anchor_generator, octaves, ratios)
    if changed:
        grouped = any(isinstance(module, nn.GroupNorm) for module in model.head.modules())
        norm = partial(nn.GroupNorm, 32) if grouped else None  # as torchvision's second version has it
        anchors, loss = model.anchor_generator.num_anchors_per_location()[0], model.head.regression_head._loss_type
        model.head = RetinaNetHead(model.backbone.out_channels, anchors, num_classes, norm_layer=norm)
        model.head.regression_head._loss_type = loss


def _rcnn(model: Any, name: str, sizes: Sequence[float], ratios: Sequence[float]) -> None:
    from torchvision.models.detection.rpn import RPNHead

    own = model.rpn.anchor_generator
    if len(own.sizes[0]) > 1:  # all sizes on every level, as torchvision has it with MobileNet
        levels = [tuple(sizes)] * len(own.sizes) if sizes else []
    else:
        _refuse_number(own, name, sizes)
        levels = [(size,) for size in sizes]
    model.rpn.anchor_generator, changed = _generator(own, levels, ratios)
    if changed:
        anchors, depth = model.rpn.anchor_generator.num_anchors_per_location()[0], len(model.rpn.head.conv)
        model.rpn.head = RPNHead(model.backbone.out_channels, anchors, depth)


def _refuse_number(own: Any, name: str, sizes: Sequence[float]) -> None:
    if sizes and len(sizes) != len(own.sizes):
        raise UserError(
            f"model.anchor_sizes={[*sizes]}: model.name={name} has {len(own.sizes)} levels, and takes {len(own.sizes)} "
            "sizes, one of each"
        )


def _generator(own: Any, sizes: Sequence[tuple[float, ...]], ratios: Sequence[float]) -> tuple[Any, bool]:
    """Anchors of sizes by level, and whether they are not as many as its own."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    new = AnchorGenerator(tuple(sizes) or own.sizes, (tuple(ratios),) * len(own.sizes) if ratios else own.aspect_ratios)
    return new, new.num_anchors_per_location() != own.num_anchors_per_location()
