"""What steers each curriculum: its discriminator, what that is trained on, and the record of it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.augment import random_resized_crop, shift_and_flip
from acs_fast.config import REAL_OBJECTIVES, DistillConfig
from acs_fast.data import DIGITS
from acs_fast.discriminator import Classifiers, score
from acs_fast.feeds import Examples, mixed, permuted, shared
from acs_fast.generator import ImageGenerator
from acs_fast.guidance import Guidance
from acs_fast.judge import judge, read_curricula
from acs_fast.plan import cut
from acs_fast.real import RealImages
from acs_fast.samples import Samples
from acs_fast.session import Session
from acs_fast.writer import CURRICULA, write_json

BLOCK = 64  # samples read, and decoded, at a time


class Steering:
    """The classifiers that steer a run's curricula, and what they are trained on.

    Raises InputError for a discriminator that does not fit and for real images that are missing or do not
    fit, before anything is written.
    """

    def __init__(
        self,
        config: DistillConfig,
        generator: ImageGenerator,
        classes: tuple[str, ...],
        samples: Samples,
        session: Session,
        overwrite: bool,
    ):
        self.config, self.generator, self.classes, self.samples = config, generator, classes, samples
        self.session, self.ranks, self.layout = session, session.ranks, samples.layout
        self.out, self.device = Path(config.out), generator.device
        channels, size = generator.seen_shape()
        folder = self.out / "discriminators"
        self.classifiers = Classifiers(config, channels, size, len(classes), self.device, folder, session)
        self.density = config.objective == "density_ratio"
        curricula = range(2, config.num_curricula + 1)
        needed = self.config.guided and (
            overwrite or not all(self.ranks.lead(lambda: [self.is_ready(i) for i in curricula]))
        )
        self.real = self._real_images() if needed else None
        self._sampled: tuple[int, tuple[Tensor, Tensor]] | None = None

    def prepare(self) -> None:
        """Say what is left out of the real images; for a latent model make their latents."""
        if self.real is None:
            return
        if self.ranks.leads and (text := self.real.summary()):
            print(text, file=sys.stderr, flush=True)
        vae = self.generator.vae if self.generator.seen_by is None else None
        self.real.prepare(vae, Path(self.config.cache or self.out / "latents"))

    def is_ready(self, curriculum: int) -> bool:
        """Whether the folder holds the classifiers of curriculum 2..N and the record of the discriminator."""
        names = [str(curriculum)] + (["real"] if self.config.objective == "learnability" else [])
        recorded = str(curriculum) in read_curricula(self.out)
        return recorded and all(map(self.classifiers.is_trained, names))

    def untrained(self, missing: dict[int, np.ndarray]) -> tuple[int, ...]:
        """The curricula with images to sample that lack their discriminator."""
        wanted = [i for i in missing if i > 1 and len(missing[i])] if self.config.guided else []
        return tuple(i for i in wanted if not self.classifiers.is_trained(str(i)))

    def trains_real(self, missing: dict[int, np.ndarray]) -> bool:
        """Whether f_real is wanted and not there."""
        wanted = self.config.guided and any(len(missing[i]) for i in missing if i > 1)
        learnable = self.config.objective == "learnability"
        return wanted and learnable and not self.classifiers.is_trained("real")

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

    def _real_images(self) -> RealImages | None:
        """The real images where the objective needs them, or where they are at hand to judge by."""
        c, (channels, size) = self.config, self.generator.seen_shape()
        vae = self.generator.vae if self.generator.seen_by is None else None
        needed = c.objective in REAL_OBJECTIVES
        digits = (channels, size) == (1, 8) and set(self.classes) <= set("0123456789")
        at_hand = vae is None and (digits if c.real == DIGITS else True)
        if not needed and not at_hand:
            return None
        if vae is not None:  # the discriminator sees latents: those of images of this size
            channels, size = vae.out_channels, vae.factor * size
        return RealImages(c, self.classes, channels, size, self.device, self.ranks)

    def _real_feed(self, seed: int) -> Generator[Examples]:
        """Real images for f_real."""
        assert self.real is not None
        return self.real.batches(seed, self.config.discriminator_batch_size, self.classifiers.learners)

    def _feed(self, curriculum: int, seed: int) -> Generator[Examples]:
        """What f_i is trained on: everything sampled so far; for the density ratio real images as well."""
        c, pixels = self.config, self.generator.vae is None or self.generator.seen_by is not None
        size, learners = c.discriminator_batch_size, self.classifiers.learners
        batches = permuted(
            *self._sampled_before(curriculum),
            batch_size=size // 2 or 1 if self.density else size,
            mirror=c.real != DIGITS or self.generator.seen_shape()[0] != 1,  # a mirrored digit is none
            seed=seed,
            device=self.device,
            augment=random_resized_crop if pixels else shift_and_flip,
        )
        sampled = shared(batches, learners)
        if not self.density:
            return sampled
        assert self.real is not None
        return mixed(sampled, self.real.batches(seed, size - size // 2, learners))

    def _judge(self, curriculum: int, discriminator: nn.Module) -> None:
        """Put what a curriculum's discriminator knows into the record, unless it is there; rank 0 does.

        No image of the curriculum is written before: where all are there, so is the record.
        """
        if self.ranks.lead(lambda: str(curriculum) in read_curricula(self.out)):
            return
        sampled = self._sampled_before(curriculum)  # of all ranks

        def write() -> None:
            newest = self.layout.size(curriculum - 1)
            real = None if self.real is None else self.real.judged()
            record = judge(discriminator, sampled, newest, real, self.classes, self.density)
            write_json(self.out / CURRICULA, {**read_curricula(self.out), str(curriculum): record})

        self.ranks.lead(write)

    def _sampled_before(self, curriculum: int) -> tuple[Tensor, Tensor]:
        """The samples of all earlier curricula and the positions of their classes; collected once."""
        if self._sampled is None or self._sampled[0] != curriculum:
            self._sampled = curriculum, self._collect(curriculum)
        return self._sampled[1]

    def _collect(self, curriculum: int) -> tuple[Tensor, Tensor]:
        """Those, as the discriminator sees them: each rank reads a part, all get all, in order."""
        channels, size = self.generator.seen_shape()
        # decoded images of a large run do not fit beside the engine: the trainer takes them from the host
        place = self.device if self.generator.seen_by is None else torch.device("cpu")
        seen = torch.empty(self.layout.start(curriculum), channels, size, size, device=place)
        positions = torch.empty(len(seen), dtype=torch.long)
        for earlier in range(1, curriculum):
            first, count = self.layout.start(earlier), self.layout.size(earlier)
            blocks = cut(count, BLOCK)  # the same for any number of ranks: so is the rounding of a decode
            counts = [sum(len(blocks[i]) for i in share) for share in self.ranks.shares(len(blocks))]
            part = torch.empty(counts[self.ranks.rank], channels, size, size, device=place)
            start = 0
            for block in (blocks[i] for i in self.ranks.share(len(blocks))):
                samples = self.samples.read(earlier, block).to(self.device)
                part[start : start + len(block)] = self.generator.seen(samples)
                start += len(block)
            seen[first : first + count] = self.ranks.gather(part, counts)
            each = len(self.layout.ranges[earlier - 1])
            positions[first : first + count] = torch.arange(len(self.classes)).repeat_interleave(each)
        return seen, positions

    def _earlier(self, curriculum: int) -> Tensor:
        """Unit vectors of the samples of earlier curricula by class, zero where none is yet: [K, M, C H W].

        M is what the last curriculum finds, so that an engine's captured graph reads one and the same shape.
        """
        numel = self.generator.shape.in_channels * self.generator.shape.input_size**2
        found = torch.zeros(len(self.classes), self.layout.ranges[-1].start, numel)
        for earlier in range(1, curriculum):
            indices = self.layout.ranges[earlier - 1]
            samples = self.samples.read(earlier, range(self.layout.size(earlier)))
            vectors = F.normalize(samples.flatten(1), dim=1).view(len(self.classes), len(indices), numel)
            found[:, indices.start : indices.stop] = vectors
        return found.to(self.device)
