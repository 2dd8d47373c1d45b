"""The residual networks for 32×32 images of He et al. 2016 (arXiv:1512.03385, section 4.2): 6n + 2 layers."""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: subsampled, and padded with zero channels (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.extra_channels:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra_channels // 2, self.extra_channels - self.extra_channels // 2))
        return F.relu(y.add_(x), inplace=True)


class SmallResNet(nn.Module):
    """A 3×3 stem, three stages of n blocks at 1, 2 and 4 times the width, global average, one linear layer."""

    def __init__(self, depth: int, num_classes: int, width: int = 16):
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        assert rest == 0, "a depth is 6n + 2"
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(3):
            for i in range(n):
                out = width * 2**stage
                stages.append(Block(channels, out, stride=2 if stage and i == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.blocks(x)
        return self.fc(x.mean((2, 3)))
