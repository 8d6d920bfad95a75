"""What an implementation of ACS answers: the `Backend` protocol, the two here, those of other packages."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.augment import random_resized_crop, shift_and_flip
from acs_fast.config import REAL_OBJECTIVES, DistillConfig, InputError
from acs_fast.diffusion import Schedule
from acs_fast.discriminator import WEIGHT_DECAY, Trainer
from acs_fast.environment import resolve_device
from acs_fast.feeds import permuted
from acs_fast.generator import ImageGenerator
from acs_fast.guidance import Guidance, unit
from acs_fast.kernels.structures import guidance_workspace
from acs_fast.models.classifier import ConvNet, seeded_classifier, stack_convnets
from acs_fast.networks import Networks
from acs_fast.plan import cut

GROUP = "acs.backends"  # of entry points: NAME = "package.module:Class"
METHODS = ("prepare", "sample", "fit", "guidance_gradient", "decode")

OnStep = Callable[
    [int, int, Tensor], None
]  # step from 0, timestep, x [n, C, H, W], which it may change in place


class Backend(Protocol):
    """The five things that adversary-guided curriculum sampling needs of an implementation.

    class_labels and indices are int64 [n] on the CPU: with the configuration's seed and the step they key the
    noise of each image. targets: int64 [n] on the CPU, the place of each label in `prepare`'s class_labels,
    which is the discriminator's label. Samples are fp32 [n, C, H, W] on the backend's device.
    """

    def prepare(
        self,
        config: DistillConfig,
        networks: Networks | None = None,
        *,
        class_labels: Sequence[int],
        batch_size: int,
        schedule: Schedule | None = None,
    ) -> None:
        """Make a model ready to sample `class_labels`, `batch_size` images together.

        Others can be sampled too, as many different ones in a batch, where `sample` is told the targets.
        networks: the model and its VAE; default: those that the configuration names. schedule: the steps of
        another sampler than the configuration's. Raises InputError for what cannot be served.
        """

    def sample(
        self,
        class_labels: Tensor,
        indices: Tensor,
        discriminator: nn.Module | None = None,
        *,
        targets: Tensor | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples of any number of images: a curriculum, or a part of it.

        discriminator: steers them by equations (3) and (4), of one architecture ever; None: nothing does.
        latents: [n, C, H, W], the noise to start from; default: keyed. on_step: called after every step.
        """

    def fit(
        self, samples: Tensor, targets: Tensor, *, seed: int = 0, previous: nn.Module | None = None
    ) -> nn.Module:
        """A discriminator of the configuration's network trained on samples, frozen, in eval mode.

        previous: where its weights start; default: new ones, drawn from `seed`, as the batches are.
        """

    def guidance_gradient(self, discriminator: nn.Module, pred_xstart: Tensor, targets: Tensor) -> Tensor:
        """g / ||g|| of (3), g = d L / d x0 of each predicted clean sample: [n, C, H, W], zero where g is."""

    def decode(self, samples: Tensor) -> Tensor:
        """Images [n, 3 or 1, H, W] in about [-1, 1]: through the VAE, or the samples themselves."""


