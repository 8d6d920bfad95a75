"""ResNets with BatchNorm: torchvision's names, shapes and counts; their arithmetic in plain functions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast import DistillConfig, InputError
from acs_fast.config import BenchConfig
from acs_fast.config.fields import BATCH_NORM_NETWORKS
from acs_fast.models.classifier import build_classifier
from acs_fast.models.resnet import LAYOUTS

# torchvision's published counts with 1000 classes, and how many blocks its stages have
COUNTS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet101": 44_549_160}
STAGES = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def published(name: str, in_channels: int = 3, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's state dict, in its order."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, in_channels, 7, 7)}

    def norm(at: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{at}.{entry}"] = (channels,)
        shapes[f"{at}.num_batches_tracked"] = ()

    norm("bn1", 64)
    seen, wide = 64, 1 if name == "resnet18" else 4
    for stage, blocks in enumerate(STAGES[name], start=1):
        width = 32 * 2**stage
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            kernels = [(width, seen, 3), (width, width, 3)]
            if wide == 4:
                kernels = [(width, seen, 1), (width, width, 3), (4 * width, width, 1)]
            for number, (out, into, edge) in enumerate(kernels, start=1):
                shapes[f"{at}.conv{number}.weight"] = (out, into, edge, edge)
                norm(f"{at}.bn{number}", out)
            if block == 0 and seen != wide * width:
                shapes[f"{at}.downsample.0.weight"] = (wide * width, seen, 1, 1)
                norm(f"{at}.downsample.1", wide * width)
            seen = wide * width
    shapes["fc.weight"], shapes["fc.bias"] = (num_classes, seen), (num_classes,)
    return shapes


def on_meta(name: str, in_channels: int, num_classes: int, size: int) -> nn.Module:
    with torch.device("meta"):
        return build_classifier(name, in_channels, num_classes, size)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("in_channels", "num_classes"), [(3, 1000), (1, 10)], ids=["imagenet", "grey"])
def test_the_state_dict_is_torchvisions(name: str, in_channels: int, num_classes: int) -> None:
    network = on_meta(name, in_channels, num_classes, 224)
    found = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert list(found.items()) == list(published(name, in_channels, num_classes).items())
    if num_classes == 1000:
        assert parameters(network) == COUNTS[name]


@pytest.mark.parametrize("counted", [True, False], ids=["with-counters", "without"])
def test_published_weights_load_strictly(counted: bool) -> None:
    # torchvision's oldest files were written before BatchNorm counted its batches
    weights = {
        name: torch.full(shape, 2.0)
        for name, shape in published("resnet18").items()
        if counted or not name.endswith("num_batches_tracked")
    }
    network = build_classifier("resnet18", 3, 1000, 224)
    network.load_state_dict(weights)
    assert all(bool((p == 2.0).all()) for p in network.parameters())


SMALL_STEM = 64 * 3 * (49 - 9)  # parameters that a 3x3 stem has fewer
EDGES = {32: 4, 64: 8, 128: 8, 224: 7, 256: 8}
WITH_10 = {"resnet18": 11_181_642, "resnet50": 23_528_522, "resnet101": 42_520_650}  # at 224 px


@pytest.mark.parametrize("size", EDGES, ids=lambda size: f"{size}px")
@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_shapes_at_every_size(name: str, size: int) -> None:
    network, maps = on_meta(name, 3, 10, size), []
    network.layer4.register_forward_hook(lambda module, args, output: maps.append(tuple(output.shape)))
    x, width = torch.empty(2, 3, size, size, device="meta"), 512 if name == "resnet18" else 2048
    assert network(x).shape == (2, 10)
    assert network.features(x).shape == (2, width)
    assert maps[0] == (2, width, EDGES[size], EDGES[size])
    assert parameters(network) == WITH_10[name] - (0 if size > 128 else SMALL_STEM)
    assert network.classifier is network.fc


def randomise(network: nn.Module) -> None:
    """Weights, statistics and biases of their own everywhere, of a size that keeps the activations near 1."""
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.ndim > 1:
            value.normal_(0.0, math.sqrt(1.0 / value[0].numel()))
        elif value.ndim == 1:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)


def transcribed(state: dict[str, Tensor], name: str, x: Tensor, size: int, training: bool) -> Tensor:
    """The logits by He et al. 2016 in plain functions, with statistics of the batch if `training`."""

    def norm(x: Tensor, at: str) -> Tensor:
        mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return x * state[f"{at}.weight"].view(1, -1, 1, 1) + state[f"{at}.bias"].view(1, -1, 1, 1)

    def conv(x: Tensor, at: str, stride: int = 1) -> Tensor:
        weight = state[f"{at}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = norm(conv(x, "conv1", 2 if size > 128 else 1), "bn1").clamp_min(0)
    if size > 64:
        edge = (x.shape[-1] + 1) // 2
        x = F.pad(x, (1, 1, 1, 1), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
        assert x.shape[-1] == edge
    for stage in range(1, 5):
        for block in range(STAGES[name][stage - 1]):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            if name == "resnet18":
                y = norm(conv(x, f"{at}.conv1", stride), f"{at}.bn1").clamp_min(0)
                y = norm(conv(y, f"{at}.conv2"), f"{at}.bn2")
            else:
                y = norm(conv(x, f"{at}.conv1"), f"{at}.bn1").clamp_min(0)
                y = norm(conv(y, f"{at}.conv2", stride), f"{at}.bn2").clamp_min(0)
                y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            if block == 0 and x.shape != y.shape:
                x = norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = (x + y).clamp_min(0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("resnet18", 1, 8), ("resnet18", 3, 17), ("resnet18", 3, 66), ("resnet18", 3, 130), ("resnet50", 3, 16)],
    ids=["grey", "odd", "pool", "large", "bottleneck"],
)
def test_the_forward_pass_is_the_published_one(name: str, channels: int, size: int, training: bool) -> None:
    torch.manual_seed(0)
    network = build_classifier(name, channels, 5, size).double().train(training)
    randomise(network)
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    state = {key: value.clone() for key, value in network.state_dict().items()}  # training moves statistics
    with torch.no_grad():
        expected = transcribed(state, name, x, size, training)
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_training_moves_the_statistics_by_a_tenth() -> None:
    torch.manual_seed(0)
    network = build_classifier("resnet18", 3, 5, 16).train()
    seen = []
    network.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    network(torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(network.bn1.running_mean, 0.1 * seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(network.bn1.running_var, 0.9 + 0.1 * seen[0].var((0, 2, 3)))


def test_weights_start_as_torchvisions_do() -> None:
    torch.manual_seed(0)
    network = build_classifier("resnet18", 3, 10, 224)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())
    bound = 1 / math.sqrt(512)
    assert 0.95 * bound < network.fc.weight.abs().max().item() <= bound


@pytest.mark.parametrize("name", COUNTS)
def test_the_smallest_size_works_and_one_pixel_less_is_refused(name: str) -> None:
    assert on_meta(name, 1, 2, 8)(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 2)
    with pytest.raises(InputError, match=f"^{name} needs images of 8 px, these are 7; use a convnet$"):
        build_classifier(name, 1, 2, 7)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("config", [DistillConfig, BenchConfig])
def test_a_discriminator_has_no_batch_norm(name: str, config: type) -> None:
    with pytest.raises(InputError, match=f"^--discriminator {name} has BatchNorm, .*; use resnet-18$"):
        config(discriminator=name)


def test_the_networks_with_batch_norm_are_those_that_are_refused() -> None:
    assert tuple(LAYOUTS) == BATCH_NORM_NETWORKS
