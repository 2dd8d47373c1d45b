"""What an image goes through before it is stacked, and a batch after it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

if TYPE_CHECKING:
    from syncbn.trainer.data import AugmentConfig, DataConfig


def for_training(config: "DataConfig") -> v2.Transform:
    """The augmentation of a training image; uint8 in and out."""
    augment, steps = config.augment, []
    if config.size:
        steps.append(v2.RandomResizedCrop(config.size, antialias=True))
    elif augment.pad:
        steps.append(PaddedCrop(augment.pad))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
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
