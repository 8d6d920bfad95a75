"""Distil an image folder of your own: train a small DiT, distil, judge the set beside random real images.

    python examples/distil_your_own_folder.py            # a small folder of the bundled digits is made first
    python examples/distil_your_own_folder.py FOLDER     # FOLDER/train/<class>/*, FOLDER/val/<class>/*

Under `runs/own` come out `model/` (the DiT), `set/images/<class>/<k>.png` (the distilled set) and
`set/report.html` (its page), on the screen a line a set. The training is as short as it can be, so that all
takes 20 seconds of a CPU: for images of your own raise `iterations`, `ipc` and `epochs`, and `hidden_size`
and `depth` with them. Guidance makes the set of a model that is trained too little worse, so look at the
images. The DiT works in pixels, so these must be small (up to about 64 px); for larger ones name a latent
model: `DistillConfig(model="facebook/DiT-XL-2-256", classes=...)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from acs_fast import DistillConfig, EvaluateConfig, TrainConfig, distill, evaluate, train
from acs_fast.data import load_images

OUT = Path("runs/own")


def make_folder(root: Path) -> Path:
    """A folder like yours: three classes, 60 training and 40 test images each, as PNG files."""
    for split, count in (("train", 60), ("val", 40)):
        digits = load_images("digits", split, classes=("0", "1", "7")).first(count)
        for number, (pixels, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
            path = root / split / f"digit-{digits.classes[label]}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(path)
    return root


def main(folder: Path) -> None:
    """Train, distil, evaluate; run again, each part that is whole is kept."""
    model = OUT / "model" / "model.safetensors"
    if not model.exists():  # `train` never writes over a model
        train(
            TrainConfig(
                real=str(folder), out=str(OUT / "model"), hidden_size=96, depth=2, num_heads=4, patch_size=4,
                iterations=1000, batch_size=32, lr=3e-3, ema_decay=0.98,
            )
        )  # fmt: skip

    run = distill(
        DistillConfig(model=str(model), real=str(folder), out=str(OUT / "set"), ipc=4, num_curricula=2)
    )

    judged = EvaluateConfig(
        path=str(run), protocol=("hard-adamw",), epochs=40, repeats=1, baselines=("random",)
    )
    (found,) = evaluate(judged)["evaluations"]
    for name, accuracy in found["sets"].items():
        print(f"{name}: {accuracy['last']['mean']:.1f} % of the test images, {found['ipc']} images a class")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else make_folder(OUT / "folder"))
