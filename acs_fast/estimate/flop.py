"""What networks cost: FLOP, parameters, and what a backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import FREQUENCY_EMBEDDING_SIZE, DiT, DiTConfig
from acs_fast.models.vae import VAE


@dataclass(frozen=True)
class Cost:
    """Of a network and one image. FLOP = 2 x multiply-add of linears, convolutions and attention."""

    parameters: int
    forward: int  # FLOP
    to_input: int  # FLOP of the forward pass and of the gradient to the input, parameters frozen
    training: int  # FLOP of the forward pass and of the parameters' gradients
    saved: int  # bytes that the training's forward pass keeps for its backward pass, in fp32


def denoiser_flops(shape: DiTConfig, cfg_scale: float = 4.0) -> int:
    """2 x multiply-add of the lean denoiser for one image: both branches of CFG, its patches embedded once.

    At a scale of 1 the null branch is left out.
    The modulations and the embedders of timestep and label are not in it: a table holds them.
    """
    d, tokens = shape.hidden_size, (shape.input_size // shape.patch_size) ** 2
    patch = shape.in_channels * shape.patch_size**2
    outputs = patch * (2 if shape.learn_sigma else 1)
    branch = shape.depth * (2 * tokens * d * 12 * d + 4 * tokens * tokens * d) + 2 * tokens * d * outputs
    return (1 if cfg_scale == 1.0 else 2) * branch + 2 * tokens * patch * d


def denoiser_parameters(shape: DiTConfig) -> int:
    """Parameters of a DiT, the fixed position embedding among them."""
    d, tokens = shape.hidden_size, (shape.input_size // shape.patch_size) ** 2
    patch = shape.in_channels * shape.patch_size**2
    outputs = patch * (2 if shape.learn_sigma else 1)
    block = (12 + 6) * d * d + (3 + 1 + 4 + 1 + 6) * d  # linears of attention and MLP, adaLN; their biases
    timesteps = FREQUENCY_EMBEDDING_SIZE * d + d * d + 2 * d
    final = d * outputs + outputs + 2 * d * d + 2 * d
    return shape.depth * block + (patch + 1) * d + timesteps + (shape.num_classes + 1 + tokens) * d + final


def full_jacobian_flops(shape: DiTConfig) -> int:
    """FLOP of one image forward through both branches of the plain DiT and back to x, parameters frozen."""
    with torch.device("meta"), torch.enable_grad():
        model = DiT(shape).requires_grad_(False)
        x = torch.zeros(1, shape.in_channels, shape.input_size, shape.input_size, requires_grad=True)
        both = torch.zeros(2, dtype=torch.long)
        return count(lambda: model(torch.cat((x, x)), both, both).sum().backward())


def classifier_cost(name: str, in_channels: int, num_classes: int, size: int) -> Cost:
    """Of a classifier that `build_classifier` makes; run once with a single image, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        network = build_classifier(name, in_channels, num_classes, size)
    x = torch.zeros(1, in_channels, size, size)
    with torch.enable_grad():
        training = count(lambda: network(x).sum().backward())
        kept = saved_bytes(network, x)
        network.requires_grad_(False)
        seen = x.clone().requires_grad_()
        to_input = count(lambda: network(seen).sum().backward())
    parameters = sum(p.numel() for p in network.parameters())
    return Cost(parameters, count(lambda: network(x)), to_input, training, kept)


def decoder_flops(vae: VAE, size: int, gradient: bool = False) -> int:
    """FLOP of decoding one sample of `size` x `size`; with `gradient`, of its gradient to the sample too."""
    weights = {f"module.{name}": value.to("meta") for name, value in vae.module.state_dict().items()}
    z = torch.zeros(1, vae.latent_channels, size, size, dtype=vae.dtype, device="meta")
    z.requires_grad_(gradient)
    decoder = _Decoder(vae.module)

    def decode() -> None:
        image = torch.func.functional_call(decoder, weights, (z,))
        if gradient:
            image.sum().backward()

    with torch.set_grad_enabled(gradient):
        return count(decode)


def count(call: Callable[[], object]) -> int:
    """FLOP of the operators of a call, by PyTorch's counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows not all kernels
        call()
    return int(counter.get_total_flops())


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of network(x) for the backward pass, each once, without its parameters."""
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)


class _Decoder(nn.Module):
    """A VAE's `decode` as the forward pass of a module."""

    def __init__(self, module: Any):
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module.decode(z, return_dict=False)[0]
