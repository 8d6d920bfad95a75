"""The counter-based noise: Philox-4x32-10 against its published answers, and no influence of the batch."""

import math

import pytest
import torch

from acs_fast.kernels.reference import noise, philox_normal
from acs_fast.kernels.reference.noise import philox_4x32

MASK = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words
KNOWN_ANSWERS = {
    "zeros": (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def from_hex(text):
    return [int(word, 16) for word in text.split()]


def draw(labels, indices, seed=0, step=0, shape=(1, 4, 4)):
    key = torch.tensor(labels), torch.tensor(indices), torch.tensor([seed]), torch.tensor([step])
    return philox_normal(*key, shape=shape)


def python_philox(counter, key):
    """Philox-4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & MASK, (low >> 32) ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def python_normals(label, index, seed, step, numel):
    """The first `numel` normals of an image by the documented formula, one element at a time in float64."""
    values = []
    for e in range(numel):
        words = python_philox((e // 4, step, index, label), (seed % 2**32, seed // 2**32))
        u0, u1 = ((words[e % 4 // 2 * 2 + i] + 0.5) / 2**32 for i in range(2))
        wave = math.cos if e % 2 == 0 else math.sin
        values.append(math.sqrt(-2 * math.log(u0)) * wave(2 * math.pi * u1))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(name):
    counter, key, words = map(from_hex, KNOWN_ANSWERS[name])
    got = philox_4x32(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert got.tolist() == [words]


def test_philox_of_many_counters_is_each_counter_alone():
    rows = torch.tensor(from_hex("0 1 7fffffff 80000000 fffffffe ffffffff"))
    counter = (rows, rows.flip(0), (rows * 3) & MASK, torch.tensor(5))
    got = philox_4x32(counter, (0xDEADBEEF, 0xFFFFFFFF))
    for row, words in enumerate(got.tolist()):
        one = [int(c.expand(6)[row]) for c in counter]
        assert words == python_philox(one, (0xDEADBEEF, 0xFFFFFFFF))


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 64], ids=lambda n: f"{n}-elements")
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1], ids=["0", "7", "above-2^32", "largest"])
def test_normals_follow_the_documented_formula(numel, seed):
    got = draw([3], [11], seed=seed, step=49, shape=(numel,))
    assert got.dtype == torch.float32 and got.shape == (1, numel)
    torch.testing.assert_close(got[0].double(), python_normals(3, 11, seed, 49, numel), rtol=1e-5, atol=2e-6)


def test_every_image_has_the_same_bits_in_any_batch():
    labels, indices = [0, 0, 1, 9, 4], [0, 1, 0, 3, 2]
    batch = draw(labels, indices)
    order = [3, 0, 4, 2, 1]
    shuffled = draw([labels[i] for i in order], [indices[i] for i in order])
    for position, i in enumerate(order):
        assert torch.equal(draw([labels[i]], [indices[i]])[0], batch[i])  # alone
        assert torch.equal(shuffled[position], batch[i])  # another order
    assert torch.equal(draw([*labels, 5], [*indices, 5])[:5], batch)  # a larger batch


@pytest.mark.parametrize("shape", [(1, 3, 5), (15,), (3, 1, 5)], ids=str)
def test_odd_element_counts_are_a_prefix(shape):
    long = draw([2], [6], shape=(16,))[0]
    assert torch.equal(draw([2], [6], shape=shape), long[:15].reshape(1, *shape))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**32}, {"seed": 2**62}, {"step": 1}, {"labels": [4]}, {"indices": [4]}],
    ids=["seed", "seed-above-2^32", "seed-2^62", "step", "class", "index"],
)
def test_each_part_of_the_key_changes_every_value(other):
    same = {"labels": [3], "indices": [3], "seed": 0, "step": 0}
    a, b = draw(**same), draw(**{**same, **other})
    assert (a != b).all()
    assert torch.equal(a, draw(**same))


def test_class_index_and_step_are_not_interchangeable():
    triples = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)]
    images = [draw([label], [index], step=step) for label, index, step in triples]
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(triples)


def test_values_are_standard_normal():
    labels, indices = torch.arange(40).repeat(10), torch.arange(10).repeat_interleave(40)
    x = (
        philox_normal(labels, indices, torch.tensor([5]), torch.tensor([3]), shape=(1, 25, 20))
        .double()
        .flatten()
    )
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: the largest distance of the distribution functions, at a level of one in a thousand
    cdf = torch.special.ndtr(x.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("axis", ["elements", "indices", "classes", "steps"])
def test_neighbours_are_uncorrelated(axis):
    count, n = 20, 4000
    if axis == "elements":
        x = draw([1], [1], shape=(count * n,))[0].view(n, count).T
    elif axis == "indices":
        x = draw([1] * count, list(range(count)), shape=(n,))
    elif axis == "classes":
        x = draw(list(range(count)), [1] * count, shape=(n,))
    else:
        x = torch.cat([draw([1], [1], step=step, shape=(n,)) for step in range(count)])
    off_diagonal = torch.corrcoef(x)[~torch.eye(count, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("word", [0, 1, MASK - 1, MASK], ids=hex)
def test_extreme_words_give_finite_values(monkeypatch, word):
    monkeypatch.setattr(noise, "philox_4x32", lambda counter, key: torch.full((1, 1, 4), word))
    values = draw([0], [0], shape=(4,))
    assert values.isfinite().all()
    assert values.abs().max() <= math.sqrt(-2 * math.log(0.5 / 2**32)) + 1e-5
