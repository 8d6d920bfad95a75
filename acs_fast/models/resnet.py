"""ResNet-18, -50 and -101 with BatchNorm in torchvision's layout: the students and the teacher of `soft`.

The state dicts have torchvision's names and shapes, so that its IMAGENET1K_V1 weights load as they are
(He et al. 2016; the bottleneck is version 1.5, which strides in its 3x3 convolution).
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size but for its stride."""
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


def conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


def downsampling(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut where a block changes the shape; None where it is the identity."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first one strided, with a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsampling(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3 with the stride, 1x1 to four times `width`, with a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = downsampling(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


# name -> kind of block, blocks of each stage
LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class BatchNormResNet(nn.Module):
    """A network of LAYOUTS for images [B, in_channels, size, size]; logits [B, num_classes].

    Stem 3x3 up to 64 px, 3x3 with max pool up to 128 px, 7x7 stride 2 with max pool above, which is
    torchvision's. Convolutions start as N(0, 2 / fan_out) (He), norms as the identity.
    """

    def __init__(self, name: str, in_channels: int, num_classes: int, size: int):
        super().__init__()
        block, depths = LAYOUTS[name]
        large = size > 128
        stem = (7, 2, 3) if large else (3, 1, 1)
        self.conv1 = nn.Conv2d(in_channels, 64, *stem, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if size > 64 else nn.Identity()
        channels = 64
        for stage, depth in enumerate(depths):
            width, blocks = 64 << stage, []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, as the other classifiers call it; torchvision's name is `fc`."""
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: [B, 512], of bottlenecks [B, 2048]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = cast(nn.Module, getattr(self, f"layer{stage}"))(x)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))
