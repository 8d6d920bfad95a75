"""The field's ConvNet-D, ResNet-18 and ResNetAP-10 (PROTOCOLS.md section 1), all with GroupNorm(C, C).

Those with BatchNorm, which `soft` trains, are in resnet.py; `build_classifier` makes every one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.config import InputError
from acs_fast.kernels.structures import Block, Head, Network
from acs_fast.models.resnet import LAYOUTS, BatchNormResNet

CONVNET_WIDTH = 128
# below these sizes a GroupNorm(C, C) would see a single pixel and output a constant; a BatchNorm sees those
# of a batch, and 8 px leave one after the three strides
MINIMUM_SIZE = {"resnet-18": 16, "resnetap-10": 64, **dict.fromkeys(LAYOUTS, 8)}


def build_classifier(name: str, in_channels: int, num_classes: int, size: int) -> nn.Module:
    """A classifier of images or latents [B, in_channels, size, size].

    name: `convnet-<depth>`, `resnet-18` or `resnetap-10`; with BatchNorm `resnet18`, `resnet50` or
    `resnet101`, as torchvision writes them. Each has `features` and `classifier`, its last layer.
    Raises InputError for an unknown name or an image too small for the network.
    """
    kind, _, depth = name.partition("-")
    if kind == "convnet" and depth.isascii() and depth.isdecimal() and int(depth) >= 1:
        if size >> int(depth) == 0:
            needed = 2 ** min(int(depth), 16)
            raise InputError(f"{name} needs images of {needed} px, these are {size}; use a smaller depth")
        return ConvNet(in_channels, num_classes, size, int(depth))
    if name not in MINIMUM_SIZE:
        known = ", ".join(("convnet-<depth>", *MINIMUM_SIZE))
        raise InputError(f"there is no network {name!r}; use one of {known}")
    if size < MINIMUM_SIZE[name]:
        raise InputError(f"{name} needs images of {MINIMUM_SIZE[name]} px, these are {size}; use a convnet")
    if name == "resnet-18":
        return ResNet(in_channels, num_classes, size)
    if name in LAYOUTS:
        return BatchNormResNet(name, in_channels, num_classes, size)
    return ResNetAP(in_channels, num_classes)


def seeded_classifier(name: str, in_channels: int, num_classes: int, size: int, seed: int) -> nn.Module:
    """`build_classifier` with weights that are a function of the seed; every random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too, for good
        return build_classifier(name, in_channels, num_classes, size)


def default_network(size: int) -> str:
    """The ConvNet whose depth fits the image size: 3 up to 32 px, 4 at 64, 5 at 128, 6 at 224 and above."""
    return f"convnet-{min(6, max(3, math.ceil(math.log2(size)) - 2))}"


def instance_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with one group a channel, affine: what the field calls instance norm."""
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """depth x [conv3x3 with bias, norm, ReLU, AvgPool2] of 128 channels, then linear on the flat features."""

    def __init__(self, in_channels: int, num_classes: int, size: int, depth: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                nn.Conv2d(in_channels if i == 0 else CONVNET_WIDTH, CONVNET_WIDTH, 3, padding=1),
                instance_norm(CONVNET_WIDTH),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(CONVNET_WIDTH * (size >> depth) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def stack_convnets(networks: Sequence[ConvNet], dtype: torch.dtype) -> Network:
    """The parameters of ConvNets of one architecture as the ops take them: stacked, in `dtype`."""

    def stack(modules: Iterable[nn.Module], name: str) -> Tensor:
        return torch.stack([getattr(module, name).detach() for module in modules]).to(dtype).contiguous()

    blocks = []
    for i in range(0, len(networks[0].features), 4):  # convolution, norm, activation, pool
        convs, norms = [n.features[i] for n in networks], [n.features[i + 1] for n in networks]
        blocks.append(Block(*(stack(m, key) for m in (convs, norms) for key in ("weight", "bias"))))
    heads = [n.classifier for n in networks]
    return Network(tuple(blocks), Head(stack(heads, "weight"), stack(heads, "bias")))


def _init_convs(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; `pool` strides by average pooling after the first (ResNetAP)."""

    def __init__(self, in_channels: int, channels: int, stride: int, pool: bool = False):
        super().__init__()
        conv_stride = 1 if pool else stride
        self.pool = nn.AvgPool2d(stride) if pool and stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, conv_stride, 1, bias=False)
        self.norm1 = instance_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = instance_norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, conv_stride, bias=False)
            pooling = nn.AvgPool2d(stride) if pool and stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(conv, pooling, instance_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18; stem 3x3 up to 64 px, 3x3 with max pool up to 128 px, 7x7 stride 2 with max pool above."""

    def __init__(self, in_channels: int, num_classes: int, size: int):
        super().__init__()
        large = size > 128
        stem = nn.Conv2d(in_channels, 64, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        layers: list[nn.Module] = [stem, instance_norm(64), nn.ReLU()]
        if size > 64:
            layers.append(nn.MaxPool2d(3, 2, 1))
        width = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [BasicBlock(width, channels, stride), BasicBlock(channels, channels, 1)]
            width = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(512, num_classes)
        _init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class ResNetAP(nn.Module):
    """ResNetAP-10: one block a stage, stride 1 everywhere, average pooling instead; stem 7x7, AvgPool(4)."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        stem = nn.Conv2d(in_channels, 64, 7, 1, 3, bias=False)
        layers: list[nn.Module] = [stem, instance_norm(64), nn.ReLU(), nn.AvgPool2d(4)]
        width = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers.append(BasicBlock(width, channels, stride, pool=True))
            width = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(512, num_classes)
        _init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
