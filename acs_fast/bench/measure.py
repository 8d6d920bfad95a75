"""Times a guided step, whole trajectories or the discriminator's training; what is timed is checked first.

Everything is warmed up, then timed in interleaved rounds; a figure is the median with p20 and p80.
`step` times three calls: a guided step, an unguided one and the denoiser alone. Guidance is the first less
the second, the update (CFG, posterior, noise) the second less the third, round by round: a part below the
machine's noise may come out negative. On a CPU the steps are single ones of `StepEngine.walk`; on CUDA whole
captured trajectories, divided by their steps, and the denoiser's call captured alone.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast.bench import check
from acs_fast.bench.check import Batch, last
from acs_fast.bench.subject import make_subject, sized
from acs_fast.bench.timing import (
    Run,
    figure,
    gemm_runs,
    host_launches,
    interleaved,
    launched,
    memory_mb,
    operator_calls,
    warm_up,
)
from acs_fast.config import BenchConfig, DistillConfig, InputError
from acs_fast.discriminator import Trainer
from acs_fast.engine import StepEngine
from acs_fast.environment import describe, resolve_device
from acs_fast.estimate.flop import denoiser_flops
from acs_fast.generator import ImageGenerator, out_of_memory
from acs_fast.guidance import Guidance
from acs_fast.models.classifier import build_classifier
from acs_fast.networks import samples_pixels
from acs_fast.plan import available_memory

CHUNK = 10  # training steps that are timed together


@dataclass
class Measured:
    """Figures by name, numbers beside them by their key, and whether what was computed is finite."""

    figures: dict[str, dict[str, Any]]
    totals: dict[str, float | int | None]
    finite: bool


def bench(config: BenchConfig) -> dict[str, Any]:
    """The row of a benchmark: `check`, with `figures` and `totals` only if it passed, and where it ran.

    Raises InputError for a model, device or setting that cannot be benchmarked.
    """
    device = resolve_device(config.device)
    if config.backend == "reference":
        raise InputError("--backend reference is the plain sampler, which bench does not time; use auto")
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("preset", "what", "num_classes", "repeats")
    }
    training = config.what == "discriminator"
    if training:  # the denoiser is not called
        settings |= {"batch_size": 1, "attention": "math", "compile": "off"}
    distill = DistillConfig(guidance_window=(0.0, 1.0), **settings)  # every step is guided
    subject = make_subject(distill, device, check.CHECKED_BLOCKS if training else None)
    batch_size = subject.config.batch_size or 1
    try:
        note = subject.choose(batch_size)
        row = _provenance(config, subject, [note] if note else [])
        measure = {"step": _step, "trajectory": _trajectory, "discriminator": _discriminator}[config.what]
        return row | measure(Scene(config, subject)) | describe(device)
    except torch.OutOfMemoryError as error:
        available = available_memory(device) or 0
        fits = min(subject.fitting_batch_size(available), batch_size - 1)
        raise InputError(out_of_memory(batch_size, fits)) from error


class Scene:
    """A subject with the guidance and the batch that it samples with."""

    def __init__(self, config: BenchConfig, subject: ImageGenerator):
        self.config, self.subject, self.device = config, subject, subject.device
        self.batch_size = subject.config.batch_size or 1
        self.classes = min(config.num_classes, subject.shape.num_classes)
        self.guidance = subject.steer(self.network().eval().requires_grad_(False), None)
        labels = torch.arange(self.batch_size) % self.classes
        self.batch: Batch = (labels, torch.arange(self.batch_size) // self.classes, labels)

    def network(self) -> nn.Module:
        """An untrained discriminator, whose weights are always the same."""
        channels, size = self.subject.seen_shape()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_classifier(self.config.discriminator, channels, self.classes, size)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def engine(self) -> StepEngine:
        """The subject's engine, ready to be timed; forgets the peak memory of the checks."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.subject.prepare(self.batch_size, range(self.classes))
        assert self.subject.engine is not None
        return self.subject.engine

    def errors(self) -> dict[str, float]:
        """Of the denoiser and the sampler."""
        return check.sampling_errors(self.subject, self.guidance, self.batch, self.classes)

    def sample(self, engine: StepEngine, guidance: Guidance | None, steps: int = 1) -> Run:
        """A whole batch; on a CPU a single step of it warms up."""
        batch = partial(engine.denoise, *self.batch)
        warm = None if self.device.type == "cuda" else lambda: last(engine.walk(*self.batch), 1)
        return Run(lambda: last(batch()), steps, lambda: engine.load(guidance), warm)


