"""What classifiers are trained on: balance, augmentation, mixing, reading ahead, the density-ratio loss."""

from __future__ import annotations

import itertools
import time
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F

from acs_fast.augment import shift_and_flip
from acs_fast.discriminator import Trainer, losses, score
from acs_fast.feeds import Ahead, Examples, mixed, permuted
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")


def images(count: int, value: float = 0.0, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return value + torch.randn(count, 1, size, size, generator=generator)


def feed(count: int, batch_size: int, seed: int = 0):
    labels = torch.arange(count) % 2
    return permuted(images(count), labels, batch_size=batch_size, mirror=False, seed=seed, device=CPU)


@pytest.mark.parametrize("mirror", [False, True])
def test_shifts_move_whole_pixels_and_repeat_the_border(mirror: bool) -> None:
    x = images(64, size=16)
    moved = shift_and_flip(x, mirror, torch.Generator().manual_seed(0))
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    found = set()
    for row in range(len(x)):
        for dy, dx, flip in itertools.product(range(5), range(5), (False, True)):
            window = padded[row, :, dy : dy + 16, dx : dx + 16]
            if torch.equal(moved[row], window.flip(2) if flip else window):
                found.add((row, dy, dx, flip))
    assert {row for row, *_ in found} == set(range(len(x)))
    assert {flip for *_, flip in found} == ({False, True} if mirror else {False})
    assert len({(dy, dx) for _, dy, dx, _ in found}) > 15


def test_sampled_and_real_images_come_in_equal_numbers_and_are_named() -> None:
    with closing(mixed(feed(10, 4), feed(30, 4))) as batches:
        for batch in itertools.islice(batches, 5):
            assert batch.real is not None and batch.real.tolist() == [0.0] * 4 + [1.0] * 4
            assert batch.images.shape == (8, 1, 8, 8) and batch.labels.shape == (8,)


def test_reading_ahead_changes_nothing_and_ends() -> None:
    plain, ahead = feed(20, 4), Ahead(feed(20, 4))
    for _ in range(9):
        assert torch.equal(next(plain).images, next(ahead).images)
    ahead.close()
    assert not ahead._thread.is_alive()


def test_the_wait_is_counted_after_the_first_batches_and_errors_arrive() -> None:
    def slow():
        for _ in range(8):
            time.sleep(0.02)
            yield from itertools.islice(feed(4, 4), 1)
        raise OSError("gone")

    ahead = Ahead(slow())
    for count in range(8):
        next(ahead)
        assert (ahead.waited > 0.0) == (count >= 4)
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    ahead.close()


def test_the_density_ratio_loss_reads_the_own_logit_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2] * 2)
    real = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    d = torch.sigmoid(logits[torch.arange(6), labels])
    expected = -(real * d.log() + (1 - real) * (1 - d).log())
    torch.testing.assert_close(losses(logits, labels, real), expected)


def test_the_density_ratio_discriminator_learns_its_bayes_optimum() -> None:
    """Real N(+1, 1) against sampled N(-1, 1) per pixel of class 0, the other way round in class 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 2
    sign = torch.where(labels == 0, 0.3, -0.3).view(-1, 1, 1, 1)
    noise = torch.randn(2, 512, 1, 8, 8, generator=generator)
    sampled, real = noise[0] - sign, noise[1] + sign
    feeds = [
        permuted(x, labels, batch_size=64, mirror=False, seed=seed, device=CPU, augment=lambda x, *_: x)
        for seed, x in enumerate((sampled, real))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer = Trainer(build_classifier("convnet-1", 1, 2, 8))
    for _ in trainer.learn(trainer.network.state_dict(), mixed(*feeds), steps=60, lr=3e-3):
        pass
    for x, is_real in ((sampled, False), (real, True)):
        right, loss = score(trainer.network, x, labels, is_real)
        assert right.float().mean() > 0.8 and loss.mean() < 0.5
        wrong, _ = score(trainer.network, x, 1 - labels, is_real)  # the other class's answer is the opposite
        assert wrong.float().mean() < 0.3


def test_a_trainer_keeps_a_bucket_for_each_kind_of_batch() -> None:
    trainer = Trainer(build_classifier("convnet-1", 1, 2, 8))
    one = Examples(images(4), torch.tensor([0, 1, 0, 1]))
    list(trainer.learn(trainer.network.state_dict(), iter([one]), steps=1, lr=1e-3))
    real = one._replace(real=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    list(trainer.learn(trainer.network.state_dict(), iter([real]), steps=1, lr=1e-3))
    assert len(trainer.buckets) == 2
