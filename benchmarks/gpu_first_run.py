"""What the first run on a GPU settles: matrix products, attention, FP8, the step of the baselines.

python -m benchmarks.gpu_first_run --out results.jsonl        under 9 minutes on an H100 or H200
python -m benchmarks.gpu_first_run --device cpu --quick ...   the same code on tiny shapes, in seconds

Needs torch, triton, numpy and safetensors; with diffusers its own transformer is timed too, with xformers its
attention. A row whose result is wrong, or which a library refuses, has a `reason` and no figure. Calls rotate
through operands that overflow the L2 and are timed as one CUDA graph, so by the GPU alone; a step of a
baseline is timed as its users run it, launches and all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.attention import KERNELS, Attention
from acs_fast.environment import resolve_device
from acs_fast.models.dit import DiTConfig
from benchmarks.baselines import sampling, setting, timing, transformer
from benchmarks.baselines.timing import Machine, Trial, relative_error
from benchmarks.ops_bench import interpreted

BATCHES = (1, 8, 11, 32, 33, 64, 66)
# batch size and modes of torch.compile, the most telling first: time may run out
STEPS = (
    (66, ("default",)),
    (1, ("default", "reduce-overhead")),
    (8, ("default",)),
    (66, ("max-autotune-no-cudagraphs",)),
    (1, ("max-autotune-no-cudagraphs",)),
    (8, ("reduce-overhead", "max-autotune-no-cudagraphs")),
)
BF16_ROUNDING, FP8_ROUNDING = 2.0**-8, 2.0**-4  # half a unit in the last place of bf16, of e4m3
FP8_ACCUMULATION = 2e-2  # what the tensor cores' short sums may add to a product of e4m3
COMPILE_SECONDS = 90.0  # what a compilation is taken to need until one was timed


@dataclass
class Plan:
    """What is run: full size, or tiny."""

    config: DiTConfig
    batches: tuple[int, ...]
    steps: tuple[tuple[int, tuple[str, ...]], ...]
    num_sampling_steps: int
    repeats: int
    deadline: float  # of the clock `time.monotonic`
    compile_seconds: list[float] = field(default_factory=list)


def plan(quick: bool, minutes: float) -> Plan:
    """The full plan, or with `quick` two tiny batches of everything."""
    deadline = time.monotonic() + 60 * minutes
    if quick:
        return Plan(setting.MODELS["small"], (1, 3), ((2, ("default",)),), 2, 2, deadline)
    return Plan(setting.MODELS["dit-xl-2"], BATCHES, STEPS, 4, 5, deadline)


def operands(
    rows: int, k: int, n: int, device: torch.device, element_bytes: int = 2
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x [rows, K], W [N, K] and b [N] in bf16, one set after another for the rotation."""
    count = timing.copies(element_bytes * (rows * k + k * n), device)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(count):
        shapes = ((rows, k), (n, k), (n,))
        x, w, b = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        yield x.bfloat16(), (w / k**0.5).bfloat16(), b.bfloat16()


def gemm_trials(config: DiTConfig, batch: int, device: torch.device) -> Iterator[Trial]:
    """cuBLAS at a block's four linears in bf16 with bias; fc1 with GELU in the epilogue and after it too."""
    gelu = "tanh" if device.type == "cuda" else "none"  # what the epilogue computes on either
    linear: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "bias": lambda x, w, b: torch.addmm(b, x, w.t()),
        "bias, gelu": lambda x, w, b: torch._addmm_activation(b, x, w.t(), use_gelu=True),
        "bias, then gelu": lambda x, w, b: F.gelu(torch.addmm(b, x, w.t()), approximate=gelu),
    }
    rows = setting.gemm_rows(config, batch)
    for name, (k, n) in setting.gemm_shapes(config).items():
        sets = list(operands(rows, k, n, device))
        x, w, b = sets[0]
        plain = F.linear(x.float(), w.float(), b.float())
        for epilogue in linear if name == "fc1" else ("bias",):
            expected = plain if epilogue == "bias" else F.gelu(plain, approximate=gelu)
            # gelu of a rounded product rounds twice
            allowed = BF16_ROUNDING * (2 if epilogue == "bias, then gelu" else 1)
            yield Trial(
                {
                    "kind": "gemm", "name": name, "epilogue": epilogue, "batch_size": batch,
                    "shape": {"M": rows, "K": k, "N": n}, "dtype": "bf16", "tier": "high",
                },
                [partial(linear[epilogue], *s) for s in sets],
                partial(relative_error, expected=expected),
                allowed,
                2 * rows * k * n,
                2 * (rows * k + k * n + n + rows * n),
            )  # fmt: skip


