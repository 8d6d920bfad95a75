"""Times a diffusers script with and without `accelerate`, interleaved in one process.

python -m benchmarks.drop_in_speed --device cpu --batch-sizes 1 8 --dtypes fp32
python -m benchmarks.drop_in_speed --device cuda --batch-sizes 1 8 --dtypes bf16

The script is `DiTPipeline(labels, guidance_scale=4, generator=..., num_inference_steps=N)` with DDIM and
DiT-XL/2 of random weights; a figure is a whole warm call, what the user waits for. The VAE is a small one of
factor 1, so that the transformer is what is timed: that of Stable Diffusion would add the same to both.
`first_call_s` is the first call with `accelerate`, which makes the engine. Without a green check there is no
figure: the images of both are at most one grey level apart in fp32; in 16 bits ours are at most a level more
than twice as far from fp32's as diffusers' own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acs_fast.environment import resolve_device
from acs_fast.models.dit import DiTConfig
from benchmarks.baselines import setting, timing, transformer
from benchmarks.baselines.setting import DTYPES
from benchmarks.baselines.timing import Machine

RESULT = Path(__file__).parent / "results" / "drop_in.jsonl"
MODELS = {
    "dit-xl-2": setting.MODELS["dit-xl-2"],
    "tiny": DiTConfig(8, 2, hidden_size=32, depth=2, num_heads=2, **setting.DIFFUSERS),
}
GREY_LEVEL = 1.0 / 255.0


def make_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' own pipeline: random weights, DDIM, a small VAE of factor 1."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline  # deferred: an optional package

    module = transformer.diffusers_transformer(
        setting.random_dit(MODELS[model], dtype, device), dtype, device
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).to(device, dtype).eval()
    pipe = DiTPipeline(module, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, batch_size: int, steps: int) -> np.ndarray:
    """The images [B, H, W, 3] in [0, 1] of the script's one call."""
    labels, generator = list(range(0, 100 * batch_size, 100)), torch.Generator().manual_seed(0)
    output = pipe(
        labels, guidance_scale=4.0, generator=generator, num_inference_steps=steps, output_type="np"
    )
    return np.asarray(output.images)


def interval(ratios: list[float]) -> list[float]:
    """The smallest and largest of the rounds' ratios: from 6 rounds on it holds the median at 95 %."""
    return [round(min(ratios), 3), round(max(ratios), 3)]


def compare(options: argparse.Namespace, dtype: str, batch_size: int, exact: Any) -> dict[str, Any]:
    """The row of a batch size. exact: diffusers in fp32, or None where that is what is compared."""
    from acs_fast import accelerate

    pipe = make_pipeline(options.model, DTYPES[dtype], options.device)
    fast = accelerate(pipe)
    started = time.perf_counter()
    ours = call(fast, batch_size, options.steps)
    first = time.perf_counter() - started
    theirs = call(pipe, batch_size, options.steps)
    row: dict[str, Any] = {
        "model": options.model, "batch_size": batch_size, "dtype": dtype, "steps": options.steps,
        "scheduler": "DDIM", "guidance_scale": 4.0, "vae": "factor 1", "first_call_s": round(first, 1),
    }  # fmt: skip
    error, allowed = float(np.abs(ours - theirs).max()), GREY_LEVEL
    if exact is not None:
        truth = call(exact, batch_size, options.steps)
        error, allowed = (
            float(np.abs(ours - truth).max()),
            2 * float(np.abs(theirs - truth).max()) + GREY_LEVEL,
        )
    row |= {"error": round(error, 6), "check": round(error / allowed, 4)}
    if not error <= allowed:
        return {**row, "reason": f"its error is {error:.1e}, {allowed:.1e} is allowed"}
    runs = {
        "without": partial(call, pipe, batch_size, options.steps),
        "with": partial(call, fast, batch_size, options.steps),
    }
    times = timing.interleaved(runs, options.repeats, options.device)
    ratios = [a / b for a, b in zip(times["without"], times["with"], strict=True)]
    return {
        **row,
        "unit": "s",
        "without": round(statistics.median(times["without"]), 3),
        "with": round(statistics.median(times["with"]), 3),
        "times_as_fast": round(statistics.median(ratios), 3),
        "interval": interval(ratios),
        "rounds": options.repeats,
        "attention": fast._backend.config.attention,
        "compile": fast._backend.note,
    }


def main() -> None:
    """Parse the command line, append a row for every batch size and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--model", choices=MODELS, default="dit-xl-2")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    machine = Machine.measured(options.device)
    failed = False
    for dtype in options.dtypes:
        for batch_size in options.batch_sizes:
            exact = None
            if dtype != "fp32":
                exact = make_pipeline(options.model, torch.float32, options.device)
            row = {"kind": "drop-in", **compare(options, dtype, batch_size, exact), **machine.provenance()}
            timing.append(options.result, row)
            failed |= "reason" in row
            shown = row.get("reason") or (
                f"{row['without']} s without, {row['with']} s with: {row['times_as_fast']} times as fast "
                f"{row['interval']}, first call {row['first_call_s']} s"
            )
            print(f"batch {batch_size} {dtype}: {shown}", flush=True)
            gc.collect()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
