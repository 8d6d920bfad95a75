"""What a run samples with: the denoiser, its VAE, ops, dtype and attention; batches of samples and images."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast import attention
from acs_fast.compiled import compile_ops, is_compiled
from acs_fast.config import DistillConfig, InputError
from acs_fast.diffusion import Schedule, StepCoefficients, step_coefficients
from acs_fast.engine import StepEngine, table_bytes, table_slots
from acs_fast.guidance import Guidance
from acs_fast.models.checkpoint import digest
from acs_fast.networks import LARGE, Networks, dtype_name, load_networks, samples_pixels
from acs_fast.ops import parse_choice, select
from acs_fast.plan import available_memory, bytes_per_image
from acs_fast.sampler import denoise

BATCH_SIZES, SMALL_BATCH_SIZE = {"cuda": 66, "cpu": 4}, 100
GRADIENT_FACTOR = 7  # memory of a decode with its gradient, in decodes without


class ImageGenerator:
    """The networks that make images, once for a run.

    config: as the user gave it. `self.config` is the same with every `auto` that decides bits resolved, in
    part by measurement (`choose`): kept in the run's record, it continues and repeats the run as it was.
    """

    def __init__(
        self,
        config: DistillConfig,
        device: torch.device,
        networks: Networks | None = None,
        schedule: Schedule | None = None,
    ):
        """networks, schedule: default, those that the configuration names."""
        self.device, self.schedule = device, schedule
        self.ops = select(parse_choice(config.backend), device)
        self.networks = networks or load_networks(config, device)
        self.model, self.vae, self.seen_by = (
            self.networks.model,
            self.networks.vae,
            self.networks.seen_by,
        )
        self.shape, self.dtype = self.model.config, self.model.pos_embed.dtype
        if config.clip_denoised is None:
            config = dataclasses.replace(config, clip_denoised=samples_pixels(self.shape))
        large = self.shape.hidden_size >= LARGE
        self.config = dataclasses.replace(
            config,
            dtype=dtype_name(self.dtype),
            batch_size=config.batch_size or (BATCH_SIZES[device.type] if large else SMALL_BATCH_SIZE),
        )
        self.engine: StepEngine | None = None
        self.attention: attention.Attention | None = None

    def choose(self, batch_size: int) -> str:
        """Resolve `attention` and `compile` for batches of up to `batch_size`; returns what was measured.

        The plain sampler, which `--backend reference` names, has neither.
        """
        if self.config.backend == "reference":
            return ""
        shape, config = self.shape, self.config
        n, tokens, d = 2 * batch_size, (shape.input_size // shape.patch_size) ** 2, shape.hidden_size
        heads = (n, tokens, shape.num_heads, d // shape.num_heads)
        self.attention = attention.choose(config.attention, heads, self.dtype, self.device)
        compiling, note = config.compile, ""
        if compiling == "auto" and d < LARGE:
            compiling = "off"
        if compiling != "off":
            example = torch.zeros(n, tokens, d, dtype=self.dtype, device=self.device)
            self.ops, note = compile_ops(self.ops, compiling, example, (6 * shape.depth + 2) * d)
            compiling = "on" if is_compiled(self.ops) else "off"
        self.config = dataclasses.replace(config, attention=self.attention.name, compile=compiling)
        return note

    def prepare(self, batch_size: int, class_labels: Sequence[int]) -> None:
        """Make the engine for batches of up to `batch_size` of these classes, in their order.

        Raises InputError where its buffers cannot fit into the memory, with the batch size that would.
        """
        if self.config.backend == "reference":
            return
        if self.attention is None:
            self.choose(batch_size)
        assert self.attention is not None
        self.check_memory(batch_size, len(class_labels))
        self.engine = StepEngine(
            self.model, self.config, self.ops, self.device,
            batch_size=batch_size, class_labels=class_labels, attention=self.attention,
            schedule=self.schedule,
        )  # fmt: skip

    def check_memory(self, batch_size: int, num_classes: int) -> None:
        """InputError where the engine's buffers and table cannot fit, with the batch size that would."""
        available = available_memory(self.device)
        if available is None or self.config.backend == "reference":
            return
        steps = len(self.coefficients)
        slots = table_slots(self.model, steps, batch_size, num_classes)
        available -= slots * table_bytes(self.model, steps)
        if batch_size > (fits := self.fitting_batch_size(available)):
            raise InputError(out_of_memory(batch_size, fits))

    def release(self) -> None:
        """Give up the engine's memory."""
        self.engine = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fitting_batch_size(self, available: int) -> int:
        """The largest batch whose buffers fit into `available` bytes."""
        return max(0, int(0.9 * available)) // bytes_per_image(self.shape, self.dtype, self.config.jacobian)

    def denoise(
        self,
        class_labels: Tensor,
        indices: Tensor,
        targets: Tensor,
        guidance: Guidance | None,
        latents: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """A batch's samples [n, C, H, W], again and again as the steps go on; the last is the result.

        class_labels, indices, targets: int64 [n] on the host; `acs_fast.sampler.denoise` says what they are.
        A yielded tensor may be overwritten by the next step or batch.
        """
        if self.engine is None:
            yield from self.walk(class_labels, indices, targets, guidance, latents)
            return
        if guidance is not self.engine.loaded:
            self.engine.load(guidance)
        yield from self.engine.denoise(class_labels, indices, targets, latents)

    def walk(
        self,
        class_labels: Tensor,
        indices: Tensor,
        targets: Tensor,
        guidance: Guidance | None,
        latents: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """`denoise`, but one yield for every step on any device."""
        if self.engine is not None:
            self.engine.load(guidance)
            yield from self.engine.walk(class_labels, indices, targets, latents)
            return
        labels, indices, targets = (t.to(self.device) for t in (class_labels, indices, targets))
        yield from denoise(
            self.model, labels, indices, self.config, guidance, targets, self.schedule, latents
        )

    def first_non_finite(
        self, class_labels: Tensor, indices: Tensor, targets: Tensor, guidance: Guidance | None
    ) -> tuple[int, int] | None:
        """(row, step) where a batch first is not finite, found by sampling it once more; None if it is."""
        steps = reversed(range(len(self.coefficients)))
        walk = self.walk(class_labels, indices, targets, guidance)
        for step, x in zip(steps, walk, strict=True):
            finite = torch.isfinite(x).flatten(1).all(dim=1)
            if not finite.all():
                return int(finite.int().argmin()), step
        return None

    @property
    def yields(self) -> int:
        """How often `denoise` yields for a batch."""
        return len(self.coefficients) if self.engine is None else self.engine.yields

    @property
    def coefficients(self) -> Sequence[StepCoefficients]:
        """Of every step, the image end first."""
        if self.schedule is not None:
            return self.schedule.coefficients
        return step_coefficients(self.config.num_sampling_steps)

    def seconds_per_step(self, batch_size: int, class_label: int) -> float:
        """Wall-clock seconds of an unguided step of a full batch, after a first one that fills tables.

        The mean of those that go into 0.2 seconds, of one at least and ten at most.
        """
        labels, seconds, started = torch.full((batch_size,), class_label), [], time.perf_counter()
        for _ in itertools.islice(self.walk(labels, labels, labels, None), 11):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
            if sum(seconds[1:]) > 0.2:
                break
            started = time.perf_counter()
        return sum(seconds[1:]) / (len(seconds) - 1)

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """Samples to images; None where samples are images."""
        return None if self.vae is None else self.vae.decode

    def steer(
        self, discriminator: nn.Module, real_classifier: nn.Module | None, earlier: Tensor | None = None
    ) -> Guidance:
        """The guidance by these classifiers in the configured space, with the configured objective.

        earlier: unit vectors [K, M, C H W] of what is sampled so far, for the repulsion.
        """
        c, decode, batch = self.config, None, None
        if self.seen_by is not None:
            decode = self.seen_by.decode_differentiable
            needed = GRADIENT_FACTOR * self.seen_by.bytes_per_image(*[self.shape.input_size] * 2)
            batch = max(1, self.seen_by.budget // needed)
        return Guidance(
            objective=c.objective,
            discriminator=discriminator,
            real_classifier=real_classifier,
            omega=c.omega,
            scale=c.guidance_scale,
            trust_radius=c.trust_radius,
            window=c.guidance_window,
            jacobian=c.jacobian,
            decode=decode,
            decode_batch=batch,
            gamma=c.repulsion,
            earlier=earlier,
        )

    def seen_shape(self) -> tuple[int, int]:
        """(channels, edge) of what the discriminator sees."""
        if self.seen_by is None:
            return self.shape.in_channels, self.shape.input_size
        return self.seen_by.out_channels, self.seen_by.factor * self.shape.input_size

    def seen(self, samples: Tensor) -> Tensor:
        """What the discriminator sees of samples [n, C, H, W]: themselves, or their decode."""
        return samples if self.seen_by is None else self.seen_by.decode(samples)

    def record(self) -> dict[str, Any]:
        """For the run's record: the digests of model and VAEs, and the backend of each op."""
        sha256 = digest(self.networks.checkpoint) if self.networks.checkpoint else None
        vaes = {"vae_sha256": self.vae, "seen_by_sha256": self.seen_by}
        return {
            "model_sha256": sha256,
            **{name: vae.digest() if vae else None for name, vae in vaes.items()},
            "ops": {"sources": dict(self.ops.sources)},
            "attention": {} if self.attention is None else dataclasses.asdict(self.attention),
        }


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; the CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def out_of_memory(batch_size: int, fits: int) -> str:
    """The sentence for a batch that does not fit into the memory."""
    advice = f"about {fits} would: --batch-size {fits}" if fits > 0 else "not even one image would: free some"
    return f"a batch of {batch_size} images does not fit into the memory; {advice}"
