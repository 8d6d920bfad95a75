"""What steers each curriculum: its discriminator, what that is trained on, and the record of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.augment import random_resized_crop, shift_and_flip
from acs_fast.config import REAL_OBJECTIVES, DistillConfig, InputError
from acs_fast.data import DIGITS
from acs_fast.discriminator import Classifiers, score
from acs_fast.feeds import Examples, mixed, permuted
from acs_fast.generator import ImageGenerator
from acs_fast.guidance import Guidance
from acs_fast.judge import judge, read_curricula
from acs_fast.plan import Item
from acs_fast.real import RealImages
from acs_fast.writer import CURRICULA, read_tensors, write_json


class Steering:
    """The classifiers that steer a run's curricula, and what they are trained on.

    batches: of each curriculum, in the order they are sampled. Raises InputError for a discriminator that
    does not fit and for real images that are missing or do not fit, before anything is written.
    """

    def __init__(
        self,
        config: DistillConfig,
        generator: ImageGenerator,
        classes: tuple[str, ...],
        batches: Sequence[Sequence[Sequence[Item]]],
        guided: bool,
        overwrite: bool,
    ):
        self.config, self.generator, self.classes, self.batches = config, generator, classes, batches
        self.out, self.device = Path(config.out), generator.device
        channels, size = generator.seen_shape()
        folder = self.out / "discriminators"
        self.classifiers = Classifiers(config, channels, size, len(classes), self.device, folder)
        self.density = config.objective == "density_ratio"
        needed = guided and (overwrite or not self._is_complete())
        self.real = self._real_images() if needed else None
        self._sampled: tuple[int, tuple[Tensor, Tensor]] | None = None

    def prepare(self) -> None:
        """Make what training needs of the real images: for a latent model their latents."""
        if self.real is None:
            return
        vae = self.generator.vae if self.generator.seen_by is None else None
        self.real.prepare(vae, Path(self.config.cache or self.out / "latents"))

    def guidance(self, curriculum: int) -> Guidance:
        """The guidance of curriculum 2..N, its classifiers trained first where the folder lacks them."""
        c = self.config
        discriminator, real_classifier = self._discriminator(curriculum), None
        if c.objective == "learnability":
            title = f"curriculum {curriculum}/{c.num_curricula} real classifier"
            real_classifier = self.classifiers.get("real", title, self._real_feed, c.real_steps)
        self._judge(curriculum, discriminator)
        self._sampled = None  # the engine needs the memory
        earlier = self._earlier(curriculum) if c.repulsion else None
        return self.generator.steer(discriminator, real_classifier, earlier)

    def score(self, network: nn.Module, samples: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a discriminator judges each sample right, and its loss; positions: int64 [n]."""
        return score(network, self.generator.seen(samples), positions, False if self.density else None)

    def _discriminator(self, curriculum: int) -> nn.Module:
        """f_i of a curriculum; a warm one starts from the one before, which is trained anew if it is lost."""
        c = self.config
        warm = c.discriminator_init == "warm" and curriculum > 2
        return self.classifiers.get(
            str(curriculum),
            f"curriculum {curriculum}/{c.num_curricula} discriminator",
            lambda seed: self._feed(curriculum, seed),
            c.discriminator_steps,
            (lambda: self._discriminator(curriculum - 1)) if warm else None,
        )

    def _is_complete(self) -> bool:
        """Whether the folder holds every classifier and the record of it."""
        numbers = [str(i) for i in range(2, len(self.batches) + 1)]
        names = numbers + (["real"] if self.config.objective == "learnability" else [])
        recorded = read_curricula(self.out)
        return all(map(self.classifiers.is_trained, names)) and all(n in recorded for n in numbers)

    def _real_images(self) -> RealImages | None:
        """The real images where the objective needs them, or where they are at hand to judge by."""
        c, (channels, size) = self.config, self.generator.seen_shape()
        vae = self.generator.vae if self.generator.seen_by is None else None
        needed = c.objective in REAL_OBJECTIVES
        at_hand = vae is None and ((channels, size) == (1, 8) if c.real == DIGITS else True)
        if not needed and not at_hand:
            return None
        if vae is not None:  # the discriminator sees latents: those of images of this size
            channels, size = vae.out_channels, vae.factor * size
        return RealImages(c, self.classes, channels, size, self.device)

    def _real_feed(self, seed: int) -> Generator[Examples]:
        """Real images for f_real."""
        assert self.real is not None
        return self.real.batches(seed, self.config.discriminator_batch_size)

    def _feed(self, curriculum: int, seed: int) -> Generator[Examples]:
        """What f_i is trained on: everything sampled so far; for the density ratio real images as well."""
        c, pixels = self.config, self.generator.vae is None or self.generator.seen_by is not None
        size = c.discriminator_batch_size
        sampled = permuted(
            *self._sampled_before(curriculum),
            batch_size=size // 2 or 1 if self.density else size,
            mirror=c.real != DIGITS or self.generator.seen_shape()[0] != 1,  # a mirrored digit is none
            seed=seed,
            device=self.device,
            augment=random_resized_crop if pixels else shift_and_flip,
        )
        if not self.density:
            return sampled
        assert self.real is not None
        return mixed(sampled, self.real.batches(seed, size - size // 2))

    def _judge(self, curriculum: int, discriminator: nn.Module) -> None:
        """Put what a curriculum's discriminator knows into the record, unless it is there."""
        curricula = read_curricula(self.out)
        if str(curriculum) in curricula:
            return
        newest = sum(map(len, self.batches[curriculum - 2]))
        real = None if self.real is None else self.real.judged()
        sampled = self._sampled_before(curriculum)
        curricula[str(curriculum)] = judge(discriminator, sampled, newest, real, self.classes, self.density)
        write_json(self.out / CURRICULA, curricula)

    def _sampled_before(self, curriculum: int) -> tuple[Tensor, Tensor]:
        """The samples of all earlier curricula and the positions of their classes; read once."""
        if self._sampled is not None and self._sampled[0] == curriculum:
            return self._sampled[1]
        self._sampled = curriculum, self._read_samples(curriculum)
        return self._sampled[1]

    def _read_samples(self, curriculum: int) -> tuple[Tensor, Tensor]:
        """Those, from the run folder, as the discriminator sees them."""
        channels, size = self.generator.seen_shape()
        # decoded images of a large run do not fit beside the engine: the trainer takes them from the host
        place = self.device if self.generator.seen_by is None else torch.device("cpu")
        count = sum(len(batch) for earlier in self.batches[: curriculum - 1] for batch in earlier)
        samples = torch.empty(count, channels, size, size, device=place)
        positions: list[int] = []
        for earlier, batches in enumerate(self.batches[: curriculum - 1], start=1):
            for number, batch in enumerate(batches):
                rows = slice(len(positions), len(positions) + len(batch))
                samples[rows] = self.generator.seen(self._read_batch(earlier, number).to(self.device))
                positions += [item.position for item in batch]
        return samples, torch.tensor(positions, device=self.device)

    def _earlier(self, curriculum: int) -> Tensor:
        """Unit vectors of the samples of earlier curricula by class, zero where none is yet: [K, M, C H W].

        M is what the last curriculum finds, so that an engine's captured graph reads one and the same shape.
        """
        count = sum(map(len, chain.from_iterable(self.batches[:-1]))) // len(self.classes)
        numel = self.generator.shape.in_channels * self.generator.shape.input_size**2
        found = torch.zeros(len(self.classes), count, numel)
        for earlier, batches in enumerate(self.batches[: curriculum - 1], start=1):
            for number, batch in enumerate(batches):
                for item, sample in zip(batch, self._read_batch(earlier, number), strict=True):
                    found[item.position, item.index] = F.normalize(sample.flatten(), dim=0)
        return found.to(self.device)

    def _read_batch(self, curriculum: int, number: int) -> Tensor:
        path = self.samples_path(curriculum, number)
        stored = read_tensors(path)
        if stored is None:
            raise InputError(f"{path} is gone or damaged; run the command again to make it anew")
        return stored["samples"]

    def samples_path(self, curriculum: int, number: int) -> Path:
        """Where a batch's samples lie."""
        return self.out / "samples" / f"{curriculum}-{number}.safetensors"
