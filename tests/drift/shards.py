"""A small network, and the images that each rank gives to it."""

import torch
from torch import nn

import syncbn

CHANNELS = 6


class Net(nn.Module):
    """Two layers and their norms."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, CHANNELS, 3), norm(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3), norm(CHANNELS)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x))


def net(sync=True, **options):
    torch.manual_seed(0)
    model = Net()
    return syncbn.convert(model, **options) if sync else model


def images(rank, step, count, *, shift=0.0):
    """Images that differ, as those of a camera do: each its own brightness."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    noise = torch.randn(count, 3, 6, 6, generator=generator)
    return noise + torch.randn(count, 3, 1, 1, generator=generator) + shift
