"""An image is its own, whatever is sampled beside it: its noise always, its bytes in one bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from acs_fast import engine as engine_module
from acs_fast import ops
from acs_fast.attention import Attention
from acs_fast.config import DistillConfig
from acs_fast.engine import StepEngine, table_slots
from acs_fast.guidance import Guidance
from acs_fast.kernels.reference import philox_normal
from acs_fast.models import classifier
from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import DiT, DiTConfig
from tests.test_sampler import randomise

CPU = torch.device("cpu")
SIZE, K, BUCKET, SEED = 8, 6, 5, 11
Item = tuple[int, int]  # class and index of an image
ITEMS: list[Item] = [(0, 0), (0, 1), (3, 0), (5, 2), (1, 7)]
KINDS: dict[str, dict[str, Any]] = {
    "unguided": {},
    "convnet": {"guidance": True},
    "learnability-ddim": {"guidance": True, "objective": "learnability", "sampler": "ddim", "eta": 0.5},
    "full-jacobian": {"guidance": True, "jacobian": "full"},
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)


def make_engine(
    batch_size: int = BUCKET,
    guidance: bool = False,
    kernel: str = "flash",
    class_labels: Sequence[int] = range(K),
    **settings: Any,
) -> StepEngine:
    """An engine of a random DiT; the same weights every time."""
    defaults = {"num_sampling_steps": 4, "guidance_window": (0.0, 1.0), "discriminator": "convnet-2"}
    config = DistillConfig(**{**defaults, "seed": SEED, **settings})
    shape = DiTConfig(SIZE, 2, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=K)
    engine = StepEngine(
        randomise(DiT(shape), 0.12, seed=3), config, ops.select("reference", CPU), CPU,
        batch_size=batch_size, class_labels=class_labels, attention=Attention(kernel),
    )  # fmt: skip
    if guidance:
        torch.manual_seed(1)
        networks = [build_classifier("convnet-2", 4, K, SIZE).eval().requires_grad_(False) for _ in range(2)]
        how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
        engine.load(Guidance(config.objective, *networks, config.omega, *how_far))
    return engine


def sample(engine: StepEngine, items: list[Item]) -> dict[Item, Tensor]:
    """What every image of a batch is after each step: [steps, C, H, W]."""
    labels, indices = torch.tensor(items).unbind(1)
    steps = torch.stack([x.clone() for x in engine.denoise(labels, indices, labels)], dim=1)
    return dict(zip(items, steps, strict=True))


def started(engine: StepEngine, items: list[Item]) -> Tensor:
    """The noise that a batch starts from, with its padding."""
    labels, indices = torch.tensor(items).unbind(1)
    engine._write(labels, indices, labels, None)
    engine._start(False)
    return engine.x.clone()


def orders(items: list[Item]) -> list[list[Item]]:
    """The same images turned round, mixed, in part, alone, and among others."""
    others = [(2, 9), (4, 4), (5, 0), (0, 5)]
    return [
        items[::-1],
        items[2:] + items[:2],
        [items[i] for i in (1, 4, 0, 3, 2)],
        items[:2],
        items[2:],
        *([item] for item in items),
        *([*others[:place], item, *others[place:]] for place, item in enumerate(items)),
    ]


def test_noise_is_the_images_own_in_every_batch_and_bucket() -> None:
    expected = {
        (label, index): philox_normal(
            *(torch.tensor([number]) for number in (label, index, SEED, 1000)), shape=(4, SIZE, SIZE)
        )[0]
        for label, index in [item for items in orders(ITEMS) for item in items]
    }
    for bucket in (BUCKET, 7):
        engine = make_engine(bucket)
        for items in [ITEMS, *orders(ITEMS)]:
            x = started(engine, items)
            for number in range(bucket):  # padding is the last image once more
                assert torch.equal(x[number], expected[items[min(number, len(items) - 1)]])


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_one_bucket_an_images_bytes_do_not_depend_on_the_batch(kind, kernel) -> None:
    engine = make_engine(kernel=kernel, **KINDS[kind])
    expected = sample(engine, ITEMS)
    for items in orders(ITEMS):
        assert_same(sample(engine, items), expected)


def assert_same(found: dict[Item, Tensor], expected: dict[Item, Tensor]) -> None:
    """The images that are in both are the same to the bit, after every step."""
    both = found.keys() & expected.keys()
    assert both and all(bool(torch.isfinite(x).all()) for x in expected.values())
    for item in both:
        assert torch.equal(found[item], expected[item]), item


def test_images_do_differ() -> None:
    """By class, by index, by step, and by the guidance: else the tests above would show nothing."""
    plain, guided = sample(make_engine(), ITEMS), sample(make_engine(guidance=True), ITEMS)
    images = [x for images in (plain, guided) for steps in images.values() for x in steps]
    assert len({x.numpy().tobytes() for x in images}) == len(images) == 2 * 4 * len(ITEMS)


@pytest.mark.parametrize("kind", ["unguided", "convnet"])
@pytest.mark.parametrize("labels", [[5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]], ids=str)
def test_nor_on_the_order_of_the_runs_classes(kind, labels) -> None:
    expected = sample(make_engine(**KINDS[kind]), ITEMS)
    assert_same(sample(make_engine(class_labels=labels, **KINDS[kind]), ITEMS), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["unguided", "convnet"])
def test_a_table_for_fewer_classes_is_filled_again_with_the_same_bytes(monkeypatch, kind, batch_size) -> None:
    run = [(label, index) for label in range(K) for index in range(3)]
    batches = [run[at : at + batch_size] for at in range(0, len(run), batch_size)]
    whole = make_engine(batch_size, **KINDS[kind])
    expected = {item: x for items in batches for item, x in sample(whole, items).items()}
    monkeypatch.setitem(engine_module.TABLE_BYTES, "cpu", 1)
    small, later = (make_engine(batch_size, **KINDS[kind]) for _ in range(2))
    assert small.denoiser.table.slots == batch_size < whole.denoiser.table.slots == K
    found = {item: x for items in batches for item, x in sample(small, items).items()}
    for item, x in found.items():  # a table of another size is another GEMM, which may round otherwise
        torch.testing.assert_close(x, expected[item], rtol=0, atol=1e-4 * x.abs().max().item())
    for items in batches[::-1]:  # a run that is continued may begin anywhere
        assert_same(sample(later, items), found)


@pytest.mark.parametrize("label", range(K))
def test_a_table_is_filled_whole_wherever_a_run_begins(label) -> None:
    """At large widths a GEMM of fewer rows rounds otherwise, and a continued run would end differently."""
    engine = make_engine(2)
    started(engine, [(label, 0)])
    assert sorted(engine.denoiser.table.labels) == list(range(K))


def test_a_table_holds_what_its_memory_allows() -> None:
    model = DiT(DiTConfig(SIZE, 2, hidden_size=48, depth=2, num_heads=2, num_classes=1000))
    row = (6 * 2 + 2) * 48 * 4
    for slots in (7, 700):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(engine_module.TABLE_BYTES, "cpu", 50 * row * slots)
            assert table_slots(model, 50, 5, 1000) == slots
            assert table_slots(model, 50, 9, 1000) == max(9, slots)  # a batch of as many classes fits
            assert table_slots(model, 50, 5, 3) == 3


@pytest.mark.parametrize("count", [0, BUCKET + 1])
def test_a_batch_that_the_bucket_cannot_hold_is_refused(count) -> None:
    engine = make_engine()
    before = engine.x.clone()
    numbers = torch.zeros(count, dtype=torch.long)
    for walk in (engine.denoise, engine.walk):
        with pytest.raises(
            ValueError, match=f"a batch of {count} images: the engine was made for 1 to {BUCKET}"
        ):
            next(walk(numbers, numbers, numbers))
    assert torch.equal(engine.x, before)
