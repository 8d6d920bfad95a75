"""The sampling step over the ops: static buffers, device tables, on CUDA one graph for a whole trajectory."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast import diffusion
from acs_fast.attention import Attention
from acs_fast.config import DistillConfig
from acs_fast.denoiser import Denoiser
from acs_fast.diffusion import Schedule
from acs_fast.graph import capture
from acs_fast.guidance import Guidance
from acs_fast.kernels.compose import compose_guidance
from acs_fast.kernels.structures import Network, Workspace, guidance_workspace
from acs_fast.models.classifier import ConvNet, stack_convnets
from acs_fast.models.dit import DiT
from acs_fast.ops import Ops
from acs_fast.sampler import use_learned_range

TABLE_BYTES = {"cuda": 8 << 30, "cpu": 1 << 30}  # of modulations; a run of more classes fills the table again


class StepEngine:
    """Denoises batches as `acs_fast.sampler.denoise` does, by ops and the lean denoiser, on static buffers.

    Everything that a trajectory reads lies on the device and stays where it is: coefficients, timesteps and
    modulations in tables, labels, indices, table rows, seed and step numbers, the discriminator's parameters.
    So on CUDA the trajectory of a batch is one captured graph, guided and unguided sharing a memory pool, and
    a curriculum only copies weights into it. A smaller batch is padded with copies of its last image.

    Guidance by a ConvNet on the sample with `jacobian="identity"` is one call of `discriminator_guidance`;
    other networks, spaces, repulsion and the full Jacobian take autograd's gradient into `guided_step`.

    class_labels: the model's labels of the run's classes, in the order in which they are sampled.
    schedule: the steps of another sampler than the configuration's, with the fixed variance.
    The model's packed weights move into the engine: afterwards the model cannot be called, except where
    `jacobian="full"` needs it.
    """

    def __init__(
        self,
        model: DiT,
        config: DistillConfig,
        ops: Ops,
        device: torch.device,
        *,
        batch_size: int,
        class_labels: Sequence[int],
        attention: Attention,
        schedule: Schedule | None = None,
    ):
        self.model, self.config, self.ops, self.device = model, config, ops, device
        shape = model.config
        self.shape = (shape.in_channels, shape.input_size, shape.input_size)
        self.batch_size, self.class_labels = batch_size, list(class_labels)
        self.learned_range = schedule is None and use_learned_range(model, config)
        self.schedule = schedule or diffusion.respaced_schedule(
            config.num_sampling_steps,
            sampler=config.sampler,
            eta=config.eta,
            learned_range=self.learned_range,
        )
        self.coefficients = self.schedule.coefficients
        numel = shape.in_channels * shape.input_size**2
        self.table = diffusion.step_table(
            self.schedule,
            cfg_scale=config.cfg_scale,
            guidance_scale=config.guidance_scale,
            trust_radius=config.trust_radius,
            window=config.guidance_window,
            numel=numel,
        ).to(device)
        timesteps = [c.timestep for c in self.coefficients]
        self.denoiser = Denoiser(
            model, ops, attention, timesteps=timesteps, batch_size=batch_size,
            slots=table_slots(model, len(timesteps), batch_size, len(self.class_labels)),
            with_variance=self.learned_range, with_null=config.cfg_scale != 1.0,
            pack=config.jacobian != "full",
        )  # fmt: skip
        self.timesteps = torch.tensor(timesteps, device=device)[:, None].repeat(1, 2 * batch_size)
        self.x = torch.zeros(batch_size, *self.shape, device=device)
        remembers = self.schedule.memory != "none"  # x0 of this step, and what the update adds of one
        self.xstart, self.memory = (torch.zeros_like(self.x) if remembers else None for _ in range(2))
        # labels and table rows of both branches, noise indices, discriminator targets: written by one copy
        self.staging = torch.zeros(6, batch_size, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros(6, batch_size, dtype=torch.long, device=device)
        self.labels, self.rows = self.inputs[0:2].view(-1), self.inputs[2:4].view(-1)  # [2B]
        self.indices, self.targets = self.inputs[4], self.inputs[5]
        self.written = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self.seed = torch.tensor([config.seed], device=device)
        # a pair each, so that every step's number lies on 16 bytes: Triton compiles per alignment
        numbers = [*range(len(timesteps)), diffusion.NUM_TRAIN_TIMESTEPS]
        self.steps = torch.tensor(numbers, device=device)[:, None].repeat(1, 2)
        self.loaded: Guidance | None = None  # the last that `load` took
        self.guidance: Guidance | None = None  # static copies: `load` writes into them
        self.network: Network | None = None
        self.workspace: Workspace | None = None
        self.guided, self.composed = False, False
        self.graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}  # guided, of given latents
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def yields(self) -> int:
        """How often `denoise` yields for a batch: after every step, or once after a graph's replay."""
        return 1 if self.device.type == "cuda" else len(self.coefficients)

    def load(self, guidance: Guidance | None) -> None:
        """Take a curriculum's guidance, by copying its weights; None samples with CFG alone.

        Only weights may differ between the guidances of an engine: a captured graph is not captured again.
        """
        self.loaded, self.guided = guidance, guidance is not None
        if guidance is None:
            return
        dtype = torch.bfloat16 if self.denoiser.tokens.dtype == torch.bfloat16 else torch.float32
        dtype = dtype if self.device.type == "cuda" else torch.float32
        convnets = self._convnets(guidance)
        if convnets:
            stacked = stack_convnets(convnets, dtype)
            if self.network is None:
                self.network, self.guidance = stacked, guidance
                self.workspace = guidance_workspace(self.x, stacked, stacked.blocks[0].bias.shape[1])
            for static, new in zip(_tensors(self.network), _tensors(stacked), strict=True):
                static.copy_(new)
        elif self.guidance is None:
            f_i, f_real = copy.deepcopy((guidance.discriminator, guidance.real_classifier))
            earlier = None if guidance.earlier is None else guidance.earlier.clone()
            self.guidance = dataclasses.replace(
                guidance, discriminator=f_i, real_classifier=f_real, earlier=earlier
            )
            for network in self._modules(self.guidance):
                network.to(dtype)
        else:
            for own, network in zip(self._modules(self.guidance), self._modules(guidance), strict=True):
                own.load_state_dict(network.state_dict())
            if self.guidance.earlier is not None and guidance.earlier is not None:
                self.guidance.earlier.copy_(guidance.earlier)

    def denoise(
        self, class_labels: Tensor, indices: Tensor, targets: Tensor, latents: Tensor | None = None
    ) -> Iterator[Tensor]:
        """A batch from noise to images: yields x [n, C, H, W], a view of one buffer, `yields` times.

        class_labels, indices: int64 [n] on the host, the noise's key with the seed and the step; n is at most
        the engine's batch size. targets: int64 [n], the discriminator's label of each sample.
        latents: [n, C, H, W], the noise to start from; default: the keyed one.
        """
        if self.device.type != "cuda":
            yield from self.walk(class_labels, indices, targets, latents)
            return
        self._write(class_labels, indices, targets, latents)
        kind = (self.guided, latents is not None)
        if kind not in self.graphs:
            self.graphs[kind] = self._capture(*kind)
            self._write(class_labels, indices, targets, latents)  # the warm-up walked on x
        self.graphs[kind].replay()
        yield self.x[: len(class_labels)]

    def walk(
        self, class_labels: Tensor, indices: Tensor, targets: Tensor, latents: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The same without a graph, step by step on any device; x may be written to between two steps."""
        self._write(class_labels, indices, targets, latents)
        for x in self._trajectory(self.guided, latents is not None):
            yield x[: len(class_labels)]

    def _write(self, class_labels: Tensor, indices: Tensor, targets: Tensor, latents: Tensor | None) -> None:
        n = len(class_labels)
        if not 0 < n <= self.batch_size:
            raise ValueError(f"a batch of {n} images: the engine was made for 1 to {self.batch_size}")
        labels = class_labels.tolist()
        start = self.class_labels.index(labels[0]) if labels[0] in self.class_labels else 0
        # round the list: a table filled always in the same size, so that its rounding is that of any start
        rows = self.denoiser.table.hold(labels, self.class_labels[start:] + self.class_labels[:start])
        if self.written is not None:
            self.written.synchronize()  # the staging buffer may still be on its way
        self.staging[1], self.staging[3] = self.model.null_label, self.denoiser.table.slots
        for number, values in ((0, class_labels), (2, torch.tensor(rows)), (4, indices), (5, targets)):
            self.staging[number, :n], self.staging[number, n:] = values, values[-1]
        self.inputs.copy_(self.staging, non_blocking=True)
        if self.written is not None:
            self.written.record()
        if latents is not None:
            self.x[:n], self.x[n:] = latents, latents[-1]

    def _capture(self, guided: bool, given: bool) -> torch.cuda.CUDAGraph:
        """The graph of a trajectory; `warm_up` runs one step of each kind that the trajectory has."""
        kinds = {guided and self._active(step): step for step in range(len(self.coefficients))}

        def warm_up() -> None:
            for _ in range(2):
                self._start(given)
                for step in kinds.values():
                    self._step(step, guided)

        def trajectory() -> None:
            for _ in self._trajectory(guided, given):
                pass

        return capture(trajectory, warm_up, self.pool)

    def _trajectory(self, guided: bool, given: bool) -> Iterator[Tensor]:
        """Every launch of a batch, in an order that no value decides; given: x holds the noise already."""
        self._start(given)
        for step in reversed(range(len(self.coefficients))):
            self._step(step, guided)
            yield self.x

    @torch.no_grad()
    def _start(self, given: bool) -> None:
        if self.memory is not None:
            self.memory.zero_()
        if given:
            return
        labels = self.labels[: self.batch_size]
        self.ops.philox_normal(
            labels, self.indices, self.seed, self.steps[-1, :1], shape=self.shape, out=self.x
        )

    def _active(self, step: int) -> bool:
        low, high = self.config.guidance_window
        return low <= self.coefficients[step].timestep / diffusion.NUM_TRAIN_TIMESTEPS <= high

    @torch.no_grad()
    def _step(self, step: int, guided: bool) -> None:
        """One step in place: the denoiser, then (1) to (4)."""
        cfg_channels = min(self.config.cfg_channels or self.shape[0], self.shape[0])
        keywords = {
            "cfg_channels": cfg_channels,
            "clip": bool(self.config.clip_denoised),
            "learned_range": self.learned_range,
            "out": self.x,
        }
        labels = self.labels[: self.batch_size]
        tables = (self.seed, self.steps[step, :1], self.table)
        gradient = None
        guided = guided and self._active(step)
        if guided and self.network is None:
            denoised, gradient = self._autograd(step)
        else:
            denoised = self.denoiser(self.x, step, self.rows)
        self._predict(step, denoised, cfg_channels)
        if guided and self.network is not None and self.guidance is not None:
            self._guide(
                self.x, denoised, labels, self.indices, self.targets, *tables, self.network,
                groups=self.network.blocks[0].bias.shape[1], activation="relu",
                objective=self.guidance.objective, omega=self.guidance.omega,
                workspace=self.workspace, **keywords,
            )  # fmt: skip
        else:
            self.ops.guided_step(self.x, denoised, labels, self.indices, *tables, gradient, **keywords)
        self._remember(step)

    def _predict(self, step: int, denoised: Tensor, cfg_channels: int) -> None:
        """x0 of this step, where the schedule remembers it, from x before the step replaces it."""
        if self.xstart is not None:
            clip = self.schedule.memory == "previous" and bool(self.config.clip_denoised)
            self.ops.pred_xstart(
                self.x, denoised, self.steps[step, :1], self.table,
                cfg_channels=cfg_channels, clip=clip, out=self.xstart,
            )  # fmt: skip

    def _remember(self, step: int) -> None:
        """Add from_memory m to x, and keep x0 for the next step."""
        if self.xstart is not None and self.memory is not None:
            remembered = self.memory if self.schedule.memory == "previous" else self.xstart
            self.x.add_(remembered, alpha=self.schedule.updates[step].from_memory)
            self.memory.copy_(self.xstart)

    def _guide(self, *tensors: Any, **keywords: Any) -> None:
        """`discriminator_guidance`; composed of single ops, said once, where its kernel refuses the shape."""
        if not self.composed:
            try:
                self.ops.discriminator_guidance(*tensors, **keywords)
                return
            except ValueError as refusal:
                print(f"guidance is composed of single ops here: {refusal}", file=sys.stderr)
                self.composed = True
        compose_guidance(self.ops, *tensors, **keywords)

    def _autograd(self, step: int) -> tuple[Tensor, Tensor]:
        """The denoiser's output and the gradient of (3), for what no op computes."""
        assert self.guidance is not None
        c, channels = self.coefficients[step], self.shape[0]
        full = self.guidance.jacobian == "full"
        x = self.x.clone().requires_grad_(full)
        with torch.set_grad_enabled(full):
            if full:
                dtype = self.model.pos_embed.dtype
                denoised = self.model(torch.cat((x, x)).to(dtype), self.timesteps[step], self.labels)
            else:
                denoised = self.denoiser(x, step, self.rows)
            cond, null = denoised[:, :channels].to(x.dtype).chunk(2)
            eps = diffusion.classifier_free_guidance(
                cond, null, self.config.cfg_scale, self.config.cfg_channels
            )
            pred_xstart = diffusion.predict_xstart(x, eps, c)
        gradient = self.guidance.gradient(x, pred_xstart, self.targets, bool(self.config.clip_denoised))
        return denoised.detach(), gradient.contiguous()

    def _convnets(self, guidance: Guidance) -> list[ConvNet]:
        """The networks of a guidance that `discriminator_guidance` computes; empty if autograd must."""
        if guidance.jacobian != "identity" or guidance.decode is not None or guidance.gamma:
            return []
        networks = self._modules(guidance)
        convnets = [network for network in networks if isinstance(network, ConvNet)]
        whole = all(self.shape[1] % 2 ** (len(n.features) // 4) == 0 for n in convnets)  # no pool cuts a row
        return convnets if len(convnets) == len(networks) and whole else []

    @staticmethod
    def _modules(guidance: Guidance) -> list[nn.Module]:
        used = guidance.objective == "learnability" and guidance.real_classifier is not None
        return [guidance.discriminator, *([guidance.real_classifier] if used else [])]  # type: ignore[list-item]


def _tensors(network: Network) -> list[Tensor]:
    return [tensor for group in (*network.blocks, network.head) for tensor in group]


def table_slots(model: DiT, steps: int, batch_size: int, num_classes: int) -> int:
    """Classes that the modulation table holds at a time: all of a run's if they fit, at least a batch's."""
    fitting = TABLE_BYTES[model.pos_embed.device.type] // table_bytes(model, steps)
    return min(num_classes, max(batch_size, fitting))


def table_bytes(model: DiT, steps: int) -> int:
    """Bytes of a class in the modulation table."""
    shape = model.config
    return steps * (6 * shape.depth + 2) * shape.hidden_size * model.pos_embed.element_size()