# --- step --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _step(scene: Scene) -> dict[str, Any]:
    errors, allowed = scene.errors(), check.ALLOWED[scene.subject.dtype]
    if not _verdict(errors, allowed)["check"]["passed"]:
        return _verdict(errors, allowed)
    engine, subject, device = scene.engine(), scene.subject, scene.device
    decoded: dict[str, Tensor] = {}
    with ExitStack() as open_walks:
        runs = _steps(scene, engine, open_walks)
        warm_up(runs, device)  # labels and table rows are on the device now
        if device.type == "cuda":
            errors["replay"] = _replay_error(scene, engine)

        def denoiser() -> None:
            engine.denoiser(engine.x, len(engine.coefficients) // 2, engine.rows)

        more = {"denoiser": Run(launched(denoiser, device, engine.pool))}
        if (decode := subject.decode) is not None:
            more["decode"] = Run(partial(_keep, decoded, "images", partial(decode, engine.x)))
        warm_up(more, device)
        peak = memory_mb(device, peak=True)
        gemms = gemm_runs(subject.shape, scene.batch_size, subject.dtype, device)
        warm_up(gemms, device)
        seconds = interleaved(runs | more | gemms, scene.config.repeats, device)
        launches = _launches(scene, engine, runs["guided step"])
    finite = all(bool(torch.isfinite(values).all()) for values in (engine.x, *decoded.values()))
    measured = _split(scene, seconds, min(min(seconds[name]) for name in gemms), finite)
    measured.totals |= {"peak_mb": peak, **launches}
    return _verdict(errors, allowed, measured)


def _steps(scene: Scene, engine: StepEngine, open_walks: ExitStack) -> dict[str, Run]:
    """The guided and the unguided step as the docstring of this file has them."""
    guidances = {"guided step": scene.guidance, "unguided step": None}
    if scene.device.type == "cuda":
        steps = len(engine.coefficients)
        return {name: scene.sample(engine, guidance, steps) for name, guidance in guidances.items()}

    def endless(guidance: Guidance | None) -> Generator[Tensor]:
        while True:
            engine.load(guidance)
            yield from engine.walk(*scene.batch)

    walks = {name: open_walks.enter_context(closing(endless(g))) for name, g in guidances.items()}
    return {name: Run(partial(next, walk)) for name, walk in walks.items()}


def _launches(scene: Scene, engine: StepEngine, guided_step: Run) -> dict[str, float | int | None]:
    if scene.device.type == "cuda":
        engine.load(scene.guidance)
        return {"host_launches_per_batch": host_launches(engine, scene.batch)}
    return {"operator_calls_per_step": operator_calls(guided_step.call)}


def _split(scene: Scene, seconds: dict[str, list[float]], gemm: float, finite: bool) -> Measured:
    """The parts of a step, and the rates that follow from it; gemm: seconds of a block's four linears."""
    guided, unguided, denoiser = (seconds[name] for name in ("guided step", "unguided step", "denoiser"))
    parts = {
        "guided step": guided,
        "  denoiser": denoiser,
        "  guidance": [a - b for a, b in zip(guided, unguided, strict=True)],
        "  update": [a - b for a, b in zip(unguided, denoiser, strict=True)],
    }
    if "decode" in seconds:
        parts["decode"] = seconds["decode"]
    shape, b, step = scene.subject.shape, scene.batch_size, statistics.median(guided)
    decode = statistics.median(seconds.get("decode", [0.0]))
    flop = b * denoiser_flops(shape)
    rows = 2 * b * (shape.input_size // shape.patch_size) ** 2
    rate = 2 * rows * 12 * shape.hidden_size**2 / gemm
    totals: dict[str, float | int | None] = {
        "images_per_s": b / (scene.config.num_sampling_steps * step + decode),
        "gflop_per_step": flop / 1e9,
        "gflop_per_s": flop / step / 1e9,
        "gemm_gflop_per_s": rate / 1e9,
        "percent_of_gemm": 100.0 * flop / step / rate,
    }
    return Measured({name: figure(times, "ms") for name, times in parts.items()}, totals, finite)


def _keep(results: dict[str, Tensor], name: str, call: Callable[[], Tensor]) -> None:
    results[name] = call()


# --- trajectory --------------------------------------------------------------------------------------------


@torch.no_grad()
def _trajectory(scene: Scene) -> dict[str, Any]:
    errors, allowed = scene.errors(), check.ALLOWED[scene.subject.dtype]
    if not _verdict(errors, allowed)["check"]["passed"]:
        return _verdict(errors, allowed)
    engine, device = scene.engine(), scene.device
    runs = {
        "guided batch": scene.sample(engine, scene.guidance),
        "unguided batch": scene.sample(engine, None),
    }
    warm_up(runs, device)
    if device.type == "cuda":
        errors["replay"] = _replay_error(scene, engine)
    before = memory_mb(device, peak=False)
    seconds = interleaved(runs, scene.config.repeats, device)
    figures = {name: figure(times, "s") for name, times in seconds.items()}
    steps = len(engine.coefficients)
    for kind in ("guided", "unguided"):
        figures[f"{kind} step"] = figure([t / steps for t in seconds[f"{kind} batch"]], "ms")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    totals: dict[str, float | int | None] = {
        "images_per_s": scene.batch_size / medians["guided batch"],
        "unguided_images_per_s": scene.batch_size / medians["unguided batch"],
        "memory_before_mb": before,
        "memory_after_mb": memory_mb(device, peak=False),
        "peak_mb": memory_mb(device, peak=True),
        "captured_graphs": len(engine.graphs),
    }
    return _verdict(errors, allowed, Measured(figures, totals, bool(torch.isfinite(engine.x).all())))


def _replay_error(scene: Scene, engine: StepEngine) -> float:
    """Of a guided trajectory's graph against the same launches without one."""
    engine.load(scene.guidance)
    return check.relative_error(last(engine.denoise(*scene.batch)), last(engine.walk(*scene.batch)))


# --- discriminator -----------------------------------------------------------------------------------------


def _discriminator(scene: Scene) -> dict[str, Any]:
    settings, device = scene.subject.config, scene.device
    size = _training_batch_size(scene.config, scene.subject)
    channels, edge = scene.subject.seen_shape()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * size, channels, edge, edge, generator=generator).to(device)
    labels = torch.randint(scene.classes, (4 * size,), generator=generator).to(device)
    lr, initial = settings.discriminator_lr, scene.network()
    trainers = {"training step": Trainer(scene.network())}
    if device.type == "cuda":
        trainers["training step, eager"] = Trainer(scene.network(), capture=False)
    errors = {
        name.replace("training step", "losses"): check.training_error(trainer, initial, (images, labels), lr)
        for name, trainer in trainers.items()
    }
    allowed = dict.fromkeys(errors, check.ALLOWED_LOSS)
    if not _verdict(errors, allowed)["check"]["passed"]:
        return _verdict(errors, allowed)
    engine = check.short_engine(scene.subject, scene.batch_size, scene.classes)
    runs = {"load": Run(lambda: engine.load(scene.guidance))}
    latest: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        steps = CHUNK * (scene.config.repeats + 1)
        losses = check.fit(trainer, initial, (images, labels), size, steps, lr)
        runs[name] = Run(partial(_keep, latest, name, partial(last, losses, CHUNK)), CHUNK)
    warm_up(runs, device)
    seconds = interleaved(runs, scene.config.repeats, device)
    figures = {name: figure(times, "ms") for name, times in seconds.items()}
    totals: dict[str, float | int | None] = {
        "images_per_s": size / statistics.median(seconds["training step"]),
        "peak_mb": memory_mb(device, peak=True),
    }
    finite = all(bool(torch.isfinite(loss)) for loss in latest.values())
    return _verdict(errors, allowed, Measured(figures, totals, finite))


def _training_batch_size(config: BenchConfig, subject: ImageGenerator) -> int:
    return config.batch_size or subject.config.discriminator_batch_size


# --- rows --------------------------------------------------------------------------------------------------


def _verdict(
    errors: dict[str, float], allowed: dict[str, float], measured: Measured | None = None
) -> dict[str, Any]:
    """The check and, if it passed, what was measured."""
    finite = measured is None or measured.finite
    passed = finite and all(error <= allowed[name] for name, error in errors.items())
    row: dict[str, Any] = {
        "check": {
            "passed": passed,
            "errors": errors,
            "allowed": {name: allowed[name] for name in errors},
            "finite": finite,
        }
    }
    if passed and measured is not None:
        row |= {"figures": measured.figures, "totals": measured.totals}
    return row


def _provenance(config: BenchConfig, subject: ImageGenerator, notes: list[str]) -> dict[str, Any]:
    """What was timed, as `describe` says where."""
    shape, resolved = subject.shape, subject.config
    names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    whole = sized(config.model) or shape
    trained = _training_batch_size(config, subject) if config.what == "discriminator" else None
    if subject.vae is None and not samples_pixels(shape):
        notes = [*notes, "there is no decode: diffusers is not installed"]
    assert subject.attention is not None
    return {
        "kind": f"bench {config.what}",
        "model": config.model,
        "weights": "checkpoint" if sized(config.model) is None else "random",
        "batch_size": trained or resolved.batch_size,
        "shape": {name: getattr(whole, name) for name in names},
        "dtype": "fp32" if trained else resolved.dtype,
        "attention": None if trained else resolved.attention,
        "compiled": resolved.compile == "on",
        "ops": dict(subject.ops.sources),
        "guidance_space": resolved.guidance_space,
        "discriminator": resolved.discriminator,
        "num_sampling_steps": resolved.num_sampling_steps,
        "repeats": config.repeats,
        "tier": "high",
        "notes": notes,
    }
