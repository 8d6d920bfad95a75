"""The parts for people with a sampler of their own: the discriminator and the noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.kernels import reference
from acs_fast.parts import Discriminator, philox_normal

LABELS = [7, 0, 993]


def make_samples(n: int = 36, channels: int = 4, size: int = 8, seed: int = 1) -> tuple[Tensor, list[int]]:
    """Samples whose class is a coarse pattern plus noise, and their labels in no order."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(len(LABELS), channels, 2, 2, generator=torch.Generator().manual_seed(9))
    patterns = patterns.repeat_interleave(size // 2, dim=2).repeat_interleave(size // 2, dim=3)
    picked = torch.randint(len(LABELS), (n,), generator=generator)
    noise = torch.randn(n, channels, size, size, generator=generator)
    return patterns[picked] + 0.5 * noise, [LABELS[i] for i in picked.tolist()]


def make(**settings: Any) -> Discriminator:
    """An untrained one of small latents."""
    small = {"network": "convnet-2", "class_labels": LABELS, "size": 8, "steps": 10, "batch_size": 18}
    return Discriminator(**{**small, "mirror": False, **settings})


@pytest.fixture(scope="module")
def fitted() -> Discriminator:
    return make().fit(*make_samples())


def weights(discriminator: Discriminator) -> Tensor:
    return torch.cat([values.flatten() for values in discriminator.network.state_dict().values()])


def one_sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    """The message names all of that, on one line."""
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".")
    assert [part for part in parts if part not in text] == []


def test_it_learns_labels_in_the_order_given(fitted) -> None:
    samples, labels = make_samples(seed=2)
    assert fitted.accuracy(samples, labels) > 95.0
    assert fitted.accuracy(samples, [LABELS[(LABELS.index(label) + 1) % 3] for label in labels]) < 5.0
    assert fitted.targets([993, 7, 7, 0]).tolist() == [2, 0, 0, 1]
    assert fitted.targets(torch.tensor(0)).tolist() == [1]
    assert not fitted.network.training
    assert not any(parameter.requires_grad for parameter in fitted.network.parameters())


def test_the_same_seed_gives_the_same_weights(fitted) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    twice = make().fit(*make_samples())
    assert torch.equal(weights(twice), weights(fitted))
    assert torch.equal(weights(twice.fit(*make_samples())), weights(fitted))  # from scratch each time
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(make(seed=1).fit(*make_samples())), weights(fitted))


def test_warm_goes_on_from_the_present_weights(fitted) -> None:
    samples, labels = make_samples()
    still = make(lr=1e-12).fit(samples, labels)
    kept = still.network
    scratch = weights(still)
    still._network = fitted.network
    assert torch.allclose(weights(still.fit(samples, labels, warm=True)), weights(fitted), atol=1e-6)
    assert not torch.allclose(weights(still), scratch, atol=1e-2)
    assert kept is not still.network
    assert torch.equal(weights(make().fit(samples, labels, warm=True)), weights(fitted))  # the first has none


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_trained_and_guides_within_a_pipeline(fitted, mode) -> None:
    with mode():
        samples, labels = make_samples()
        inside = make().fit(samples, labels)
        g = inside.direction(samples, labels)
    assert torch.equal(weights(inside), weights(fitted))
    assert torch.equal(g, fitted.direction(*make_samples()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype) -> None:
    samples, labels = make_samples()
    samples = samples.to(dtype)
    trained = make().fit(samples, labels)
    assert torch.equal(weights(trained), weights(make().fit(samples.float(), labels)))
    assert trained.direction(samples, labels).dtype == dtype


def test_latents_are_shifted_and_pixels_cropped(monkeypatch) -> None:
    seen = []
    for name in ("shift_and_flip", "random_resized_crop"):

        def record(images, mirror, generator, name=name):
            seen.append((name, mirror))
            return images

        monkeypatch.setattr(f"acs_fast.parts.discriminator.{name}", record)
    for channels, mirror in ((4, False), (3, True), (1, False)):
        make(channels=channels, mirror=mirror, steps=1).fit(*make_samples(channels=channels))
    assert seen == [("shift_and_flip", False), ("random_resized_crop", True), ("random_resized_crop", False)]


@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating"])
def test_direction_is_the_normalised_gradient(fitted, objective) -> None:
    samples, labels = make_samples(n=5, seed=3)
    g = fitted.direction(samples, labels, objective)
    assert torch.allclose(g.flatten(1).norm(dim=1), torch.ones(5))
    x = samples.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(fitted.network(x), fitted.targets(labels), reduction="sum")
    (want,) = torch.autograd.grad(loss, x)  # both rise with the same margin
    assert torch.allclose(g, want / want.flatten(1).norm(dim=1).view(-1, 1, 1, 1), atol=1e-4)


def test_save_and_load(fitted, tmp_path: Path) -> None:
    path = tmp_path / "f" / "d.safetensors"
    fitted.save(path)
    again = Discriminator.load(path)
    assert again.settings == fitted.settings
    samples, _ = make_samples(seed=4)
    assert torch.equal(again.network(samples), fitted.network(samples))
    assert torch.equal(weights(again.fit(*make_samples())), weights(fitted))


def damage(path: Path, kind: str) -> None:
    """Make a saved file one that is no Discriminator's."""
    state = safetensors.torch.load_file(path)
    settings = make().settings
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("no weights at all")
    elif kind == "missing":
        path.unlink()
    elif kind == "foreign":
        safetensors.torch.save_file(state, path, {"format": "pt"})
    elif kind == "tensor":
        state.pop("classifier.bias")
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})
    elif kind == "shape":
        settings["size"] = 16
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})
    elif kind == "json":
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": "{"})
    else:
        settings["newer"] = 1
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})


