"""Where the time of an ImageNet-1K run goes: sampling, discriminators, waiting, by the real preset.

python -m benchmarks.imagenet_shares    2,000 images of 1,000 classes by DiT-XL/2, on a GPU
python -m benchmarks.imagenet_shares --model dit-s-8 --classes 4 --settings '{"num_sampling_steps": 2}'

A DiT and a VAE of Stable Diffusion's shape with random weights are saved, and `acs-fast distill` runs by
them, under torchrun with `--ranks`. The shares are of the wall time between the log's `start` and `end` on
rank 0: `batch` events are sampling (on a GPU with what decoding beside it takes), `discriminator` events its
training, `wait` what sampling stood still for the writer. `plan` is what the plan had expected. A row into
results/imagenet_shares.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from acs_fast.bench.subject import KL, MODELS, random_dit
from acs_fast.data import imagenet_classes
from acs_fast.environment import describe, resolve_device
from acs_fast.log import read_events
from acs_fast.models.checkpoint import save_checkpoint

RESULTS = Path(__file__).parent / "results" / "imagenet_shares.jsonl"


def save_models(folder: Path, size: str) -> None:
    """A DiT of a size as dit.safetensors, and vae/ for its latents."""
    model = random_dit(MODELS[size], torch.float32, torch.device("cpu"))
    save_checkpoint(model, folder / "dit.safetensors")
    blocks = len(KL["block_out_channels"])
    vae = AutoencoderKL(
        latent_channels=model.config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **KL,
    )
    vae.save_pretrained(folder / "vae")


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    """The run, as a user starts it."""
    python = [sys.executable, "-m"]
    if args.ranks > 1:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks), "-m"]
    (folder / "settings.json").write_text(args.settings)
    run = ["acs_fast", "distill", "--preset", "imagenet1k", "--config", str(folder / "settings.json")]
    run += ["--model", str(folder / "dit.safetensors"), "--vae", str(folder / "vae"), "--log-json"]
    run += ["--classes", ",".join(imagenet_classes()[: args.classes]), "--device", args.device]
    return [*python, *run, "--ipc", str(args.ipc), "--num-curricula", "2", "--out", str(folder / "run")]


def shares(out: Path) -> dict[str, Any]:
    """Seconds of rank 0 by what they went into, and percent of all."""
    events = [event for event in read_events(out) if event["rank"] == 0]

    def total(name: str, value: str) -> float:
        return sum(float(event[value]) for event in events if event["event"] == name)

    ends = {event["event"]: event["since"] for event in events}
    wall = ends["end"] - ends["start"]
    seconds = {
        "sampling": total("batch", "seconds"),
        "discriminators": total("discriminator", "seconds"),
        "waiting for the writer": total("wait", "writer_seconds"),
    }
    percent = {name: round(100 * value / wall, 2) for name, value in seconds.items()}
    return {"seconds": round(wall, 2), "seconds_by": seconds, "percent": percent}


def main() -> None:
    """Run it, print and append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit-xl-2", choices=MODELS)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--ipc", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--settings", default="{}", help="JSON of further settings of distill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        save_models(folder, args.model)
        done = subprocess.run(command(folder, args), check=True, stdout=subprocess.PIPE, text=True)
        row = {
            "model": args.model,
            "images": args.classes * args.ipc,
            "classes": args.classes,
            "ranks": args.ranks,
            "settings": json.loads(args.settings),
            **shares(folder / "run"),
            "seconds_with_start": round(time.perf_counter() - started, 1),
            "plan": done.stdout.split("work:")[0],
            **describe(resolve_device(args.device)),
        }
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
