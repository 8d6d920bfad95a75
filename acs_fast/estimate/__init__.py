"""What a run will take before it starts: work, memory, disk and time, with what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from acs_fast.config import REAL_OBJECTIVES, DistillConfig
from acs_fast.environment import device_name
from acs_fast.estimate.needs import (
    Disk,
    Memory,
    Work,
    count_disk,
    count_memory,
    count_work,
    free_space,
    guided_steps,
    is_guided,
    reachable_memory,
)
from acs_fast.estimate.timing import Seconds, measure
from acs_fast.generator import ImageGenerator
from acs_fast.plan import Layout

__all__ = ["Disk", "Memory", "Plan", "Seconds", "Work", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """A run before it starts. Sizes are in bytes, times in seconds; `work` and `seconds` are of what is left.

    memory_reachable, disk_free: what there is, None if unknown; keeps_latents: after the run's end.
    """

    title: str  # the images of the whole run, in words
    method: str
    device: str
    num_ranks: int
    batch_size: int
    out: str
    keeps_latents: bool
    work: Work
    memory: Memory
    memory_reachable: int | None
    disk: Disk
    disk_free: int
    seconds: Seconds
    assumptions: tuple[str, ...]

    @property
    def images_per_second(self) -> float:
        """Of all ranks, over everything that is left; 0 if nothing is."""
        return self.work.images / self.seconds.total if self.seconds.total else 0.0

    def text(self) -> str:
        """The plan for people."""
        w, s, m, d = self.work, self.seconds, self.memory, self.disk
        ranks = f"{self.num_ranks} ranks" if self.num_ranks > 1 else "1 rank"
        calls = f"{w.calls} denoiser calls of up to {self.batch_size} images on {self.device}"
        lines = [
            f"plan: {self.title}, {w.images} left",
            f"      {self.method}",
            f"      {calls}, {ranks}: about {duration(s.total)}, {self.images_per_second:.3g} images/s",
            f"time  sampling {duration(s.sampling)} on each rank: {self._step()}",
        ]
        if w.training_steps:
            steps = f"{w.training_steps} steps of {duration(s.training_step)}"
            lines.append(f"      training of discriminators {duration(s.training)}: {steps}")
        lines.append(f"work  {_flop(w)}")
        parts = {
            "weights": m.weights, "batch": m.engine, "modulations": m.table, "decode": m.decode,
            "guidance": m.guidance, "discriminator": m.discriminator, "samples to train on": m.latents,
            "PyTorch": m.process,
        }  # fmt: skip
        there = "" if self.memory_reachable is None else f" of {size(self.memory_reachable)}"
        host = f"; {size(m.host)} of the machine's" if m.host else ""
        lines.append(f"memory  {size(m.device)}{there} a rank{host}: {_parts(parts)}")
        parts = {"images": d.images, "samples": d.latents, "discriminators": d.discriminators}
        kept = "" if self.keeps_latents else " (samples go at its end)"
        free = f"{size(d.missing)} still to write, {size(self.disk_free)} free"
        lines.append(f"disk  {size(d.most)} while it runs{kept}: {_parts(parts)}; {free}")
        lines.append(f"assumed: {'; '.join(self.assumptions)}")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """A sentence each for memory and disk that cannot hold the run."""
        found, m = [], self.memory
        on_cpu = self.device.startswith("cpu")
        needed = m.device * (self.num_ranks if on_cpu else 1)
        if self.memory_reachable is not None and needed > self.memory_reachable:
            where = "this machine's memory" if on_cpu else "the GPU's memory"
            found.append(
                f"the run needs about {size(needed)} of {where}, which has {size(self.memory_reachable)}; "
                + self._advice()
            )
        if self.disk.missing > self.disk_free:
            found.append(
                f"the run still writes about {size(self.disk.missing)} to {self.out}, where "
                f"{size(self.disk_free)} are free; free some, give another --out or a smaller --format"
            )
        return found

    def _advice(self) -> str:
        m = self.memory
        if m.latents > max(m.engine, m.guidance):
            return f"{size(m.latents)} are samples to train on: use a smaller --ipc"
        return f"use a smaller --batch-size, which is {self.batch_size}"

    def _step(self) -> str:
        w, s = self.work, self.seconds
        text = f"{duration(s.step)} a step"
        if s.guidance:
            text += f", {duration(s.guidance)} more where guided ({w.guided_steps} of {w.steps} steps)"
        return text + (f", {duration(s.decode)} to decode a batch" if s.decode else "")


def make_plan(
    config: DistillConfig,
    generator: ImageGenerator,
    layout: Layout,
    *,
    bucket: int,
    num_ranks: int,
    missing: Mapping[int, int],
    trained: int,
    out: Path,
    trains_real: bool = False,
    timed: bool = True,
) -> Plan:
    """The plan of what is left of a run.

    config: of the run, resolved (the generator's). bucket: images that a rank samples together. missing:
    {curriculum: images that are still to be sampled, by all ranks}. trained: discriminators still to be
    trained, the last ones; trains_real: f_real is as well. timed: whether a few steps are run to know the
    seconds, which else are 0; on a large model that takes as long as two or three steps.
    """
    left = {"missing": missing, "trained": trained, "trains_real": trains_real}
    work = count_work(generator, layout, bucket=bucket, num_ranks=num_ranks, **left)  # type: ignore[arg-type]
    disk = count_disk(generator, layout, out=out, **left)  # type: ignore[arg-type]
    seconds = Seconds(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if timed:
        kinds = {"num_ranks": num_ranks, "num_classes": layout.num_classes}
        seconds = measure(generator, work, bucket=bucket, **kinds)
    images = f"{layout.total} images ({layout.num_classes} classes x {config.ipc})"
    return Plan(
        title=f"{images} in {config.num_curricula} curricula",
        method=_method(config),
        device=f"{generator.device.type} ({device_name(generator.device)})",
        num_ranks=num_ranks,
        batch_size=bucket,
        out=str(out),
        keeps_latents=config.keep_latents,
        work=work,
        memory=count_memory(generator, layout, bucket=bucket, num_ranks=num_ranks),
        memory_reachable=reachable_memory(generator.device),
        disk=disk,
        disk_free=free_space(out),
        seconds=seconds,
        assumptions=_assumptions(config, generator, disk, num_ranks),
    )


def _method(config: DistillConfig) -> str:
    guidance = "none"
    if is_guided(config):
        low, high = config.guidance_window
        guidance = (
            f"{config.objective}, {config.guidance_scale:g} x {config.trust_radius}, jacobian "
            f"{config.jacobian}, t/T {low:g} to {high:g} ({guided_steps(config)} steps)"
        )
    steps = f"{config.sampler} with {config.num_sampling_steps} steps, CFG {config.cfg_scale:g}"
    return f"{steps}, guidance: {guidance}"


def _assumptions(
    config: DistillConfig, generator: ImageGenerator, disk: Disk, num_ranks: int
) -> tuple[str, ...]:
    cuda, many = generator.device.type == "cuda", num_ranks > 1
    measured = f"measured on {disk.measured}" if disk.measured else "as photographs have"
    found = {
        f"{size(disk.image)} an image ({config.format}, {measured}), whole blocks of 4 KiB": True,
        "files are written as fast as images are made; start-up and judging take nothing": True,
        "guidance as long as by autograd": is_guided(config),
        "steps launched one by one": cuda,
        "decoding is not hidden by sampling": cuda and generator.vae is not None,
        "memory is never given back": True,
        "every rank is as fast as this one": many,
        "ranks share this machine's memory": many and not cuda,
        "gathering and all-reduce take nothing": many,
        "each rank trains on a share of the batch": many and not config.deterministic,
        "a latent cache of the real images is not counted": config.objective in REAL_OBJECTIVES
        and generator.vae is not None
        and generator.seen_by is None,
    }
    return tuple(text for text, holds in found.items() if holds)


def _flop(work: Work) -> str:
    parts = {
        "denoiser": work.denoiser_flop,
        "guidance": work.guidance_flop,
        "decode": work.decode_flop,
        "discriminators": work.training_flop,
    }
    listed = ", ".join(f"{name} {100 * flop / work.flop:.3g} %" for name, flop in parts.items() if flop)
    return f"{_scaled(work.flop, 'FLOP')}: {listed}" if work.flop else "nothing is left to compute"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)


def size(value: float) -> str:
    """Bytes in the unit that fits."""
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if 0 < seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    for unit, length in (("s", 120.0), ("min", 120.0 * 60), ("h", 48.0 * 3600)):
        if seconds < length:
            return f"{seconds / {'s': 1, 'min': 60, 'h': 3600}[unit]:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