@pytest.mark.parametrize("kind", ["cut", "text", "missing", "foreign", "tensor", "shape", "json", "setting"])
def test_files_that_are_damaged_or_of_something_else(fitted, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    damage(path, kind)
    with pytest.raises(InputError) as error:
        Discriminator.load(path)
    one_sentence(error, str(path), "save" if kind != "foreign" else "Discriminator.save")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"class_labels": [3]}, ["class_labels", "at least two"]),
        ({"class_labels": [3, 3]}, ["3, 3", "each once"]),
        ({"class_labels": [3, -1]}, ["class_labels holds -1"]),
        ({"class_labels": [0.5, 1.0]}, ["class_labels holds float"]),
        ({"network": "convnet-5"}, ["convnet-5 needs images of 32 px"]),
        ({"network": "resnet18"}, ["resnet18 has BatchNorm", "resnet-18"]),
        ({"network": "mlp"}, ["no network 'mlp'", "convnet-<depth>"]),
        ({"steps": 0}, ["steps is 0", "at least 1"]),
        ({"batch_size": 1.5}, ["batch_size is 1.5"]),
        ({"lr": float("nan")}, ["lr is nan", "above 0"]),
        ({"lr": 0.0}, ["lr is 0.0"]),
        ({"seed": 2**63}, ["seed is", "0 to 9223372036854775807"]),
        ({"seed": True}, ["seed is True"]),
    ],
)
def test_settings_that_do_not_fit(settings, parts) -> None:
    with pytest.raises(InputError) as error:
        make(**settings)
    one_sentence(error, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s, y: (s.repeat(1, 1, 2, 2), y), ["4 channels of 8 px, these samples have 4 of 16;"]),
        (lambda s, y: (s[:, :3], y), ["4 channels of 8 px, these samples have 3 of 8;"]),
        (lambda s, y: (s[..., :4], y), ["have 4 of 8 x 4;"]),
        (lambda s, y: (s[0], y), ["shape (4, 8, 8)", "[n, channels, height, width]"]),
        (lambda s, y: (s.long(), y), ["torch.int64", "floats"]),
        (lambda s, y: (s.numpy(), y), ["ndarray", "give a tensor"]),
        (lambda s, y: (s, y[:-1]), ["36 samples and 35 labels"]),
        (lambda s, y: (s, [*y[:-1], 5]), ["label 5 is none", "7, 0, 993"]),
        (lambda s, y: (s, []), ["labels has the shape (0,)"]),
        (lambda s, y: (s * float("inf"), y), ["not finite"]),
    ],
)
@pytest.mark.parametrize("method", ["fit", "accuracy", "direction"])
def test_samples_that_do_not_fit(fitted, method, change, parts) -> None:
    discriminator = make() if method == "fit" else fitted
    with pytest.raises(InputError) as error:
        getattr(discriminator, method)(*change(*make_samples()))
    one_sentence(error, *parts)


