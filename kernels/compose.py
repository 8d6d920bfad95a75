"""The guided step as a sequence of ops, for backends that have no single kernel of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from acs_fast.kernels.structures import Network, Workspace, guidance_workspace


def compose_guidance(
    backend: Any,
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
    workspace: Workspace | None,
    out: Tensor | None,
) -> Tensor:
    """`discriminator_guidance` from the ops of a module or an `Ops`: 2 D + 2 launches at depth D."""
    work = workspace or guidance_workspace(x, network, groups)
    step_arguments = {"cfg_channels": cfg_channels, "clip": clip}
    norm_arguments = {"groups": groups, "activation": activation}
    z = backend.pred_xstart(x, denoised, step, table, **step_arguments, out=work.pred_xstart)  # (1), (2)
    for block, y, saved in zip(network.blocks, work.activations, work.saved, strict=True):
        z, _ = backend.conv_norm_act_pool(z, block, **norm_arguments, out=(y, saved))
    head = backend.classifier_head_grad(
        z.flatten(2), network.head, targets, objective=objective, omega=omega, out=work.head
    )
    grad = head.grad.view(z.shape)  # (3): d L / d the last block's output
    for i in reversed(range(1, len(network.blocks))):
        grad = backend.conv_norm_act_pool_backward_input(
            grad, work.saved[i], network.blocks[i], **norm_arguments, out=work.grads[i - 1]
        )
    return backend.discriminator_guided_step(
        x, denoised, class_labels, indices, seed, step, table, grad, work.saved[0], network.blocks[0],
        **norm_arguments, **step_arguments, learned_range=learned_range, out=out,
    )  # fmt: skip
