"""What an image and its target go through before they are stacked, and a batch after it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from syncbn.trainer.data.options import WITH_BOXES
from syncbn.trainer.data.sets.masks import IGNORED

if TYPE_CHECKING:
    from syncbn.trainer.data import AugmentConfig, DataConfig


Transform = Callable[[Tensor, Any], tuple[Tensor, Any]]


def of_targets(config: "DataConfig", targets: str) -> tuple[Transform, Transform]:
    """For training and for eval: of images alone, or of each with its mask or boxes, at its own size in eval."""
    if targets in WITH_BOXES:
        return WithBoxes(box_steps(config)), WithBoxes([])
    if targets == "masks":
        return WithMask(mask_steps(config)), WithMask([])
    return ImageAlone(for_training(config)), ImageAlone(for_eval(config))


class ImageAlone:
    """Leaves the target as it is."""

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        self.transform = transform

    def __call__(self, image: Tensor, target: Any) -> tuple[Tensor, Any]:
        return self.transform(image), target


class WithMask:
    """Does the same to an image and to its mask, whose classes are never mixed."""

    def __init__(self, steps: Sequence[nn.Module]):
        self.transform = v2.Compose(steps or [v2.Identity()])

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        image, target = self.transform(tv_tensors.Image(image), tv_tensors.Mask(target))
        return image.as_subclass(Tensor), target.as_subclass(Tensor)


class WithBoxes:
    """Does the same to an image, its boxes and, if it has them, its masks.

    An object of which the steps leave less than one pixel in width or height is removed, with all that is said of it.
    """

    def __init__(self, steps: Sequence[nn.Module]):
        self.steps = v2.Compose(steps) if steps else None

    def __call__(self, image: Tensor, target: Any) -> tuple[Tensor, Any]:
        if self.steps is None:
            return image, target
        parts: Any = {"boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])}  # pyright: ignore[reportCallIssue, reportArgumentType]
        if "masks" in target:
            parts["masks"] = tv_tensors.Mask(target["masks"])
        image, parts = self.steps(tv_tensors.Image(image), parts)
        changed = {name: part.as_subclass(Tensor) for name, part in parts.items()}
        # What small and large go by follows the box
        changed["areas"] = target["areas"] * areas_of(changed["boxes"]) / areas_of(target["boxes"])
        remains = (changed["boxes"][:, 2:] - changed["boxes"][:, :2] >= 1).all(1)
        if "masks" in changed:
            remains &= changed["masks"].flatten(1).bool().any(1)
        return image.as_subclass(Tensor), {name: part[remains] for name, part in (target | changed).items()}


def areas_of(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def box_steps(config: "DataConfig") -> list[nn.Module]:
    """The augmentation of a training image with its boxes; a crop that is larger than the image is padded with grey."""
    augment, steps = config.augment, []
    if augment.photometric:
        steps.append(v2.RandomPhotometricDistort())
    if augment.iou_crop:
        steps.append(v2.RandomIoUCrop())
    if augment.scale != [1.0, 1.0]:
        steps.append(RandomScale(*augment.scale))
    if config.size:
        fill: Any = {tv_tensors.Image: 127, "others": 0}
        steps.append(v2.RandomCrop(config.size, pad_if_needed=True, fill=fill))
    return steps + flips(augment)


def flips(augment: "AugmentConfig") -> list[nn.Module]:
    steps = []
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    return steps


def mask_steps(config: "DataConfig") -> list[nn.Module]:
    """The augmentation of a training image with its mask; a crop that is larger than both is padded."""
    augment, steps = config.augment, []
    if augment.scale != [1.0, 1.0]:
        steps.append(RandomScale(*augment.scale))
    if config.size:
        fill: Any = {tv_tensors.Image: [255 * mean for mean in config.mean], tv_tensors.Mask: IGNORED}
        steps.append(v2.RandomCrop(config.size, pad_if_needed=True, fill=fill))
    steps += flips(augment)
    if augment.photometric:
        steps.append(v2.RandomPhotometricDistort())
    return steps


class RandomScale(v2.Transform):
    """An image and what comes with it at a factor of its size that is drawn from a range."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(()).uniform_(self.low, self.high))
        height, width = v2.query_size(flat_inputs)
        return {"size": [max(1, round(factor * side)) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # A Mask takes the nearest pixel, as F does it
        return F.resize(inpt, params["size"], antialias=True)


def for_training(config: "DataConfig") -> v2.Transform:
    """The augmentation of a training image; uint8 in and out."""
    augment, steps = config.augment, []
    if config.size:
        steps.append(v2.RandomResizedCrop(config.size, antialias=True))
    elif augment.pad:
        steps.append(PaddedCrop(augment.pad))
    steps += flips(augment)
    if augment.policy != "none":
        steps.append(v2.RandAugment() if augment.policy == "rand" else v2.TrivialAugmentWide())
    if augment.erase:
        steps.append(v2.RandomErasing(augment.erase, value=[255 * m for m in config.mean]))  # pyright: ignore[reportArgumentType]
    return v2.Compose(steps or [v2.Identity()])


class PaddedCrop(nn.Module):
    """A random crop to the size the image has, after adding a black border; v2.RandomCrop wants the size fixed."""

    def __init__(self, pad: int):
        super().__init__()
        self.pad = pad

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = torch.randint(2 * self.pad + 1, (2,)).tolist()
        return nn.functional.pad(image, [self.pad] * 4)[..., top : top + height, left : left + width]


def for_eval(config: "DataConfig") -> v2.Transform:
    """The centre of the image, at the scale customary since Krizhevsky 2012 (224 of 256); uint8 in and out."""
    if not config.size:
        return v2.Identity()
    return v2.Compose([v2.Resize(round(config.size * 256 / 224), antialias=True), v2.CenterCrop(config.size)])


def for_batches(augment: "AugmentConfig", classes: int) -> v2.Transform | None:
    """Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), either by chance, or None."""
    kinds = [(v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(chosen) if chosen else None