def quantised(x: Tensor, rowwise: bool) -> tuple[Tensor, Tensor]:
    """x in e4m3 and its scale, [] or [rows, 1]: x is about their product."""
    amax = x.float().abs().amax(dim=1, keepdim=True) if rowwise else x.float().abs().amax()
    scale = amax / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def scaled_trials(config: DiTConfig, batch: int, device: torch.device) -> Iterator[Trial]:
    """`torch._scaled_mm` in e4m3, scales by row or by tensor, with and without fast accumulation."""
    rows = setting.gemm_rows(config, batch)
    for name, (k, n) in setting.gemm_shapes(config).items():
        for rowwise in (True, False):
            sets: list[Any] = []
            wanted = torch.empty(0)
            exact = torch.empty(0)
            for x, w, b in operands(rows, k, n, device, element_bytes=1):
                (x8, sx), (w8, sw) = quantised(x, rowwise), quantised(w, rowwise)
                if not sets:
                    wanted = F.linear(x.float(), w.float(), b.float())
                    exact = F.linear(x8.float() * sx, w8.float() * sw, b.float())
                sets.append((x8, w8.t(), sx, sw.t() if rowwise else sw, b))
            for fast in (True, False):
                yield Trial(
                    {
                        "kind": "scaled_mm", "name": name, "scales": "rowwise" if rowwise else "tensorwise",
                        "fast_accumulation": fast, "batch_size": batch,
                        "shape": {"M": rows, "K": k, "N": n}, "dtype": "e4m3", "tier": "approximate",
                    },
                    [partial(scaled_mm, fast, *s) for s in sets],
                    partial(fp8_error, wanted=wanted, exact=exact),
                    1.0,
                    2 * rows * k * n,
                    rows * k + k * n + 2 * (n + rows * n),
                )  # fmt: skip


def fp8_error(out: Tensor, wanted: Tensor, exact: Tensor) -> float:
    """Error as a share of the allowed: of the unrounded product, and of that of the rounded operands."""
    rounding = relative_error(out, wanted) / FP8_ROUNDING
    return max(rounding, relative_error(out, exact) / FP8_ACCUMULATION)


