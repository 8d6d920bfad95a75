"""The field's classifiers: structure, shapes, resolutions and the sizes that they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acs_fast.config import InputError
from acs_fast.models.classifier import BasicBlock, build_classifier, default_network


def on_meta(name, in_channels, num_classes, size):
    """The network without memory, and the shape of its last feature map."""
    with torch.device("meta"):
        network = build_classifier(name, in_channels, num_classes, size).eval()
        shapes = []
        layers = [m for m in network.features if isinstance(m, nn.AvgPool2d | BasicBlock)]
        layers[-1].register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
        assert network(torch.empty(3, in_channels, size, size)).shape == (3, num_classes)
    return network, shapes[0]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("in_channels", "num_classes", "size", "depth"),
    [(1, 10, 8, 3), (3, 10, 32, 3), (4, 1000, 32, 3), (3, 7, 130, 5), (3, 10, 224, 6), (2, 3, 9, 1)],
    ids=["digits", "cifar", "latents", "odd-size", "imagenet", "one-block"],
)
def test_convnet_shapes(in_channels, num_classes, size, depth):
    network, last = on_meta(f"convnet-{depth}", in_channels, num_classes, size)
    edge = size
    for _ in range(depth):
        edge //= 2
    assert last == (128, edge, edge)
    expected = {"classifier.weight": (num_classes, 128 * edge**2), "classifier.bias": (num_classes,)}
    for i in range(depth):
        conv, norm = f"features.{4 * i}", f"features.{4 * i + 1}"
        expected[f"{conv}.weight"] = (128, in_channels if i == 0 else 128, 3, 3)
        expected |= {name: (128,) for name in (f"{conv}.bias", f"{norm}.weight", f"{norm}.bias")}
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected


def test_convnet_3_computes_what_the_field_calls_convnet_3():
    torch.manual_seed(0)
    network = build_classifier("convnet-3", 2, 5, 8)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = inputs = torch.randn(3, 2, 8, 8)
    for conv, norm in zip(network.features[0::4], network.features[1::4], strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = (x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)).clamp_min(0)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    expected = x.reshape(3, -1) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=1e-4)


STEMS = {  # size: kernel, stride, max pool, edge of the last feature map
    16: (3, 1, False, 2),
    32: (3, 1, False, 4),
    64: (3, 1, False, 8),
    65: (3, 1, True, 5),
    128: (3, 1, True, 8),
    129: (7, 2, True, 5),
    224: (7, 2, True, 7),
    256: (7, 2, True, 8),
}


@pytest.mark.parametrize("size", STEMS, ids=lambda s: f"{s}px")
def test_resnet_18_stem_follows_the_size(size):
    kernel, stride, pool, edge = STEMS[size]
    network, last = on_meta("resnet-18", 3, 1000, size)
    stem = network.features[0]
    assert (stem.kernel_size, stem.stride, stem.bias) == ((kernel, kernel), (stride, stride), None)
    assert any(isinstance(m, nn.MaxPool2d) for m in network.features) is pool
    assert last == (512, edge, edge)
    blocks = [m for m in network.features if isinstance(m, BasicBlock)]
    assert [b.conv1.out_channels for b in blocks] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [b.conv1.stride[0] for b in blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    # torchvision's ResNet-18 has 11,689,512 parameters with 1000 classes and its 7x7 stem
    assert parameters(network) == 11_689_512 - 64 * 3 * (49 - kernel**2)


@pytest.mark.parametrize(("size", "edge"), [(64, 2), (128, 4), (224, 7)], ids=["64px", "128px", "224px"])
def test_resnetap_10_pools_instead_of_striding(size, edge):
    network, last = on_meta("resnetap-10", 3, 10, size)
    assert last == (512, edge, edge)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.stride == (1, 1) and conv.bias is None for conv in convs)
    assert convs[0].kernel_size == (7, 7) and not any(isinstance(m, nn.MaxPool2d) for m in network.modules())
    assert [conv.out_channels for conv in convs] == [64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512]
    count, width = 64 * 3 * 49 + 2 * 64, 64
    for channels in (64, 128, 256, 512):
        count += 9 * (width + channels) * channels + 4 * channels
        count += 0 if width == channels else (width + 2) * channels
        width = channels
    assert parameters(network) == count + 513 * 10


@pytest.mark.parametrize(
    ("channels", "stride", "pool"),
    [(4, 1, False), (6, 1, False), (6, 2, False), (4, 2, False), (4, 1, True), (6, 2, True)],
    ids=["identity", "widen", "stride", "stride-same-width", "identity-pool", "stride-pool"],
)
def test_basic_block_formula(channels, stride, pool):
    torch.manual_seed(0)
    block = BasicBlock(4, channels, stride, pool)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)

    def norm(x, layer):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(
            1, -1, 1, 1
        )

    def conv(x, layer):
        if pool:  # stride 1
            return F.conv2d(x, layer.weight, padding=layer.weight.shape[-1] // 2)
        return F.conv2d(x, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2)

    def average(x):
        return F.avg_pool2d(x, stride) if pool else x

    x = torch.randn(2, 4, 8, 8)
    y = average(norm(conv(x, block.conv1), block.norm1).clamp_min(0))
    y = norm(F.conv2d(y, block.conv2.weight, padding=1), block.norm2)
    shortcut = x
    if stride > 1 or channels != 4:
        shortcut = norm(average(conv(x, block.shortcut[0])), block.shortcut[2])
    torch.testing.assert_close(block(x), (y + shortcut).clamp_min(0), rtol=1e-4, atol=1e-4)


SIZES = (32, 64, 128, 224, 256)
# parameters with 3 channels and 10 classes, and the last feature map's edge, at each size; None: too small.
# A ConvNet block has 9 * 128 * 128 + 3 * 128 = 147,840, the first 9 * 3 * 128 + 384 = 3,840, the head
# 128 * edge^2 * 10 + 10. ResNet-18 has 11,181,642 with the stem of 7x7, 64 * 3 * 40 fewer with that of 3x3.
# ResNetAP-10: stem 9,536, stages 73,984, 230,144, 919,040 and 3,673,088, head 5,130.
PUBLISHED = {
    "convnet-3": [(320_010, 4), (381_450, 8), (627_210, 16), (1_303_050, 28), (1_610_250, 32)],
    "convnet-4": [(452_490, 2), (467_850, 4), (529_290, 8), (698_250, 14), (775_050, 16)],
    "convnet-5": [(596_490, 1), (600_330, 2), (615_690, 4), (657_930, 7), (677_130, 8)],
    "convnet-6": [None, (744_330, 1), (748_170, 2), (754_570, 3), (763_530, 4)],
    "resnet-18": [(11_173_962, 4), (11_173_962, 8), (11_173_962, 8), (11_181_642, 7), (11_181_642, 8)],
    "resnetap-10": [None, (4_910_922, 2), (4_910_922, 4), (4_910_922, 7), (4_910_922, 8)],
}
CASES = [(name, size, row) for name in PUBLISHED for size, row in zip(SIZES, PUBLISHED[name], strict=True)]


@pytest.mark.parametrize(("name", "size", "row"), CASES, ids=[f"{name}-{size}px" for name, size, _ in CASES])
def test_parameters_and_shapes_are_the_published_ones(name, size, row):
    if row is None:
        with pytest.raises(InputError, match=f"{name} needs images of 64 px, these are {size}"):
            build_classifier(name, 3, 10, size)
        return
    count, edge = row
    network, last = on_meta(name, 3, 10, size)
    channels = 128 if name.startswith("convnet") else 512
    assert (parameters(network), last) == (count, (channels, edge, edge))


@pytest.mark.parametrize("name", ["convnet-3", "resnet-18", "resnetap-10"])
def test_every_norm_is_affine_with_one_group_a_channel(name):
    network, _ = on_meta(name, 3, 10, 64)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == {"convnet-3": 3, "resnet-18": 20, "resnetap-10": 12}[name]
    assert all(m.num_groups == m.num_channels and m.affine for m in norms)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Dropout) for m in network.modules())


@pytest.mark.parametrize(("name", "size"), [("resnet-18", 16), ("resnetap-10", 64)])
def test_resnet_convolutions_start_with_the_fan_out_deviation(name, size):
    torch.manual_seed(0)
    for module in build_classifier(name, 3, 10, size).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("name", "size"),
    [("convnet-1", 2), ("convnet-3", 8), ("convnet-6", 64), ("resnet-18", 16), ("resnetap-10", 64)],
)
def test_smallest_size_works_and_one_pixel_less_is_refused(name, size):
    network, _ = on_meta(name, 1, 2, size)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # a single pixel would be normalised to a constant
            module.register_forward_pre_hook(lambda module, args: check_pixels(args[0]))
    network(torch.empty(1, 1, size, size, device="meta"))
    with pytest.raises(InputError, match=rf"{name} needs images of {size} px, these are {size - 1}"):
        build_classifier(name, 1, 2, size - 1)


def check_pixels(x):
    assert x.shape[2] * x.shape[3] > 1, x.shape


@pytest.mark.parametrize(
    "name",
    [
        "",
        "convnet",
        "convnet-",
        "convnet-0",
        "convnet--1",
        "convnet-x",
        "convnet-3.0",
        "resnet-50",
        "resnet34",
        "ResNet-18",
    ],
)
def test_unknown_network_is_refused(name):
    with pytest.raises(InputError, match="there is no network"):
        build_classifier(name, 3, 10, 64)


def test_superscript_depth_is_refused():
    with pytest.raises(InputError):
        build_classifier("convnet-\N{SUPERSCRIPT TWO}", 3, 10, 64)


@pytest.mark.parametrize(
    ("size", "depth"),
    [
        (8, 3),
        (16, 3),
        (28, 3),
        (32, 3),
        (33, 4),
        (64, 4),
        (65, 5),
        (128, 5),
        (129, 6),
        (224, 6),
        (256, 6),
        (1024, 6),
    ],
)
def test_default_network_fits_the_size(size, depth):
    assert default_network(size) == f"convnet-{depth}"
    with torch.device("meta"):
        build_classifier(default_network(size), 3, 10, size)
