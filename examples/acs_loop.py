"""Adversary-guided curriculum sampling in a loop of your own, over any `acs_fast.Backend`.

    python examples/acs_loop.py fast          the engine
    python examples/acs_loop.py reference     plain PyTorch: the same images, slower

Samples ten digits of each of three classes in five curricula with the model that comes with the package, and
prints how well each discriminator knows the images that come after it. It writes OUT/<class>/<index>.png.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from acs_fast import Backend, DistillConfig, get_backend
from acs_fast.discriminator import score

CLASSES, IPC, CURRICULA = [3, 5, 8], 10, 5


def sample_set(backend: Backend, config: DistillConfig) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """The samples [n, C, H, W], their targets, and each discriminator's accuracy on the next curriculum."""
    backend.prepare(config, class_labels=CLASSES, batch_size=len(CLASSES) * IPC // CURRICULA)
    samples, targets, known = [], [], []
    discriminator = None
    for curriculum in range(CURRICULA):
        if curriculum:
            discriminator = backend.fit(torch.cat(samples), torch.cat(targets), seed=curriculum)
        first = curriculum * IPC // CURRICULA
        indices = torch.arange(first, (curriculum + 1) * IPC // CURRICULA)
        places = torch.arange(len(CLASSES)).repeat_interleave(len(indices))
        x = backend.sample(
            torch.tensor(CLASSES)[places], indices.repeat(len(CLASSES)), discriminator, targets=places
        )
        if discriminator is not None:
            right, _ = score(discriminator, x, places)
            known.append(100.0 * right.double().mean().item())
        samples.append(x)
        targets.append(places)
    return torch.cat(samples), torch.cat(targets), known


def main(name: str, out: Path) -> None:
    """Sample, and write the images."""
    backend = get_backend(name)
    samples, targets, known = sample_set(backend, DistillConfig(ipc=IPC, num_curricula=CURRICULA))
    images = ((backend.decode(samples).float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    for number, (image, place) in enumerate(zip(images, targets.tolist(), strict=True)):
        path = out / str(CLASSES[place]) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    shown = ", ".join(f"{value:.0f} %" for value in known)
    print(f"{len(images)} images in {out}; each discriminator knew of the next curriculum: {shown}")


if __name__ == "__main__":
    main(*(sys.argv[1:2] or ["fast"]), Path(*sys.argv[2:3] or ["acs-loop"]))
