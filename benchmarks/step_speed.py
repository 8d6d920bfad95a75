"""Times a guided step: the engine beside the frozen baselines E, C and P, interleaved in one process.

python -m benchmarks.step_speed --device cpu --batch-sizes 1 4 --dtypes bf16 fp32
python -m benchmarks.step_speed --device cuda --batch-sizes 1 8 66 --baselines e c p

DiT-XL/2 with random weights, CFG, every step guided by a latent ConvNet-3. A figure is a whole trajectory of
few steps, divided; decoding is not in it. E, C and P are described in benchmarks/baselines/__init__.py; of C
the fastest mode counts. `check` is the error of x at the end of the trajectory, with the same noise, against
the plain sampler in fp32, as a share of twice what E has in the same dtype. The linears' rate, which the
percentages are of, is the four shapes of a block, timed in the same rounds, with the weights packed where
that is faster. Memory is the peak of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acs_fast.environment import resolve_device
from acs_fast.linear import Linear, can_pack
from acs_fast.models.dit import DiTConfig
from benchmarks.baselines import methods, setting, timing
from benchmarks.baselines.methods import Errors, Method, Scene, Truth
from benchmarks.baselines.setting import DTYPES
from benchmarks.baselines.timing import Machine

RESULT = Path(__file__).parent / "results" / "step.jsonl"
TRAJECTORY = 50  # steps of a published run


def gemm(config: DiTConfig, batch_size: int, dtype: str, device: torch.device) -> dict[str, Any]:
    """Name -> one run of a block's four linears at this batch size, plain and packed, in a dtype."""
    rows, plain, packed = setting.gemm_rows(config, batch_size), [], []
    for k, n in setting.gemm_shapes(config).values():
        size = torch.finfo(DTYPES[dtype]).bits // 8 * (rows * k + k * n)
        for _ in range(timing.copies(size, device)):
            x = torch.randn(rows, k, device=device).to(DTYPES[dtype])
            module = nn.Linear(k, n, device=device, dtype=DTYPES[dtype]).requires_grad_(False)
            plain.append(partial(module, x))
            if can_pack(module.weight):
                packed.append(partial(Linear(module, rows), x))
    runs = {f"gemm {dtype}": timing.together(plain, device)[0]}
    if packed:
        runs[f"gemm {dtype} packed"] = timing.together(packed, device)[0]
    return {name: (run, len(plain) // 4) for name, run in runs.items()}


def gemm_rates(
    times: dict[str, list[float]], rounds: dict[str, int], config: DiTConfig, batch_size: int
) -> dict[str, float]:
    """FLOP/s of the four linears by dtype, the faster of plain and packed."""
    rows = setting.gemm_rows(config, batch_size)
    flop = sum(2 * rows * k * n for k, n in setting.gemm_shapes(config).values())
    rates: dict[str, float] = {}
    for name, number in rounds.items():
        dtype = name.split()[1]
        rates[dtype] = max(rates.get(dtype, 0.0), number * flop / statistics.median(times[name]))
    return rates


def checked(method: Method, truth: Truth, usual: Errors | None) -> tuple[dict[str, Any], Errors]:
    """The error fields of a method's row, with a `reason` if it may have no figure; `usual`: those of E."""
    errors = truth.errors(method)
    row: dict[str, Any] = {"error_x": errors.x, "error_denoiser": errors.denoiser}
    if usual is None:  # E itself, the yardstick
        row["check"] = errors.denoiser / methods.SANE[method.dtype]
    else:
        floor = methods.FLOOR[method.dtype]
        row["check"] = max(errors.x / (2 * usual.x + floor), errors.denoiser / (2 * usual.denoiser + floor))
    row["check"] = round(row["check"], 4)
    if not row["check"] <= 1.0:
        row["reason"] = f"its error is {row['check']} times the allowed one"
    return row, errors


def compare(scene: Scene, truth: Truth, baselines: str, options: argparse.Namespace) -> list[Any]:
    """The rows of one batch size: every method in every dtype, interleaved."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for dtype in options.dtypes:
        usual: Errors | None = None
        for number, method in enumerate(listed(scene, dtype, baselines, options)):
            row, errors = checked(method, truth, None if number == 0 or method.name == "P" else usual)
            usual = usual or errors
            if "reason" not in row:
                runs[str(len(rows))] = method.run
            about = {
                "name": method.name,
                "batch_size": scene.batch_size,
                "dtype": dtype,
                "steps": scene.steps,
            }
            rows.append(about | method.about | row)
    gemms = {
        k: v for name in dict.fromkeys((*options.dtypes, "bf16")) for k, v in linears(scene, name).items()
    }
    times = timing.interleaved(
        runs | {name: run for name, (run, _) in gemms.items()}, options.repeats, scene.device
    )
    rates = gemm_rates(times, {name: n for name, (_, n) in gemms.items()}, scene.model, scene.batch_size)
    for number, row in enumerate(rows):
        if str(number) not in runs:
            continue
        row |= figures(times[str(number)], scene)
        if row["name"] != "P":  # most of P's work is the decode
            row |= shares(row, rates)
        if scene.device.type == "cpu" and row["name"] != "P":
            row["operator_ms"] = timing.operator_ms(runs[str(number)], scene.steps)
    return with_ratios(rows, times)


def listed(scene: Scene, dtype: str, baselines: str, options: argparse.Namespace) -> list[Method]:
    """The methods of a dtype, E first."""
    module, source = methods.make_transformer(scene, dtype)
    found = [methods.eager(scene, dtype, module, source), methods.ours(scene, dtype)]
    if "c" in baselines:
        modes = tuple(options.modes or methods.MODES[scene.device.type])
        found += methods.compiled(scene, dtype, module, source, modes)
    if "p" in baselines and scene.batch_size == 1 and dtype == options.dtypes[0]:
        try:
            found.append(methods.relatives(scene))
        except ImportError as missing:
            print(f"P: no figure, {timing.first_line(missing)}", flush=True)
    return found


def linears(scene: Scene, dtype: str) -> dict[str, Any]:
    """`gemm` of a scene."""
    return gemm(scene.model, scene.batch_size, dtype, scene.device)


def figures(times: list[float], scene: Scene) -> dict[str, Any]:
    """Of seconds per trajectory: milliseconds per step, images/s of 50 steps, the rate of the denoiser."""
    row = timing.figures([t / scene.steps for t in times], 1e3, "ms")
    flop = 2 * scene.batch_size * setting.denoiser_flops(scene.model)
    rate = flop / (row["median"] / 1e3)
    return row | {
        "images_per_s": round(1e3 * scene.batch_size / (TRAJECTORY * row["median"]), 5),
        "flop": flop,
        "gflop_s": round(rate / 1e9, 3),
    }


def shares(row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """A row's rate as a share of the linears', in its dtype and in bf16."""
    return {
        "gemm_gflop_s": {name: round(value / 1e9, 3) for name, value in rates.items()},
        "percent_of_gemm": round(100e9 * row["gflop_s"] / rates[row["dtype"]], 1),
        "percent_of_bf16_gemm": round(100e9 * row["gflop_s"] / rates["bf16"], 1),
    }


def with_ratios(rows: list[dict[str, Any]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every row with how many times as fast as E and the fastest C it is: in its dtype, and theirs in bf16.

    A ratio is the median of those of the rounds, so that a machine that slows down slows both.
    """
    for number, row in enumerate(rows):
        for name in ("E", "C"):
            for key, dtype in (
                (f"times_as_fast_as_{name}", row["dtype"]),
                (f"times_as_fast_as_bf16_{name}", "bf16"),
            ):
                others = [
                    other
                    for other, candidate in enumerate(rows)
                    if candidate["name"] in (name, f"{name}-plain") and candidate["dtype"] == dtype
                    if "median" in candidate
                ]
                if others and "median" in row and row["name"] != "P":
                    best = min(others, key=lambda other: rows[other]["median"])
                    pairs = zip(times[str(best)], times[str(number)], strict=True)
                    row[key] = round(statistics.median(theirs / own for theirs, own in pairs), 3)
    return rows


# --- memory ------------------------------------------------------------------------------------------------


def peak_memory(scene: Scene, dtype: str, name: str, model: str) -> int | None:
    """Peak MB of a process that samples one batch by one method and does nothing else; None if it fails."""
    command = [
        sys.executable, "-m", "benchmarks.step_speed", "--child", name, "--model", model,
        "--device", scene.device.type, "--batch-sizes", str(scene.batch_size), "--dtypes", dtype,
        "--steps", str(scene.steps), "--compile", scene.compile,
    ]  # fmt: skip
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: no peak memory, {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    return round(float(json.loads(done.stdout.splitlines()[-1])))


def child(scene: Scene, dtype: str, name: str) -> float:
    """The peak MB of this process from here on: of the engine its making too, of E and C the sampling.

    The engine has the table of `TRAJECTORY` steps and all classes; on a CPU it walks `--steps` of them.
    """
    if name == "ours":
        reset_peak(scene.device)
        made, _ = methods.engine_of(scene, dtype, TRAJECTORY)
        batch, engine = setting.batch(scene.model, scene.batch_size, torch.device("cpu")), made.engine
        assert engine is not None
        walk = engine.denoise(batch.class_labels, batch.indices, batch.targets)
        for _ in itertools.islice(walk, scene.steps):
            pass
        return peak(scene.device)
    module, source = methods.make_transformer(scene, dtype)
    reset_peak(scene.device)
    if name == "C":
        methods.compiled(scene, dtype, module, source, ("default",))
    else:
        methods.eager(scene, dtype, module, source).run()
    return peak(scene.device)


def reset_peak(device: torch.device) -> None:
    """Give back what is free and forget the peak so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Peak MB since the reset: allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


# --- the command -------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as they are printed."""
    lines = [
        "| batch | dtype | method | ms per step | p20 | p80 | images/s | times E | times C | times bf16 E "
        "| times bf16 C | % of GEMM | % of bf16 GEMM | peak MB | check |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = row["name"] + (f" ({row['mode']})" if "mode" in row else "")
        if "median" not in row:
            lines.append(f"| {row['batch_size']} | {row['dtype']} | {label} | no figure: {row['reason']} |")
            continue
        names = (
            "median", "p20", "p80", "images_per_s", "times_as_fast_as_E", "times_as_fast_as_C",
            "times_as_fast_as_bf16_E", "times_as_fast_as_bf16_C", "percent_of_gemm", "percent_of_bf16_gemm",
            "peak_mb", "check",
        )  # fmt: skip
        values = ("" if row.get(name) is None else row[name] for name in names)
        cells = [row["batch_size"], row["dtype"], label, *values]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--model", default="dit-xl-2", choices=tuple(setting.MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="B", help="default: 1 8 66, 1 on a CPU")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="default: bf16, on a CPU both")
    parser.add_argument("--steps", type=int, default=4, help="of a timed trajectory")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all methods")
    parser.add_argument(
        "--baselines", nargs="*", default=["e"], choices=("e", "c", "p"), help="E always runs"
    )
    parser.add_argument("--modes", nargs="+", help="of torch.compile; default: all for the device")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="of the engine")
    parser.add_argument("--no-memory", action="store_true", help="no processes for the peak memory")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=("ours", "E", "C"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    given = parse(arguments)
    device, model = resolve_device(given.device), setting.MODELS[given.model]
    cuda = device.type == "cuda"
    sizes = given.batch_sizes or ((1, 8, 66) if cuda else (1,))
    given.dtypes = dtypes = given.dtypes or (["bf16"] if cuda else ["bf16", "fp32"])
    torch.backends.cudnn.allow_tf32 = False  # what errors are measured by is fp32
    if given.child:
        print(child(Scene(model, sizes[0], given.steps, device, given.compile), dtypes[0], given.child))
        return 0
    world = {"kind": "step", "model": given.model, **Machine.measured(device).provenance()}
    done: list[dict[str, Any]] = []
    for size in sizes:
        scene = Scene(model, size, given.steps, device, given.compile)
        truth = methods.truth(scene)
        names = () if given.no_memory else ("ours", "E", *(("C",) if "c" in given.baselines else ()))
        peaks = {
            (name, dtype): peak_memory(scene, dtype, name, given.model) for name in names for dtype in dtypes
        }
        rows = compare(scene, truth, "".join(given.baselines), given)
        for row in rows:
            row["peak_mb"] = peaks.get((row["name"].removesuffix("-plain"), row["dtype"]))
            timing.append(given.out, {**row, **world})
        gc.collect()
        print(table(rows), flush=True)
        done += rows
    return 1 if any("reason" in row for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