class Reference:
    """ACS in plain, eager PyTorch: what `Fast` is held against, step by step."""

    kernels = "reference"

    def prepare(
        self,
        config: DistillConfig,
        networks: Networks | None = None,
        *,
        class_labels: Sequence[int],
        batch_size: int,
        schedule: Schedule | None = None,
    ) -> None:
        if config.objective in REAL_OBJECTIVES:
            raise InputError(
                f"objective {config.objective!r} needs real images, which a Backend's fit is not given; use "
                "'adversarial' or 'nonsaturating', or `distill`, which reads them"
            )
        if self.kernels == "reference" or config.backend == "reference":
            config = dataclasses.replace(config, backend=self.kernels)
        self.generator = ImageGenerator(config, resolve_device(config.device), networks, schedule)
        self.note = self.generator.choose(batch_size)  # what was measured
        self.config, self.device = self.generator.config, self.generator.device
        self.class_labels, self.batch_size = list(class_labels), batch_size
        self.generator.prepare(batch_size, class_labels)

    def sample(
        self,
        class_labels: Tensor,
        indices: Tensor,
        discriminator: nn.Module | None = None,
        *,
        targets: Tensor | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        if targets is None:
            targets = torch.tensor([self.class_labels.index(label) for label in class_labels.tolist()])
        if discriminator is not None and next(discriminator.parameters()).device != self.device:
            discriminator = copy.deepcopy(discriminator).to(self.device)
        guidance = None if discriminator is None else self.generator.steer(discriminator, None)
        walk = self.generator.denoise if on_step is None else self.generator.walk
        shape = self.generator.shape
        edge = shape.input_size
        result = torch.empty(len(class_labels), shape.in_channels, edge, edge, device=self.device)
        for part in cut(len(class_labels), self.batch_size):
            rows = slice(part.start, part.stop)
            given = None if latents is None else latents[rows].to(self.device, torch.float32)
            steps = walk(class_labels[rows], indices[rows], targets[rows], guidance, given)
            for number, x in enumerate(steps):
                if on_step is not None:
                    on_step(number, self.timesteps[number], x)
            result[rows] = x
        return result

    @property
    def timesteps(self) -> list[int]:
        """Of every step, the noise end first."""
        return [c.timestep for c in reversed(self.generator.coefficients)]

    @torch.enable_grad()
    def fit(
        self, samples: Tensor, targets: Tensor, *, seed: int = 0, previous: nn.Module | None = None
    ) -> nn.Module:
        network = self._network(seed) if previous is None else copy.deepcopy(previous)
        network.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
        steps = self.config.discriminator_steps
        for step, examples in zip(range(steps), self._batches(samples, targets, seed), strict=False):
            rate = self.config.discriminator_lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            loss = F.cross_entropy(network(examples.images), examples.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network.eval().requires_grad_(False)

    def _network(self, seed: int) -> nn.Module:
        channels, size = self.generator.seen_shape()
        network = seeded_classifier(self.config.discriminator, channels, len(self.class_labels), size, seed)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _batches(self, samples: Tensor, targets: Tensor, seed: int) -> Any:
        """Endless batches as `distill` trains on: crops of images, shifts of latents; no mirrored digits."""
        pixels = self.generator.vae is None or self.generator.seen_by is not None
        return permuted(
            self.generator.seen(samples),
            targets,
            batch_size=self.config.discriminator_batch_size,
            mirror=self.generator.seen_shape()[0] != 1,
            seed=seed,
            device=self.device,
            augment=random_resized_crop if pixels else shift_and_flip,
        )

    def guidance_gradient(self, discriminator: nn.Module, pred_xstart: Tensor, targets: Tensor) -> Tensor:
        guidance = dataclasses.replace(self.generator.steer(discriminator, None), jacobian="identity")
        x0, targets = pred_xstart.to(self.device), targets.to(self.device)
        return guidance.direction(x0, x0, targets, bool(self.config.clip_denoised))

    def decode(self, samples: Tensor) -> Tensor:
        decode = self.generator.decode
        return samples if decode is None else decode(samples)


class Fast(Reference):
    """ACS on the engine: static buffers, fused kernels, on CUDA graphs of trajectories and training steps."""

    kernels = "auto"

    def prepare(self, *args: Any, **keywords: Any) -> None:
        super().prepare(*args, **keywords)
        self.trainer: Trainer | None = None

    @torch.enable_grad()
    def fit(
        self, samples: Tensor, targets: Tensor, *, seed: int = 0, previous: nn.Module | None = None
    ) -> nn.Module:
        initial = self._network(seed) if previous is None else previous
        self.trainer = self.trainer or Trainer(self._network(seed))
        batches = self._batches(samples, targets, seed)
        config = self.config
        for _ in self.trainer.learn(
            initial.state_dict(), batches, steps=config.discriminator_steps, lr=config.discriminator_lr
        ):
            pass
        network = self._network(seed)
        network.load_state_dict(self.trainer.network.state_dict())
        return network.eval().requires_grad_(False)

    def guidance_gradient(self, discriminator: nn.Module, pred_xstart: Tensor, targets: Tensor) -> Tensor:
        guidance = self.generator.steer(discriminator, None)
        depth = len(discriminator.features) // 4 if isinstance(discriminator, ConvNet) else 0
        whole = depth and pred_xstart.shape[-1] % 2**depth == 0  # no pool cuts a row
        if not isinstance(discriminator, ConvNet) or guidance.decode is not None or not whole:
            return super().guidance_gradient(discriminator, pred_xstart, targets)
        x0, targets = pred_xstart.to(self.device), targets.to(self.device)
        z = x0.clamp(-1.0, 1.0) if self.config.clip_denoised else x0
        return unit(self._gradient_by_ops(discriminator, z, targets, guidance)).to(x0.dtype)

    def _gradient_by_ops(
        self, discriminator: ConvNet, z: Tensor, targets: Tensor, guidance: Guidance
    ) -> Tensor:
        """d L / d z [n, C, H, W] times a positive number per sample, from the ops that the engine fuses."""
        ops, network = self.generator.ops, stack_convnets([discriminator], torch.float32)
        groups = network.blocks[0].bias.shape[1]
        keywords: dict[str, Any] = {"groups": groups, "activation": "relu"}
        work = guidance_workspace(z, network, groups)
        for block, y, saved in zip(network.blocks, work.activations, work.saved, strict=True):
            z, _ = ops.conv_norm_act_pool(z, block, **keywords, out=(y, saved))
        head = ops.classifier_head_grad(
            z.flatten(2), network.head, targets, objective=guidance.objective, omega=guidance.omega
        )
        grad = head.grad.view(z.shape)
        for block, saved in zip(reversed(network.blocks), reversed(work.saved), strict=True):
            grad = ops.conv_norm_act_pool_backward_input(grad, saved, block, **keywords)
        return grad.sum(dim=0)


OWN: dict[str, Callable[[], Backend]] = {"fast": Fast, "reference": Reference}


def get_backend(name: str) -> Backend:
    """A new backend: `fast`, `reference`, or one that another package offers.

    A package offers one by an entry point of the group `acs.backends`, `name = "package.module:Class"`; the
    class is called without arguments. Raises InputError for a name that nobody offers, for a package that
    cannot be imported, and for a class that is no `Backend`, with what it lacks.
    """
    if name in OWN:
        return OWN[name]()
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered:
        known = ", ".join(sorted({*OWN, *offered}))
        raise InputError(f"there is no backend {name!r}; installed are {known}")
    title = f"the backend {name!r} ({offered[name].value})"
    try:
        backend = offered[name].load()()
    except Exception as error:  # whatever another package's import or constructor raises
        raise InputError(f"{title} cannot be loaded ({type(error).__name__}: {error})") from error
    if lacks := why_no_backend(backend):
        raise InputError(f"{title} is no acs_fast.Backend: {lacks}")
    return backend


def why_no_backend(backend: object) -> str | None:
    """What an object lacks of the `Backend` protocol, in one phrase; None if it has all."""
    for name in METHODS:
        method = getattr(backend, name, None)
        if not callable(method):
            return f"it has no {name}(); a backend has {', '.join(METHODS)}"
        taken = inspect.signature(method).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            continue
        wanted = [p for p in inspect.signature(getattr(Backend, name)).parameters if p != "self"]
        missing = [p for p in wanted if p not in taken]
        if missing:
            return f"its {name}() takes no {', '.join(missing)}; it is called with {', '.join(wanted)}"
        needed = [p for p, kind in taken.items() if p not in wanted and kind.default is kind.empty]
        if needed:
            return f"its {name}() needs {', '.join(needed)} too; it is called with {', '.join(wanted)}"
    return None
