"""The protocols against a transcription by hand: constants, schedules, training step by step.

The numbers are those of the relatives' published code, written out once more.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.data import ImageSet
from acs_fast.evaluation.protocols import deviations, make_recipe, protocol_epochs
from acs_fast.evaluation.training import Learner, TestSet, soft_loss, train_and_test

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ipc", "classes", "epochs"),
    [
        (1, 10, 3000),
        (2, 10, 2000),
        (10, 10, 2000),
        (11, 10, 1500),
        (50, 10, 1500),
        (51, 10, 1000),
        (100, 10, 1000),
        (200, 1000, 1000),
        (201, 10, 500),
        (500, 10, 500),
        (501, 10, 300),
        (1, 100, 2000),
        (10, 100, 1300),
        (50, 100, 1000),
        (100, 100, 600),
        (500, 100, 300),
        (501, 100, 200),
    ],
)
@pytest.mark.parametrize("protocol", ["hard-sgd", "hard-adamw"])
def test_epochs_follow_the_ipc(protocol: str, ipc: int, classes: int, epochs: int) -> None:
    assert protocol_epochs(protocol, ipc, classes) == make_recipe(protocol, ipc, classes).epochs == epochs


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("ipc", [1, 10, 50, 1000])
def test_soft_has_300_epochs(ipc: int, classes: int) -> None:
    assert protocol_epochs("soft", ipc, classes) == 300


@pytest.mark.parametrize(
    ("protocol", "ipc", "classes", "batch_size"),
    [
        ("hard-sgd", 10, 10, 64),
        ("hard-sgd", 10, 100, 64),
        ("hard-sgd", 10, 101, 128),
        ("hard-adamw", 50, 1000, 128),
        ("soft", 10, 10, 50),
        ("soft", 50, 10, 100),
        ("soft", 10, 100, 100),
        ("soft", 50, 100, 200),
        ("soft", 10, 1000, 100),
        ("soft", 50, 1000, 200),
    ],
)
def test_batch_sizes(protocol: str, ipc: int, classes: int, batch_size: int) -> None:
    assert make_recipe(protocol, ipc, classes).batch_size == batch_size


@pytest.mark.parametrize(
    ("protocol", "classes", "base"),
    [("hard-sgd", 10, 0.01), ("hard-sgd", 100, 0.01), ("hard-sgd", 1000, 0.1), ("hard-adamw", 1000, 1e-3)],
)
@pytest.mark.parametrize("epochs", [2000, 1500, 7, 2, 1])
def test_hard_rates_fall_at_two_thirds_and_five_sixths(
    protocol: str, classes: int, base: float, epochs: int
) -> None:
    recipe = make_recipe(protocol, 10, classes, epochs)
    rate, expected = base, []
    for epoch in range(epochs):  # MultiStepLR: a milestone that is reached twice counts once here
        if epoch in {2 * epochs // 3, 5 * epochs // 6}:
            rate *= 0.2
        expected.append(rate)
    assert [recipe.rate(epoch) for epoch in range(epochs)] == pytest.approx(expected)


def test_soft_rate_is_a_cosine_that_ends_at_half() -> None:
    recipe = make_recipe("soft", 10, 10)
    for epoch in (0, 1, 150, 299):
        expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / (2 * 300)))
        assert recipe.rate(epoch) == pytest.approx(expected, rel=1e-12)
    assert recipe.rate(299) == pytest.approx(0.5e-3, rel=0.01)


@pytest.mark.parametrize(
    ("protocol", "ipc", "epochs"),
    [
        ("hard-sgd", 10, range(20, 2001, 20)),
        ("hard-adamw", 50, range(15, 1501, 15)),
        ("soft", 10, (250, 260, 270, 280, 290, 300)),
    ],
)
def test_validations(protocol: str, ipc: int, epochs: range) -> None:
    recipe = make_recipe(protocol, ipc, 10)
    assert [e + 1 for e in range(recipe.epochs) if recipe.validates(e)] == list(epochs)


def test_the_last_epoch_is_always_tested() -> None:
    assert make_recipe("hard-sgd", 10, 10, 250).validates(249)
    assert [e for e in range(7) if make_recipe("soft", 10, 10, 7).validates(e)] == [6]


@pytest.mark.parametrize(
    ("protocol", "classes", "momentum", "decay"),
    [("hard-sgd", 10, 0.9, 5e-4), ("hard-sgd", 101, 0.9, 1e-4)],
)
def test_sgd(protocol: str, classes: int, momentum: float, decay: float) -> None:
    optimizer = make_recipe(protocol, 10, classes).optimizer(nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {momentum}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {decay}
    assert not any(group["nesterov"] or group["dampening"] for group in optimizer.param_groups)


def test_soft_decays_weights_of_more_than_one_dimension_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    decay = {}
    for group in make_recipe("soft", 10, 10).optimizer(network).param_groups:
        assert group["betas"] == (0.9, 0.999)
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    for parameter in network.parameters():
        assert decay[id(parameter)] == (0.01 if parameter.dim() > 1 else 0.0)


def examples(n: int = 70, channels: int = 3, size: int = 16, classes: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return ImageSet(images, labels, tuple("abcdefgh"[:classes]))


def crop_one(image: Tensor, crop: list[float]) -> Tensor:
    left, top, width, height = map(int, crop[:4])
    part = image[None, :, top : top + height, left : left + width]
    resized = F.interpolate(part, image.shape[1:], mode="bilinear", align_corners=False)[0]
    return resized.flip(-1) if crop[4] < 0 else resized


def color_one(image: Tensor, color: list[float]) -> Tensor:
    """Jitter of 0.4 in the order drawn, lighting, ImageNet's statistics."""
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(3, 1, 1)
    for operation in map(int, color[3:6]):
        f, shown = color[operation], (image * grey).sum(dim=0, keepdim=True)
        other = (torch.zeros_like(image), shown.mean().expand_as(image), shown.expand_as(image))[operation]
        image = f * image + (1 - f) * other
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    shift = vectors.double() @ (torch.tensor(color[6:9]) * torch.tensor([0.2175, 0.0188, 0.0045])).double()
    image = image + shift.to(image.dtype).view(3, 1, 1)
    return image


