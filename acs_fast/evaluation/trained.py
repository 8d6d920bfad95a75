"""Classifiers trained on the real images, kept for another call: the teacher, the reference features."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import normalize, random_resized_crop
from acs_fast.config import InputError
from acs_fast.data import ImageSet
from acs_fast.discriminator import SHOWN_EVERY, Trainer
from acs_fast.feeds import permuted
from acs_fast.models.classifier import build_classifier
from acs_fast.writer import write_atomic

LEARNING_RATE, BATCH_SIZE = 1e-3, 64
STEPS, EPOCHS = 450, 3  # whichever is more; the digits: 98 % of test images in 10 s of one core


def train_on_real(
    network: str, real: ImageSet, seed: int, device: torch.device, folder: Path | None, kind: str
) -> tuple[nn.Module, str]:
    """A classifier of the real images, frozen, in eval mode, on `device`, and what results say of it.

    Hard labels, crops of half to all of the area, flips where the set may be mirrored, AdamW with a cosine
    rate from 1e-3, 450 batches of 64 or three epochs; a bar shows it. folder: where it is kept as
    `<kind>-<network>.safetensors`, and taken from if it was made of the same images, seed and steps.
    InputError for weights that are not finite.
    """
    steps = max(STEPS, EPOCHS * len(real) // BATCH_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(network, real.images.shape[1], len(real.classes), real.images.shape[-1])
    # on a CPU the group norms of channels-last images cost more than the convolutions gain
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    made_by = {"network": network, "seed": str(seed), "steps": str(steps), "real_sha256": images_digest(real)}
    path = folder / f"{kind}-{network}.safetensors" if folder else None
    if path is None or not _load(path, made_by, model):
        _train(model, real, steps, seed, kind)
        if path is not None:
            state = {name: values.cpu().contiguous() for name, values in model.state_dict().items()}
            write_atomic(path, save(state, made_by))
    text = f"{network} trained on {len(real)} real images ({steps} steps)"
    return model.eval().requires_grad_(False), text


def images_digest(images: ImageSet) -> str:
    """SHA-256 of all that training sees of a set: shape, number of classes, mirror, pixels and labels."""
    head = [list(images.images.shape), len(images.classes), images.mirror]
    sha256 = hashlib.sha256(json.dumps(head).encode())
    for tensor in (images.images, images.labels):
        sha256.update(tensor.cpu().contiguous().numpy().data)
    return sha256.hexdigest()


def _load(path: Path, made_by: dict[str, str], model: nn.Module) -> bool:
    """Give the model the weights of a file, if they were made so; False for none, others or a damaged one."""
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != made_by or set(file.keys()) != set(wanted):
                return False
            state = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError):
        return False
    if any(state[name].shape != values.shape for name, values in wanted.items()):
        return False
    model.load_state_dict(state)
    return True


def _train(model: nn.Module, real: ImageSet, steps: int, seed: int, kind: str) -> None:
    def augment(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
        return normalize(random_resized_crop(images / 255.0, mirror, generator))

    trainer = Trainer(model)
    feed = permuted(
        real.images, real.labels, batch_size=BATCH_SIZE, mirror=real.mirror, seed=seed,
        device=trainer.device, augment=augment,
    )  # fmt: skip
    losses = trainer.learn(model.state_dict(), feed, steps=steps, lr=LEARNING_RATE)
    with tqdm(losses, total=steps, desc=f"{kind} on real images", unit="step", disable=None) as progress:
        for step, loss in enumerate(progress, start=1):
            if step % SHOWN_EVERY == 0 or step == steps:
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    feed.close()
    if not all(bool(values.isfinite().all()) for values in model.state_dict().values()):
        raise InputError(
            f"the weights of the {kind}, trained on {len(real)} real images, are not finite; name another: "
            f"--{'teacher FILE' if kind == 'teacher' else 'features NAME'}"
        )
