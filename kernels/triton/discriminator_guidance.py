"""A whole guided step in Triton: the sequence of the other ops, 2 D + 2 launches at depth D."""

from __future__ import annotations

from torch import Tensor

import acs_fast.kernels.triton as backend
from acs_fast.kernels.compose import compose_guidance
from acs_fast.kernels.structures import Network, Workspace


def discriminator_guidance(
    x: Tensor,
    denoised: Tensor,
    class_labels: Tensor,
    indices: Tensor,
    targets: Tensor,
    seed: Tensor,
    step: Tensor,
    table: Tensor,
    network: Network,
    *,
    groups: int,
    activation: str,
    objective: str,
    omega: float,
    cfg_channels: int,
    clip: bool,
    learned_range: bool,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A whole guided step, as the reference specifies it: [B, C, H, W] in x's dtype.

    targets: int64 [B], the discriminator's label of each sample. network: in the dtype it runs in.
    workspace: of `guidance_workspace`, made anew where it is None. The rest as in the ops it consists of.
    """
    return compose_guidance(
        backend, x, denoised, class_labels, indices, targets, seed, step, table, network,
        groups=groups, activation=activation, objective=objective, omega=omega, cfg_channels=cfg_channels,
        clip=clip, learned_range=learned_range, workspace=workspace, out=out,
    )  # fmt: skip
