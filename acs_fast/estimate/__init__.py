"""What a run will take before it starts: work, memory, disk and time, with what was assumed."""

from __future__ import annotations

import textwrap
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
    reachable_memory,
)
from acs_fast.estimate.timing import Seconds, measure
from acs_fast.generator import ImageGenerator
from acs_fast.plan import Layout
from acs_fast.units import duration, scaled, size

__all__ = ["Disk", "Memory", "Plan", "Seconds", "Work", "make_plan"]

WIDTH = 120  # of the text


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
        calls = f"{w.calls} denoiser calls of up to {self.batch_size} images on {self.device}, {ranks}"
        times = f"time: sampling {duration(s.sampling)} on each rank: {self._step()}" if w.images else ""
        if w.training_steps:
            steps = f"{w.training_steps} steps of {duration(s.training_step)}"
            times += f"; discriminators {duration(s.training)}: {steps}"
        there = "" if self.memory_reachable is None else f" of {size(self.memory_reachable)}"
        host = f" and {size(m.host)} of the machine's" if m.host else ""
        kept = "" if self.keeps_latents or not d.latents else ", whose samples go at its end"
        room = f"{size(d.missing)} still to write, {size(self.disk_free)} free"
        lines = (
            f"plan: {self.title}, {w.images} left to sample",
            f"      {self.method}",
            f"      {calls}: about {duration(s.total)}, {self.images_per_second:.3g} images/s",
            times,
            f"work: {_flop(w)}",
            f"memory: a rank needs {size(m.device)}{there}{host}: {_parts(_memory_parts(m))}",
            f"disk: {size(d.most)} for the whole run{kept}: {_parts(_disk_parts(d))}; {room}",
            f"assumed: {'; '.join(self.assumptions)}",
        )
        return "\n".join(
            textwrap.fill(line, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
            for line in lines
            if line
        )

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
    if config.guided:
        low, high = config.guidance_window
        guidance = (
            f"{config.objective}, {config.guidance_scale:g} x {config.trust_radius}, jacobian "
            f"{config.jacobian}, t/T {low:g} to {high:g}"
        )
    steps = f"{config.sampler} with {config.num_sampling_steps} steps, CFG {config.cfg_scale:g}"
    return f"{steps}, guidance: {guidance}"


def _assumptions(
    config: DistillConfig, generator: ImageGenerator, disk: Disk, num_ranks: int
) -> tuple[str, ...]:
    cuda, many = generator.device.type == "cuda", num_ranks > 1
    measured = f"measured on {disk.measured}" if disk.measured else "as photographs have"
    found = {
        f"{size(disk.image)} an image ({config.format}, {measured})": True,
        "writing keeps up; start-up and judging take no time": True,
        "guidance as long as by autograd": config.guided,
        "steps launched one by one": cuda,
        "decoding is not hidden by sampling": cuda and generator.vae is not None,
        "no memory is given back": True,
        "every rank is as fast as this one": many,
        "ranks share this machine's memory": many and not cuda,
        "gathering and all-reduce take no time": many,
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
    return f"{scaled(work.flop, 'FLOP')}: {listed}" if work.flop else "nothing is left to compute"


def _memory_parts(memory: Memory) -> dict[str, int]:
    return {
        "weights": memory.weights,
        "batch": memory.engine,
        "modulations": memory.table,
        "decode": memory.decode,
        "guidance": memory.guidance,
        "discriminator": memory.discriminator,
        "samples to train on": memory.latents,
        "PyTorch": memory.process,
    }


def _disk_parts(disk: Disk) -> dict[str, int]:
    return {
        "images": disk.images,
        "samples": disk.latents,
        "discriminators": disk.discriminators,
        "manifest": disk.manifest,
    }


def _parts(parts: dict[str, int]) -> str:
    """Those that are a percent of all or more, the largest first."""
    listed = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(
        f"{name} {size(value)}" for name, value in listed if value >= 0.01 * sum(parts.values()) > 0
    )
