"""A run's real images as its classifiers see them: digits in memory, files decoded, cached latents."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acs_fast.augment import to_device
from acs_fast.config import DistillConfig, InputError
from acs_fast.data import DIGITS, ImageSet, load_images, to_model_range
from acs_fast.distributed import Ranks
from acs_fast.feeds import Ahead, Examples, from_cache, permuted, shared
from acs_fast.latents import LatentCache, write_cache
from acs_fast.listing import Listing, list_images
from acs_fast.loader import ordered, resolve_loader, stream
from acs_fast.models.vae import VAE

SHOWN_LATE = 90  # seconds in which a folder on a network shows a file that was looked for before it was there
JUDGED = 100  # real images of a class that a discriminator is judged by, at most


class RealImages:
    """The real training images of the run's classes, in the discriminator's space.

    Digits lie in memory; pixels of other sources come from the loader batch by batch; latents come from the
    cache, which `prepare` makes or reuses. `waited`: seconds that training stood still for them.
    Raises InputError for a source that is missing, empty or does not fit, before anything is written.
    """

    def __init__(
        self,
        config: DistillConfig,
        classes: tuple[str, ...],
        channels: int,
        size: int,
        device: torch.device,
        ranks: Ranks,
    ):
        """channels, size: of the images; of their decode where the discriminator sees latents."""
        self.config, self.device, self.ranks = config, device, ranks
        self.channels, self.size = channels, size
        self.waited = 0.0
        self.mirror = config.real != DIGITS  # a mirrored digit is none
        self.digits: ImageSet | None = None
        self.listing: Listing | None = None
        self.cache: LatentCache | None = None
        self._judged: tuple[Tensor, Tensor] | None = None
        if config.real == DIGITS:
            self.digits = load_images(DIGITS, "train", classes, size, channels)
        else:
            self.loader = resolve_loader(config.loader)
            self.listing = ranks.lead(lambda: list_images(config.real, "train", classes))

    def summary(self) -> str:
        """What was left out or converted of the source; empty if nothing."""
        return "" if self.listing is None else self.listing.summary()

    def prepare(self, vae: VAE | None, folder: Path) -> None:
        """Where the discriminator sees latents (`vae` is given), make or open their cache in `folder`."""
        if vae is None or self.listing is None:
            return
        settings: dict[str, Any] = {"loader": self.loader, "batch_size": 16}
        settings |= {"rank": self.ranks.rank, "num_ranks": self.ranks.num_ranks}
        self.cache = write_cache(folder, self.listing, vae, self.size, **settings)
        self.ranks.barrier()
        for _ in range(SHOWN_LATE if self.ranks.num_ranks > 1 else 0):
            if self.cache is None:  # another rank had not ended, or its files do not show here yet
                self.cache = write_cache(folder, self.listing, vae, self.size, **settings)
            if self.cache is None:
                time.sleep(1.0)
        if self.cache is None:
            raise InputError(f"latent cache {folder} is unfinished; let the ranks that encode it end")

    def batches(self, seed: int, batch_size: int, ranks: Ranks) -> Generator[Examples]:
        """Augmented training batches without end, class by class in equal numbers (digits: as they come).

        ranks: those that share each batch.
        """
        if self.digits is not None:
            images = to_model_range(self.digits.images).to(self.device)
            batches = permuted(
                images, self.digits.labels,
                batch_size=batch_size, mirror=False, seed=seed, device=self.device,
            )  # fmt: skip
            yield from shared(batches, ranks)
        elif self.cache is not None:
            latents = from_cache(self.cache, batch_size=batch_size, mirror=self.mirror, seed=seed)
            yield from self._ahead(shared(latents, ranks))
        else:
            assert self.listing is not None
            decoded = stream(
                self.listing, size=self.size, channels=self.channels, batch_size=batch_size,
                loader=self.loader, device=self.device, seed=seed, mirror=self.mirror,
                rank=ranks.rank, num_ranks=ranks.num_ranks,
            )  # fmt: skip
            yield from self._ahead(Examples(b.images, b.labels, total=batch_size) for b in decoded)

    def judged(self) -> tuple[Tensor, Tensor]:
        """Up to `JUDGED` images of each class, unaugmented, with their labels; kept on the host."""
        if self._judged is None:
            if self.digits is not None:
                chosen = self.digits.first(JUDGED)
                self._judged = to_model_range(chosen.images), chosen.labels
            else:
                self._judged = self._first()
        return self._judged

    def _first(self) -> tuple[Tensor, Tensor]:
        labels = self.cache.labels if self.cache is not None else self.listing.labels  # type: ignore[union-attr]
        rows = torch.cat([torch.nonzero(labels == y)[:JUDGED, 0] for y in range(int(labels.max()) + 1)])
        if self.cache is not None:
            return self.cache.take(rows, torch.zeros(len(rows), dtype=torch.bool)), labels[rows]
        assert self.listing is not None
        batches = ordered(
            self.listing, rows.tolist(), size=self.size, channels=self.channels, batch_size=64,
            loader=self.loader, device=torch.device("cpu"),
        )  # fmt: skip
        return torch.cat([batch.images for batch in batches]), labels[rows]

    def _ahead(self, batches: Generator[Examples]) -> Generator[Examples]:
        """The batches, read by a thread of their own, on the device."""
        with closing(Ahead(batches)) as feed:
            try:
                for images, labels, _, total in feed:
                    images, labels = to_device(images, self.device), to_device(labels, self.device)
                    yield Examples(images, labels, total=total)
            finally:
                self.waited += feed.waited
