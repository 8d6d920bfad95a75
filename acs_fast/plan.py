"""A run's images cut into curricula and batches, and what sampling them needs of the memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from acs_fast.models.dit import DiTConfig


@dataclass(frozen=True)
class Item:
    """One image of the distilled set: the position of its class in the run's list, its index in the class."""

    position: int
    index: int


def curriculum_ranges(ipc: int, num_curricula: int) -> list[range]:
    """The indices of each curriculum: equal parts, the remainder to the last ones (METHOD.md section 2)."""
    size, remainder = divmod(ipc, num_curricula)
    sizes = [size + (i >= num_curricula - remainder) for i in range(num_curricula)]
    return [range(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


@dataclass(frozen=True)
class Layout:
    """The order of a run's images: curriculum by curriculum, in each class by class, in a class by index.

    Curricula are counted from 1. An image has a number in its curriculum and, after those of all earlier
    curricula, one in the run.
    """

    num_classes: int
    ranges: tuple[range, ...]

    @property
    def total(self) -> int:
        """Images of the run."""
        return self.num_classes * self.ranges[-1].stop

    def size(self, curriculum: int) -> int:
        """Images of a curriculum."""
        return self.num_classes * len(self.ranges[curriculum - 1])

    def start(self, curriculum: int) -> int:
        """The number in the run of a curriculum's first image."""
        return self.num_classes * self.ranges[curriculum - 1].start

    def item(self, curriculum: int, number: int) -> Item:
        """The image of a number in its curriculum."""
        indices = self.ranges[curriculum - 1]
        position, place = divmod(number, len(indices))
        return Item(position, indices[place])

    def number(self, item: Item) -> int:
        """An image's number in the run."""
        curriculum = next(i for i, indices in enumerate(self.ranges, start=1) if item.index in indices)
        indices = self.ranges[curriculum - 1]
        return self.start(curriculum) + item.position * len(indices) + item.index - indices.start


def cut(count: int, size: int) -> list[range]:
    """0..count-1 in the fewest parts of at most `size`, as equal as they can be."""
    parts = -(-count // size)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def bytes_per_image(shape: DiTConfig, dtype: torch.dtype, jacobian: str = "identity") -> int:
    """What the engine holds for an image of a batch: both branches' tokens, hidden layer and attention.

    Per token: residual, its norm, a branch's result, attention's result, and 4 D of the MLP, twice for
    libraries that do not write in place, and 2 D for the guidance. With the full Jacobian autograd keeps
    about 19 D per token and block.
    """
    tokens = 2 * (shape.input_size // shape.patch_size) ** 2
    widths = 14 + (19 * shape.depth if jacobian == "full" else 0)
    return tokens * widths * shape.hidden_size * dtype.itemsize


def available_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken: the GPU's free and cached ones, or the machine's; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