def test_many_labels_are_shortened_in_messages() -> None:
    with pytest.raises(InputError, match=r"which are 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(1000 in all\)"):
        make(class_labels=range(1000)).targets(1000)


@pytest.mark.parametrize("call", ["network", "accuracy", "direction", "save"])
def test_before_fit(call, tmp_path: Path) -> None:
    discriminator, (samples, labels) = make(), make_samples()
    calls = {
        "network": lambda: discriminator.network,
        "accuracy": lambda: discriminator.accuracy(samples, labels),
        "direction": lambda: discriminator.direction(samples, labels),
        "save": lambda: discriminator.save(tmp_path / "d.safetensors"),
    }
    with pytest.raises(InputError, match=r"untrained; call fit\(samples, labels\) first"):
        calls[call]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective", ["learnability", "density_ratio", "loud"])
def test_objectives_that_cannot_be_served(fitted, objective) -> None:
    samples, labels = make_samples()
    with pytest.raises(InputError) as error:
        fitted.direction(samples, labels, objective)
    one_sentence(error, repr(objective), "adversarial or nonsaturating")
    assert ("real images" in str(error.value)) == (objective != "loud")


def test_a_training_that_diverges_is_refused_and_changes_nothing(fitted) -> None:
    discriminator = make(lr=1e30).fit  # AdamW's decay overflows
    with pytest.raises(InputError, match=r"not finite; lower lr, which is 1e\+30"):
        discriminator(*make_samples())


def test_noise_is_the_ops() -> None:
    labels, places = torch.tensor(LABELS), torch.tensor([5, 0, 2**32 - 1])
    key = torch.tensor([2**62 + 12345]), torch.tensor([7])
    want = reference.philox_normal(labels, places, *key, shape=(4, 3, 5))
    for given in ((labels, places), (LABELS, places.tolist()), (labels.int(), places)):
        assert torch.equal(philox_normal(*given, 7, seed=2**62 + 12345, shape=(4, 3, 5)), want)
    assert not torch.equal(philox_normal(labels, places, 8, seed=2**62 + 12345, shape=(4, 3, 5)), want)


def test_noise_of_an_image_hangs_on_no_batch() -> None:
    alone = philox_normal(7, 5, 0, shape=[4, 8, 8])
    assert alone.shape == (1, 4, 8, 8) and alone.dtype == torch.float32
    assert torch.equal(philox_normal(7, range(9), 0, shape=[4, 8, 8])[5:6], alone)
    assert torch.equal(philox_normal([0, 7], 5, 0, shape=[4, 8, 8])[1:], alone)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"class_labels": -1}, ["class_labels holds -1", "0 to 4294967295"]),
        ({"class_labels": 2**32}, ["class_labels holds 4294967296"]),
        ({"class_labels": 2**70}, ["class_labels cannot be read"]),
        ({"indices": [0, 2**32]}, ["indices holds 4294967296"]),
        ({"indices": 0.5}, ["indices holds float32"]),
        ({"indices": [True]}, ["indices holds bool"]),
        ({"indices": [[1], [2]]}, ["indices has the shape (2, 1)"]),
        ({"indices": "x"}, ["indices cannot be read"]),
        ({"class_labels": [1, 2], "indices": [1, 2, 3]}, ["2 class_labels and 3 indices"]),
        ({"step": -1}, ["step is -1", "0 to 4294967295"]),
        ({"step": 1.0}, ["step is 1.0"]),
        ({"seed": 2**63}, ["seed is 9223372036854775808"]),
        ({"shape": (4, 0)}, ["shape is 0", "at least 1"]),
    ],
)
def test_noise_out_of_its_ranges(change, parts) -> None:
    given = {"class_labels": 1, "indices": 2, "step": 3, "seed": 4, "shape": (4, 8, 8), **change}
    with pytest.raises(InputError) as error:
        philox_normal(**given)
    one_sentence(error, *parts)
