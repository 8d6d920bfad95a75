"""Train on a distilled set with plain PyTorch, with torchvision's ImageFolder and with timm.

    python examples/use_with_imagefolder.py            # a small set of the bundled digits is distilled first
    python examples/use_with_imagefolder.py runs/mine  # a run folder of --format png, jpeg or webp

A run keeps its set in `images/<class>/<k>.png`, which is what ImageFolder reads, with labels by the sorted
names of the classes (`--classes imagewoof` and `imagenet100` have an order of their own, which `acs-fast
evaluate` keeps). One line a loader or network comes out: how many images it has, or its loss before and
after some steps. The first part needs PyTorch and Pillow alone; what needs torchvision or timm is left out,
with the reason, where they cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset):
    """What ImageFolder is: labels are the places of the sorted class folders; x: fp32 [3, H, W] in [0, 1]."""

    def __init__(self, root: Path):
        self.root = root
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self.files[number]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, label


def fit(network: nn.Module, images: Dataset, size: int, steps: int = 20) -> tuple[float, float]:
    """Train for some steps on images resized to `size`; the loss of the first and of the last step."""
    torch.manual_seed(0)
    loader = DataLoader(images, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for x, y in loader:
            loss = F.cross_entropy(network(F.interpolate(x, size=size, mode="bilinear")), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[0], losses[-1]


def with_torchvision(plain: Folder) -> None:
    """The line with torchvision; its labels are those of `Folder`."""
    from torchvision import datasets, transforms

    images = datasets.ImageFolder(str(plain.root), transform=transforms.ToTensor())
    assert images.classes == plain.classes and torch.equal(images[0][0], plain[0][0])
    print(f"torchvision: {len(images)} images of {len(images.classes)} classes")


def with_timm(images: Folder) -> None:
    """A network of timm's from scratch; `Folder` gives RGB, so in_chans is 3."""
    import timm

    network = timm.create_model("resnet18", in_chans=3, num_classes=len(images.classes))
    first, last = fit(network, images, size=32)
    print(f"timm: resnet18, loss {first:.2f} to {last:.2f}")


def main(run: Path) -> None:
    """The three of them, on one run folder."""
    images = Folder(run / "images")
    print(f"plain: {len(images)} images of {len(images.classes)} classes")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, len(images.classes)))
    first, last = fit(network, images, size=8)
    print(f"plain: a linear classifier at 8 px, loss {first:.2f} to {last:.2f}")
    for name, show in (("torchvision", with_torchvision), ("timm", with_timm)):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for another PyTorch
            print(f"{name}: left out, it cannot be imported: {str(error).splitlines()[0]}")
        else:
            show(images)


def make_run() -> Path:
    """Three of the bundled digits, four images each, in few steps."""
    from acs_fast import DistillConfig, distill

    return distill(
        DistillConfig(
            out="runs/for-imagefolder", classes="0,1,7", ipc=4, num_curricula=2, num_sampling_steps=10
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else make_run())
