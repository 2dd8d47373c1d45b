"""The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), with batch norm, for images of any size."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolutions(channels: int, out: int) -> nn.Sequential:
    """Two 3×3 convolutions, each with its norm and ReLU."""
    layers: list[nn.Module] = []
    for before in (channels, out):
        layers += [nn.Conv2d(before, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Scores [N, num_classes, H, W] of images [N, 3, H, W]: down by halves and up again, joined at each size.

    Args:
        depth: how often the size is halved; a side that is odd there is taken with its last pixel alone.
        width: channels at full size, doubled with each halving.
    """

    def __init__(self, num_classes: int, depth: int = 3, width: int = 16):
        super().__init__()
        if depth < 0 or width < 1:
            raise ValueError(f"depth={depth}, width={width}: give a depth of 0 or more and a width of 1 or more")
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = convolutions(3, width)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(convolutions(before, out) for before, out in pairs)
        self.narrow = nn.ModuleList(nn.Conv2d(out, before, 1) for before, out in reversed(pairs))
        self.up = nn.ModuleList(convolutions(2 * before, before) for before, _ in reversed(pairs))
        self.head = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.stem(x)]
        for down in self.down:
            sizes.append(down(F.max_pool2d(sizes[-1], 2, ceil_mode=True)))
        y = sizes.pop()
        for narrow, up in zip(self.narrow, self.up, strict=True):
            skip = sizes.pop()
            y = F.interpolate(narrow(y), skip.shape[-2:], mode="bilinear")
            y = up(torch.cat([skip, y], 1))
        return self.head(y)
