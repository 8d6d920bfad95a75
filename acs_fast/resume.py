"""What a run folder lacks: which images are to be sampled, and who samples them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from acs_fast.distributed import Ranks
from acs_fast.images import Images
from acs_fast.manifest import Rows
from acs_fast.plan import Layout, cut
from acs_fast.samples import Samples

SHOWN_FROM = 5000  # images whose check is worth a progress bar


@dataclass(frozen=True)
class Left:
    """What is left of a run, as rank 0 found it in the folder.

    missing: by curriculum the numbers of the images to sample. needed: whether its samples are. files: where
    samples lie. untrained: the curricula whose discriminator is still to be trained; trains_real: f_real is.
    """

    missing: dict[int, np.ndarray]
    needed: dict[int, bool]
    files: dict[int, list[range]]
    untrained: tuple[int, ...]
    trains_real: bool

    @property
    def images(self) -> int:
        """Still to be sampled."""
        return sum(map(len, self.missing.values()))


def find_missing(rows: Rows, images: Images, layout: Layout) -> dict[int, np.ndarray]:
    """By curriculum the numbers of the images without a row, or whose file is not the one written then."""
    whole = np.zeros(layout.total, bool)
    count = int((rows.places[:, 0] >= 0).sum())
    with tqdm(total=count, desc="check", unit="image", disable=None if count >= SHOWN_FROM else True) as bar:
        for number, same in rows.verify(images):
            whole[number] = same
            bar.update()
    rows.places[~whole] = -1  # rows of what is missing are no longer true
    missing = {}
    for curriculum in range(1, len(layout.ranges) + 1):
        start = layout.start(curriculum)
        missing[curriculum] = np.nonzero(~whole[start : start + layout.size(curriculum)])[0]
    return missing


def add_samples(
    missing: dict[int, np.ndarray],
    samples: Samples,
    *,
    guided: bool,
    keep: bool,
    is_ready: Callable[[int], bool],
    repulsion: bool,
) -> dict[int, bool]:
    """Whether each curriculum's samples are needed; images without a needed sample become missing too.

    Samples are needed where they are kept, and where images of a later curriculum are missing that are to be
    repelled from them, or whose discriminator is still to be trained on them or to be judged by them.
    """
    needed, later = {}, False
    for curriculum in sorted(missing, reverse=True):
        needed[curriculum] = keep or later
        if needed[curriculum]:
            held = samples.held(curriculum)
            held[missing[curriculum]] = False
            missing[curriculum] = np.nonzero(~held)[0]
        if guided and curriculum > 1 and len(missing[curriculum]):
            later = later or repulsion or not is_ready(curriculum)
    return needed


def own_batches(numbers: np.ndarray, ranks: Ranks, batch_size: int) -> list[range]:
    """A rank's share of the missing numbers in batches of consecutive ones, as equal as they can be."""
    own = ranks.share(len(numbers))
    mine = numbers[own.start : own.stop]
    if not len(mine):
        return []
    runs = np.split(mine, np.nonzero(np.diff(mine) != 1)[0] + 1)
    return [
        range(int(run[0]) + part.start, int(run[0]) + part.stop)
        for run in runs
        for part in cut(len(run), batch_size)
    ]
