"""One fresh classifier trained on a set by a protocol, and tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast import graph
from acs_fast.augment import cutmix, normalize, to_device
from acs_fast.data import ImageSet
from acs_fast.evaluation.arithmetic import prepare
from acs_fast.evaluation.protocols import TEMPERATURE, Recipe
from acs_fast.evaluation.transforms import Draws, draw, transformed
from acs_fast.models.classifier import build_classifier


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent of one trained classifier: the best of the validations, and the last."""

    best: float
    last: float


@dataclass(frozen=True)
class TestSet:
    """Real images, uint8 [N, C, S, S], and their labels on the device that tests."""

    __test__ = False  # no case for pytest
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: ImageSet, device: torch.device) -> TestSet:
        """Put a set there."""
        return cls(images.images.to(device), images.labels.to(device))


class Learner:
    """One fresh classifier in training: `epoch` trains for one more epoch of the recipe, `top1` tests.

    The images lie on the device as bytes; of a step the host says which images, boxes and factors. On a GPU
    the step is one CUDA graph for each length of a batch, replayed on what is copied into its memory.
    """

    def __init__(
        self,
        train: ImageSet,
        network: str,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        teacher: nn.Module | None = None,
        batches: Callable[[int], Iterator[Draws]] | None = None,
        dtype: torch.dtype = torch.float32,
        capture: bool | None = None,
    ):
        """teacher: gives the labels of a soft recipe, but for `batches`: the draws of an epoch with their
        `logits`. dtype: of `arithmetic`. capture: default on a GPU."""
        self.batches, self.dtype = batches, dtype
        self.recipe, self.device, self.teacher, self.mirror = recipe, device, teacher, train.mirror
        self.images, self.labels = train.images.to(device), train.labels.to(device)
        channels, self.size = train.images.shape[1], train.images.shape[-1]
        self.num_classes = len(train.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_classifier(network, channels, self.num_classes, self.size)
        self.network, self.part = prepare(model, device, self.size)
        self.capture = device.type == "cuda" if capture is None else capture
        self.optimizer = recipe.optimizer(self.network, self.capture)
        self.generator = torch.Generator().manual_seed(seed)
        self.done = 0  # epochs
        self.steps: dict[int, Callable[[Draws], None]] = {}
        if self.capture:
            self._capture()

    def epoch(self) -> None:
        """Train on every image once, in a new order."""
        self.network.train()
        graph.set_rate(self.optimizer, self.recipe.rate(self.done))
        for draws in self.batches(self.done) if self.batches else self.draws():
            self.steps.get(len(draws["rows"]), self._step)(draws)
        self.done += 1

    def draws(self) -> Iterator[Draws]:
        """What chance does in the next epoch, a batch at a time."""
        order = torch.randperm(len(self.labels), generator=self.generator)
        color, soft = self.images.shape[1] == 3 and not self.recipe.soft, self.recipe.soft
        for rows in order.split(self.recipe.batch_size):
            yield draw(
                rows, size=self.size, color=color, patches=soft, mirror=self.mirror, generator=self.generator
            )

    def _step(self, draws: Draws) -> None:
        """One training step of draws on the CPU."""
        self._train({name: to_device(values, self.device) for name, values in draws.items()})

    def _train(self, draws: Draws) -> None:
        """One training step of draws on the device, for which nothing waits."""
        self.optimizer.zero_grad()  # to None: a captured backward pass makes them in the graph's memory
        for loss in self.losses(draws):
            loss.backward()
        self.optimizer.step()

    def losses(self, draws: Draws) -> Iterator[Tensor]:
        """The loss of a batch, 0-d, in parts that add up to it.

        Hard: (1 - a) CE(logits, y) + a CE(logits, y'), a the pasted area, y' its labels. Soft: KL(batchmean)
        of the student's against the teacher's probabilities of the mixed batch, both at temperature 20.
        """
        mixed, kept = cutmix(transformed(self.images, draws), draws["box"], draws["order"])
        total, size = len(mixed), self.part or len(mixed)
        if self.recipe.soft:
            taught = draws["logits"] if "logits" in draws else self.teach(mixed)
            for images, aim in zip(mixed.split(size), taught.split(size), strict=True):
                yield soft_loss(self.classify(images), aim) * (len(images) / total)
            return
        labels = self.labels[draws["rows"]]
        pasted = labels[draws["order"]]
        for images, own, other in zip(*(t.split(size) for t in (mixed, labels, pasted)), strict=True):
            logits, share = self.classify(images), len(images) / total
            loss = kept * F.cross_entropy(logits, own) + (1.0 - kept) * F.cross_entropy(logits, other)
            yield loss * share

    def classify(self, images: Tensor) -> Tensor:
        """The logits of normalised images, in fp32 or wider."""
        low = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            logits: Tensor = self.network(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def teach(self, mixed: Tensor) -> Tensor:
        """The teacher's logits of a mixed batch."""
        assert self.teacher is not None
        logits: Tensor = self.teacher(mixed)
        return logits

    def top1(self, test: TestSet) -> float:
        """Top-1 accuracy in percent."""
        self.network.eval()
        return top1(self.classify, test, self.part or 128)

    def _capture(self) -> None:
        """A graph of the step for each length of a batch; the warm-up trains on zeros and is undone."""
        initial = {name: values.clone() for name, values in self.network.state_dict().items()}
        self.network.train()
        n, size = len(self.labels), self.recipe.batch_size
        pool = torch.cuda.graph_pool_handle()
        state = self.generator.get_state()
        examples = {len(draws["rows"]): draws for draws in self.draws()}
        self.generator.set_state(state)
        if self.batches is not None:
            for length, draws in examples.items():
                draws["logits"] = torch.zeros(length, self.num_classes, dtype=torch.float16)
        assert set(examples) == {min(n, size)} | ({n % size} - {0})
        for length, draws in examples.items():
            static = {name: values.to(self.device) for name, values in draws.items()}
            replay = graph.captured_training(partial(self._train, static), self.device, pool)
            self.steps[length] = partial(_replay, static, replay)
        graph.start_anew(self.network, self.optimizer, initial)


@torch.no_grad()
def top1(classify: Callable[[Tensor], Tensor], test: TestSet, batch_size: int = 128) -> float:
    """Top-1 accuracy in percent of what gives logits of normalised images on the test set's device."""
    right = torch.zeros((), dtype=torch.long, device=test.labels.device)
    for x, y in zip(test.images.split(batch_size), test.labels.split(batch_size), strict=True):
        right += (classify(normalize(x.float() / 255.0)).argmax(dim=1) == y).sum()
    return 100.0 * right.item() / len(test.labels)


def _replay(static: Draws, replay: Callable[[], None], draws: Draws) -> None:
    """Copy the draws into a graph's memory and replay it."""
    for name, values in draws.items():
        static[name].copy_(values.pin_memory(), non_blocking=True)
    replay()


def soft_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """KL(batchmean) of softmax(taught / T) against softmax(logits / T), T = 20, without a factor T^2: 0-d."""
    own = F.log_softmax(logits / TEMPERATURE, dim=1)
    aim = F.log_softmax(taught.to(own.dtype) / TEMPERATURE, dim=1)
    return F.kl_div(own, aim, reduction="batchmean", log_target=True)


def train_and_test(
    train: ImageSet,
    test: TestSet,
    network: str,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    progress: tqdm[Any] | None = None,
    teacher: nn.Module | None = None,
    batches: Callable[[int], Iterator[Draws]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Train one fresh classifier on `train` by the recipe, testing it as the protocol says."""
    return fit(Learner(train, network, recipe, seed, device, teacher, batches, dtype), test, progress)


def fit(learner: Learner, test: TestSet | None, progress: tqdm[Any] | None = None) -> Accuracy:
    """Train to the end of the recipe, testing as the protocol says; without a test set the accuracy is 0."""
    best = last = 0.0
    for epoch in range(learner.recipe.epochs):
        learner.epoch()
        if progress is not None:
            progress.update()
        if test is not None and learner.recipe.validates(epoch):
            last = learner.top1(test)
            best = max(best, last)
    return Accuracy(best, last)
