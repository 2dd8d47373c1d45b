"""A small SSD (Liu et al. 2016, arXiv:1512.02325) on a residual network: boxes in small images."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.trainer.models.residual import Block

SIDE = 96  # of the square that images are brought to, in pixels
ANCHOR_SIZES = (17, 23, 29, 38)  # of each level, and one behind the last, in pixels of the square


class Features(nn.Module):
    """Features of images [N, 3, H, W] at strides of 4, 8 and 16, by name: two residual blocks before each."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.first = nn.Sequential(Block(width, width, stride=1), Block(width, width, stride=1))
        stages, channels = [], width
        for out in self.channels(width):
            stages.append(nn.Sequential(Block(channels, out, stride=2), Block(out, out, stride=1)))
            channels = out
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def channels(width: int) -> list[int]:
        return [2 * width, 4 * width, 4 * width]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(F.relu(self.bn1(self.conv1(x)), inplace=True))
        features = {}
        for level, stage in enumerate(self.stages):
            x = stage(x)
            features[str(level)] = x
        return features


def small_ssd(num_classes: int, width: int = 32, **options: Any) -> nn.Module:
    """torchvision's SSD on `Features`, with its calling convention: the losses in training, boxes in eval.

    Images are brought to 96×96; model.image_size and the anchors' keys change that.

    Args:
        num_classes: the background is one of them.
        width: channels of the stem.
        options: of torchvision.models.detection.ssd.SSD.
    """
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator  # takes seconds
    from torchvision.models.detection.ssd import SSD

    backbone: Any = Features(width)
    backbone.out_channels = Features.channels(width)
    anchors = DefaultBoxGenerator([[2]] * len(backbone.out_channels), scales=[size / SIDE for size in ANCHOR_SIZES])
    options = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "detections_per_img": 100, **options}
    return SSD(backbone, anchors, (SIDE, SIDE), num_classes, **options)