def normal(image: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=image.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=image.dtype).view(3, 1, 1)
    return (image - mean) / std


def patched_one(image: Tensor, swaps: list[bool]) -> Tensor:
    half = image.shape[-1] // 2
    if swaps[0]:
        image = torch.cat((image[..., half:], image[..., :half]), dim=2)
    return torch.cat((image[:, half:], image[:, :half]), dim=1) if swaps[1] else image


def by_hand(train: ImageSet, draws: dict[str, Tensor], soft: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """The mixed batch in float64, its labels, those pasted, and the share that is kept."""
    batch = []
    for i, row in enumerate(draws["rows"].tolist()):
        image = train.images[row].double() / 255
        if soft:
            image = patched_one(image, draws["patches"][i].tolist())
        image = crop_one(image, draws["crops"][i].tolist())
        if not soft:
            image = color_one(image, draws["colors"][i].tolist())
        batch.append(normal(image))
    mixed, pasted = torch.stack(batch), torch.stack(batch)[draws["order"]]
    top, bottom, left, right = draws["box"].tolist()
    mixed[:, :, top:bottom, left:right] = pasted[:, :, top:bottom, left:right]
    size = mixed.shape[-1]
    labels = train.labels[draws["rows"]]
    return mixed, labels, labels[draws["order"]], 1 - (bottom - top) * (right - left) / size**2


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(dim=1, keepdim=True)


def loss_by_hand(network: nn.Module, teacher: nn.Module | None, step: tuple) -> Tensor:
    mixed, labels, pasted, kept = step
    logits = network(mixed)
    if teacher is None:
        own = log_softmax(logits)
        rows = torch.arange(len(labels))
        return -(kept * own[rows, labels] + (1 - kept) * own[rows, pasted]).mean()
    own, aim = log_softmax(logits / 20), log_softmax(teacher(mixed).detach() / 20)
    return (aim.exp() * (aim - own)).sum() / len(labels)


def update_by_hand(protocol: str, parameters: list, state: dict, rate: float, step: int) -> None:
    """SGD with momentum, or AdamW, from their papers."""
    for i, parameter in enumerate(parameters):
        gradient, value = parameter.grad, parameter.data
        if protocol == "hard-sgd":
            gradient = gradient + 5e-4 * value
            state[i] = gradient if step == 1 else 0.9 * state[i] + gradient
            value -= rate * state[i]
            continue
        first, second = state.get(i, (0.0, 0.0))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        state[i] = first, second
        if protocol == "hard-adamw" or parameter.dim() > 1:
            value *= 1 - rate * 0.01
        value -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


@pytest.mark.parametrize("protocol", ["hard-sgd", "hard-adamw", "soft"])
def test_training_is_the_protocol_step_by_step(protocol: str) -> None:
    soft, train, recipe = protocol == "soft", examples(), make_recipe(protocol, 10, 3, 6)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval() if soft else None
    learner = Learner(train, "convnet-3", recipe, 5, CPU, teacher)
    learner.network.double()
    learner.optimizer = recipe.optimizer(learner.network)
    other = Learner(train, "convnet-3", recipe, 5, CPU, teacher).network.double()
    steps, state, real = 0, {}, Learner.draws

    drawn = []
    learner.draws = lambda: (drawn.append(d) or d for d in real(learner))  # type: ignore[method-assign]
    # the network computes in float64 what the transforms made in float32
    learner.network.forward = (  # type: ignore[method-assign]
        lambda x, forward=learner.network.forward: forward(x.double())
    )
    if teacher is not None:
        teacher.double()
        teacher.forward = lambda x, f=teacher.forward: f(x.double())  # type: ignore[method-assign]
    rate = {"hard-sgd": 0.01}.get(protocol, 1e-3)
    for epoch in range(6):
        drawn.clear()
        learner.epoch()
        if soft:
            now = rate * 0.5 * (1 + math.cos(math.pi * epoch / 12))
        else:
            now = rate * (1, 1, 1, 1, 0.2, 0.04)[epoch]
        assert [len(d["rows"]) for d in drawn] == ([50, 20] if soft else [64, 6])
        assert sorted(torch.cat([d["rows"] for d in drawn]).tolist()) == list(range(70))
        for draws in drawn:
            steps += 1
            other.zero_grad()
            loss_by_hand(other, teacher, by_hand(train, draws, soft)).backward()
            update_by_hand(protocol, list(other.parameters()), state, now, steps)
        started = dict(Learner(train, "convnet-3", recipe, 5, CPU, teacher).network.named_parameters())
        got = dict(learner.network.named_parameters())
        for name, expected in other.named_parameters():
            if name in ("features.0.bias", "features.4.bias", "features.8.bias"):
                continue  # a bias before the norm has no gradient but rounding, which AdamW makes large
            moved = (expected - started[name]).norm()
            error = (got[name] - expected).norm()
            assert error < 0.01 * moved, (name, epoch, error / moved)


def test_the_loss_of_a_batch_equals_that_by_hand() -> None:
    train = examples(20)
    for protocol in ("hard-sgd", "soft"):
        soft = protocol == "soft"
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval() if soft else None
        learner = Learner(train, "convnet-2", make_recipe(protocol, 10, 3, 4), 0, CPU, teacher)
        for draws in learner.draws():
            mixed, *rest = by_hand(train, draws, soft)
            expected = loss_by_hand(learner.network, teacher, (mixed.float(), *rest))
            torch.testing.assert_close(sum(learner.losses(draws)), expected, rtol=1e-4, atol=1e-6)


def test_soft_loss_has_temperature_20_and_no_factor() -> None:
    logits, taught = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    p, q = (taught / 20).softmax(1), (logits / 20).softmax(1)
    expected = (p * (p.log() - q.log())).sum() / 4
    torch.testing.assert_close(soft_loss(logits, taught), expected)


def test_the_teachers_labels_reach_a_student() -> None:
    """A student of a teacher who sees brightness learns it, without a label of its own."""
    images = examples(200, 1, 8, 2)
    bright = torch.arange(200) % 2
    values = (images.images // 4 + 150 * bright.view(-1, 1, 1, 1)).to(torch.uint8)
    train = ImageSet(values, torch.zeros(200, dtype=torch.long), images.classes)
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    teacher[2].weight.data, teacher[2].bias.data = torch.tensor([[-400.0], [400.0]]), torch.zeros(2)
    test = TestSet(values, bright)
    recipe = make_recipe("soft", 100, 2, 4)
    accuracy = train_and_test(train, test, "convnet-1", recipe, 0, CPU, teacher=teacher)
    assert accuracy.last > 95


AS_PUBLISHED = {
    "size": 224, "channels": 3, "mirror": True, "bf16": False, "repeats": 3, "teacher": None
}  # fmt: skip


def test_deviations_are_named() -> None:
    assert deviations(make_recipe("hard-sgd", 10, 10), "convnet-6", **AS_PUBLISHED) == []
    assert deviations(make_recipe("soft", 10, 10), "resnet50", **AS_PUBLISHED) == []
    assert deviations(make_recipe("hard-adamw", 10, 10), "resnet-18", **{**AS_PUBLISHED, "repeats": 5}) == []
    other = {"size": 32, "channels": 1, "mirror": False, "bf16": True, "repeats": 2, "teacher": "mine, 50 %"}
    found = deviations(make_recipe("soft", 5, 10, 3), "convnet-3", **other)
    for text in (
        "3 of the protocol's 300 epochs", "2 repeats; the protocol has 3", "images of 32 px", "mirrored",
        "grey", "bf16", "teacher: mine, 50 %", "ipc 10 and 50", "resnet18",
    ):  # fmt: skip
        assert any(text in part for part in found), text
    assert "resnet18; the protocol has convnet-6, resnetap-10, resnet-18" in deviations(
        make_recipe("hard-sgd", 10, 10), "resnet18", **AS_PUBLISHED
    )
    (batches,) = deviations(make_recipe("soft", 10, 200), "resnet18", **AS_PUBLISHED)
    assert "doubles them for 100 or 1000 classes" in batches