def scaled_mm(fast: bool, x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor) -> Tensor:
    """x W + b from e4m3 x [M, K] and W [K, N], by the columns, to bf16."""
    out: Tensor = torch._scaled_mm(
        x, w, scale_a=scale_x, scale_b=scale_w, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return out


def attention_trials(config: DiTConfig, batch: int, device: torch.device) -> Iterator[Trial]:
    """Every attention kernel on qkv [2B, T, 3, H, d] as the fused projection leaves it, to [2B, T, D]."""
    tokens, heads = (config.input_size // config.patch_size) ** 2, config.num_heads
    shape = (2 * batch, tokens, 3, heads, config.hidden_size // heads)
    size = 2 * torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(0)
    sets = [
        torch.randn(shape, generator=generator, device=device).bfloat16()
        for _ in range(timing.copies(size, device))
    ]
    expected = Attention("math")(sets[0].float())
    for kernel in KERNELS:
        yield Trial(
            {
                "kind": "attention", "name": kernel, "batch_size": batch,
                "shape": {"B": 2 * batch, "H": heads, "T": tokens, "d": shape[-1]}, "dtype": "bf16",
                "tier": "high",
            },
            [partial(Attention(kernel), qkv) for qkv in sets],
            partial(relative_error, expected=expected),
            2 * BF16_ROUNDING,  # the probabilities are rounded too
            4 * 2 * batch * tokens**2 * config.hidden_size,
            size * 4 // 3,
        )  # fmt: skip


class Steps:
    """The guided step of E, E-plain and C: random weights, latent ConvNet-3, every step guided."""

    def __init__(self, plan: Plan, machine: Machine):
        self.plan, self.machine, self.device = plan, machine, machine.device
        self.wide = setting.random_dit(plan.config, torch.float32, self.device)
        self.narrow = setting.random_dit(plan.config, torch.bfloat16, self.device)
        self.eager: dict[str, nn.Module] = {}
        self.refusals: dict[str, str] = {}
        for name, make in (
            ("E", transformer.diffusers_transformer),
            ("E-plain", transformer.plain_transformer),
        ):
            try:
                self.eager[name] = make(self.narrow, torch.bfloat16, self.device)
            except ImportError as error:
                self.refusals[name] = timing.first_line(error)

    @torch.no_grad()
    def error(self, denoiser: transformer.Denoiser, batch: setting.Batch) -> tuple[float, float]:
        """Of a denoiser's output at this batch size, and of our DiT's in bf16, both against it in fp32."""
        c, size = self.plan.config, len(batch.class_labels)
        generator = torch.Generator(self.device).manual_seed(3)
        shape = (2 * size, c.in_channels, c.input_size, c.input_size)
        x = torch.randn(shape, generator=generator, device=self.device)
        timesteps = torch.full((2 * size,), 500, device=self.device)
        labels = torch.cat((batch.class_labels, torch.full_like(batch.class_labels, self.wide.null_label)))
        some = torch.tensor([0, size - 1, size, 2 * size - 1], device=self.device)  # rows do not mix
        expected = self.wide(x[some], timesteps[some], labels[some])
        plain = self.narrow(x[some].bfloat16(), timesteps[some], labels[some])
        got = denoiser(x.bfloat16(), timesteps, labels)[some]
        return relative_error(got, expected), relative_error(plain, expected)

    def rows(self, batch_size: int, modes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The rows of one batch size: the eager ones and C in some modes, interleaved."""
        batch = setting.batch(self.plan.config, batch_size, self.device)
        torch.compiler.reset()  # else a later shape of the same function is one recompilation too many
        rows: dict[str, dict[str, Any]] = {}
        runs: dict[str, Callable[[], Any]] = {}
        methods = {name: transformer.denoiser(module) for name, module in self.eager.items()}
        base = next(iter(self.eager))
        for mode in modes:
            methods[f"C ({mode})"] = transformer.compiled(self.eager[base], mode)
        for name, reason in self.refusals.items():
            yield {**self.labels(name, batch_size), "reason": reason}
        for name, denoiser in methods.items():
            row = self.labels(name, batch_size)
            if name.startswith("C"):
                row["transformer"] = base
            rows[name] = row
            run = self.trajectory(denoiser, batch)
            row |= self.prepared(denoiser, batch, run, name.startswith("C"))
            if "reason" not in row:
                runs[name] = run
        times = timing.interleaved(runs, self.plan.repeats, self.device)
        for name, row in rows.items():
            yield row | (self.figures(times[name], batch_size) if name in times else {})

    def labels(self, name: str, batch_size: int) -> dict[str, Any]:
        """What stands in the row of a method."""
        return {
            "kind": "step",
            "name": name,
            "batch_size": batch_size,
            "steps": self.plan.num_sampling_steps,
            "discriminator": "convnet-3 on latents, autograd",
            "dtype": "bf16",
            "tier": "high",
        }

    def prepared(
        self, denoiser: transformer.Denoiser, batch: setting.Batch, run: Callable[[], Any], compiles: bool
    ) -> dict[str, Any]:
        """Compile, where there is time for it, check the output, and see that a trajectory runs."""
        expected = max(self.plan.compile_seconds, default=COMPILE_SECONDS) if compiles else 0.0
        if compiles and time.monotonic() + expected > self.plan.deadline:
            return {"reason": "no time was left to compile it"}
        started = time.monotonic()
        try:
            error, plain = self.error(denoiser, batch)
            run()
        except Exception as failure:  # the compiler's exceptions are of many kinds
            return {"reason": f"{type(failure).__name__}: {timing.first_line(failure)}"}
        row: dict[str, Any] = {"error": error, "check": round(error / (2 * plain), 4)}
        if compiles:
            self.plan.compile_seconds.append(time.monotonic() - started)
            row["compile_seconds"] = round(self.plan.compile_seconds[-1], 1)
        if not error <= 2 * plain:
            row["reason"] = f"its error is {error:.1e}, {2 * plain:.1e} is allowed"
        return row

    def trajectory(self, denoiser: transformer.Denoiser, batch: setting.Batch) -> Callable[[], Tensor]:
        """One call: the whole trajectory of a batch."""
        c, model = self.plan.config, self.narrow
        config = setting.run_config(self.plan.num_sampling_steps, len(batch.class_labels), self.device)
        network = setting.guidance(config, c.in_channels, c.input_size, self.device).discriminator
        if self.device.type == "cuda":
            network.bfloat16()
        shape = (c.in_channels, c.input_size, c.input_size)

        def run() -> Tensor:
            *_, x = sampling.guided_steps(
                denoiser, network, config, batch, shape, model.null_label, torch.bfloat16,
                sampling.torch_noise(self.device),
            )  # fmt: skip
            return x

        return run

    def figures(self, times: list[float], batch_size: int) -> dict[str, Any]:
        """Of seconds per trajectory: milliseconds per step, and the rate of the denoiser's work."""
        steps = self.plan.num_sampling_steps
        row = timing.figures([t / steps for t in times], 1e3, "ms")
        flop = 2 * batch_size * setting.denoiser_flops(self.plan.config)
        rate = flop / (row["median"] / 1e3)
        return {
            **row,
            "flop": flop,
            "tflop_s": round(rate / 1e12, 3),
            "percent_of_roofline": round(100 * rate / self.machine.matrix, 1),
        }


def all_rows(plan: Plan, machine: Machine) -> Iterator[dict[str, Any]]:
    """Everything, row by row; `reason` instead of a figure where there is none."""
    for kind, rate, unit in (
        ("copy", machine.copy / 1e9, "GB/s"),
        ("matrix", machine.matrix / 1e12, "TFLOP/s"),
    ):
        yield {"kind": kind, "name": "large", "unit": unit, "median": round(rate, 3)}
    for trials in (attention_trials, gemm_trials, scaled_trials):
        for batch in plan.batches:
            if time.monotonic() > plan.deadline:
                yield {"kind": trials.__name__, "name": "", "batch_size": batch, "reason": "no time was left"}
                continue
            for trial in trials(plan.config, batch, machine.device):
                yield timing.run_trial(trial, machine)
    steps = Steps(plan, machine)
    for batch, modes in plan.steps:
        if time.monotonic() > plan.deadline:
            yield {"kind": "step", "name": "", "batch_size": batch, "reason": "no time was left"}
            continue
        yield from steps.rows(batch, modes)


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    names = ("kind", "name", "epilogue", "scales", "fast_accumulation", "batch_size")
    label = " ".join(str(row[name]) for name in names if name in row)
    if "reason" in row:
        return f"{label}: no figure, {row['reason']}"
    rates = (
        f", {row['tflop_s']} TFLOP/s, {row['percent_of_roofline']} % of the roofline"
        if "tflop_s" in row
        else ""
    )
    return f"{label}: {row['median']} {row['unit']}{rates}"


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_first_run.jsonl")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun later")
    given = parser.parse_args(arguments)
    if interpreted():
        sys.exit("gpu_first_run times kernels: run it without TRITON_INTERPRET")
    torch.backends.cudnn.allow_tf32 = False  # what errors are measured by is fp32
    what = plan(given.quick, given.minutes)
    device = resolve_device(given.device)
    machine = Machine.measured(device)
    world = {"model": "small" if given.quick else "dit-xl-2", **machine.provenance()}
    for row in all_rows(what, machine):
        timing.append(given.out, {**row, **world})
        print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
