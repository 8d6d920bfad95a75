"""A teacher's labels of a soft training: computed once, kept in fp16 with their crops, used again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import cutmix, to_device
from acs_fast.config import InputError
from acs_fast.data import ImageSet
from acs_fast.evaluation.protocols import Recipe
from acs_fast.evaluation.trained import images_digest
from acs_fast.evaluation.training import Learner
from acs_fast.evaluation.transforms import Draws, transformed
from acs_fast.writer import read_json, read_tensors, write_json, write_tensors

IDENTITY = "labels.json"
STORED = {
    "rows": torch.int32,
    "crops": torch.int16,  # whole pixels
    "patches": torch.bool,
    "box": torch.int16,
    "order": torch.int32,
    "logits": torch.float16,
}


class SoftLabels:
    """The labels that a teacher gives in one training: a file an epoch, `epoch-000.safetensors`, ...

    A file holds, of all batches in order, `rows` int32 [N], `crops` int16 [N, 5], `patches` bool [N, 2],
    `order` int32 [N] within the batch, `box` int16 [steps, 4], and `logits` fp16 [N, K] of the mixed
    batches. They are a function of the images, the teacher, the recipe and the seed; any student may be
    trained by them.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """InputError for a folder that holds other labels. identity: of `identity`."""
        self.folder = folder
        known = read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else None
        if known != identity and (known is not None or any(folder.glob("epoch-*.safetensors"))):
            old = known if isinstance(known, dict) else {}
            differs = next((key for key in identity if old.get(key) != identity[key]), "its form")
            raise InputError(
                f"the soft labels in {folder} are others ({differs} is {old.get(differs)!r}, here "
                f"{identity.get(differs)!r}); name another --stored-soft-labels folder"
            )
        self.identity = identity

    def complete(self, make: Callable[[], Learner]) -> None:
        """Let a learner's teacher label what is not there yet; a bar shows it. May be stopped.

        make: an untrained learner of the identity, which this does not train.
        """
        epochs = self.identity["epochs"]
        missing = [epoch for epoch in range(epochs) if not self._path(epoch).is_file()]
        if not missing:
            return
        write_json(self.folder / IDENTITY, self.identity)
        learner = make()
        with tqdm(total=len(missing), desc="soft labels", unit="epoch", disable=None) as progress:
            for epoch in range(epochs):
                batches = list(learner.draws())  # also of those that are there: chance goes on
                if epoch in missing:
                    write_tensors(self._path(epoch), _packed(batches, learner))
                    progress.update()

    def draws(self, epoch: int, batch_size: int) -> Iterator[Draws]:
        """The draws of epoch 0..E-1 with the teacher's `logits`; InputError for a file that is damaged."""
        stored = read_tensors(self._path(epoch))
        if stored is None:
            path = self._path(epoch)
            raise InputError(f"soft labels {path} cannot be read; delete the file and evaluate again")
        box = stored.pop("box").long()
        parts = {name: values.split(batch_size) for name, values in stored.items()}
        for step in range(len(box)):
            draws = {name: values[step] for name, values in parts.items()}
            for name in ("rows", "order"):
                draws[name] = draws[name].long()
            yield {**draws, "crops": draws["crops"].float(), "box": box[step]}

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:03d}.safetensors"


def identity(train: ImageSet, teacher: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What the labels are a function of, for `labels.json`."""
    return {
        "seed": seed,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "image_size": train.images.shape[-1],
        "mirror": train.mirror,
        "images": images_digest(train)[:12],
        "teacher": network_digest(teacher)[:12],
    }


def network_digest(network: nn.Module) -> str:
    """SHA-256 of all weights and statistics, with their names."""
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        digest.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _packed(batches: list[Draws], learner: Learner) -> dict[str, Tensor]:
    """The draws of an epoch with the teacher's logits, as they are stored."""
    logits = []
    for draws in batches:
        there = {name: to_device(values, learner.device) for name, values in draws.items()}
        mixed, _ = cutmix(transformed(learner.images, there), there["box"], there["order"])
        logits.append(learner.teach(mixed).cpu())
    found = {name: torch.cat([d[name] for d in batches]) for name in batches[0] if name != "box"}
    found |= {"box": torch.stack([d["box"] for d in batches]), "logits": torch.cat(logits)}
    return {name: values.to(STORED[name]) for name, values in found.items()}
