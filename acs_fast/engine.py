"""The sampling step over the ops: static buffers, device tables, one fused guidance call a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from acs_fast import diffusion
from acs_fast.config import DistillConfig
from acs_fast.guidance import Guidance
from acs_fast.kernels.compose import compose_guidance
from acs_fast.kernels.structures import Network, Workspace, guidance_workspace
from acs_fast.models.classifier import ConvNet, stack_convnets
from acs_fast.models.dit import DiT
from acs_fast.ops import Ops
from acs_fast.sampler import use_learned_range


class StepEngine:
    """Denoises batches as `acs_fast.sampler.denoise` does, by ops instead of eager PyTorch and autograd.

    Everything that a step reads lies on the device: the coefficients in a table, its number in a counter.
    Guidance by a ConvNet with `jacobian="identity"` is one call of `discriminator_guidance`; other networks
    and the full Jacobian take autograd's gradient into `guided_step`.
    """

    def __init__(self, model: DiT, config: DistillConfig, ops: Ops, device: torch.device):
        self.model, self.config, self.ops, self.device = model, config, ops, device
        shape = model.config
        self.shape = (shape.in_channels, shape.input_size, shape.input_size)
        self.coefficients = diffusion.step_coefficients(config.num_sampling_steps)
        self.learned_range = config.sampler == "ddpm" and use_learned_range(model, config)
        numel = shape.in_channels * shape.input_size**2
        self.table = diffusion.step_table(
            config.num_sampling_steps,
            cfg_scale=config.cfg_scale,
            sampler=config.sampler,
            eta=config.eta,
            learned_range=self.learned_range,
            guidance_scale=config.guidance_scale,
            trust_radius=config.trust_radius,
            window=config.guidance_window,
            numel=numel,
        ).to(device)
        self.seed = torch.tensor([config.seed], device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.guidance: Guidance | None = None
        self.network: Network | None = None
        self.workspace: Workspace | None = None
        self.composed = False

    def load(self, guidance: Guidance | None) -> None:
        """Take a curriculum's guidance; None samples with classifier-free guidance alone."""
        self.guidance, self.network = guidance, None
        if guidance is None or guidance.jacobian != "identity":
            return
        networks = [guidance.discriminator]
        if guidance.objective == "learnability" and guidance.real_classifier is not None:
            networks.append(guidance.real_classifier)
        convnets = [network for network in networks if isinstance(network, ConvNet)]
        whole = all(self.shape[1] % 2 ** (len(n.features) // 4) == 0 for n in convnets)  # no pool cuts a row
        if len(convnets) == len(networks) and whole:
            self.network = stack_convnets(
                convnets, torch.bfloat16 if self.device.type == "cuda" else torch.float32
            )

    def denoise(self, class_labels: Tensor, indices: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Walk a batch from noise to images and yield x [B, C, H, W], one buffer, after every step.

        class_labels, indices: int64 [B], the noise's key with the seed and the step. targets: int64 [B], the
        discriminator's label of each sample.
        """
        labels = torch.cat((class_labels, torch.full_like(class_labels, self.model.null_label)))
        timesteps = torch.empty_like(labels)
        self.step.fill_(diffusion.NUM_TRAIN_TIMESTEPS)
        x = self.ops.philox_normal(class_labels, indices, self.seed, self.step, shape=self.shape)
        self.workspace = None
        for step, c in reversed(list(enumerate(self.coefficients))):
            self.step.fill_(step)
            timesteps.fill_(c.timestep)
            yield self._step(x, c, timesteps, labels, targets, indices)

    def _step(
        self,
        x: Tensor,
        c: diffusion.StepCoefficients,
        timesteps: Tensor,
        labels: Tensor,
        targets: Tensor,
        indices: Tensor,
    ) -> Tensor:
        """One step in place: the denoiser, then (1) to (4)."""
        class_labels = labels[: len(x)]
        keywords = {
            "cfg_channels": min(self.config.cfg_channels or self.shape[0], self.shape[0]),
            "clip": bool(self.config.clip_denoised),
            "learned_range": self.learned_range,
        }
        guided = self.guidance is not None and self.guidance.active(c)
        if not guided or self.network is not None:
            with torch.no_grad():
                denoised = self.model(torch.cat((x, x)), timesteps, labels)
        tables = (self.seed, self.step, self.table)
        if guided and self.network is not None and self.guidance is not None:
            groups = self.network.blocks[0].bias.shape[1]
            self.workspace = self.workspace or guidance_workspace(x, self.network, groups)
            return self._guide(
                x, denoised, class_labels, indices, targets, *tables, self.network,
                groups=groups, activation="relu", objective=self.guidance.objective,
                omega=self.guidance.omega, workspace=self.workspace, out=x, **keywords,
            )  # fmt: skip
        gradient = None
        if guided and self.guidance is not None:
            denoised, gradient = self._autograd(x, c, timesteps, labels, targets)
        return self.ops.guided_step(x, denoised, class_labels, indices, *tables, gradient, out=x, **keywords)

    def _guide(self, *tensors: Any, **keywords: Any) -> Tensor:
        """`discriminator_guidance`; composed of single ops, said once, where its kernel refuses the shape."""
        if not self.composed:
            try:
                return self.ops.discriminator_guidance(*tensors, **keywords)
            except ValueError as refusal:
                print(f"guidance is composed of single ops here: {refusal}", file=sys.stderr)
                self.composed = True
        return compose_guidance(self.ops, *tensors, **keywords)

    def _autograd(
        self, x: Tensor, c: diffusion.StepCoefficients, timesteps: Tensor, labels: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The denoiser's output and the gradient of (3), for networks and Jacobians that no op computes."""
        assert self.guidance is not None
        leaf, channels = x.detach().clone(), len(x[0])
        with torch.set_grad_enabled(self.guidance.jacobian == "full"):
            leaf.requires_grad_(self.guidance.jacobian == "full")
            denoised = self.model(torch.cat((leaf, leaf)), timesteps, labels)
            cond, null = denoised[:, :channels].chunk(2)
            eps = diffusion.classifier_free_guidance(
                cond, null, self.config.cfg_scale, self.config.cfg_channels
            )
            pred_xstart = diffusion.predict_xstart(leaf, eps, c)
        gradient = self.guidance.gradient(leaf, pred_xstart, targets, bool(self.config.clip_denoised))
        return denoised.detach(), gradient.contiguous()
