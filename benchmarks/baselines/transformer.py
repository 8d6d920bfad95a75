"""diffusers' DiT with the weights of ours, and the same operators in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.models.dit import DiT, DiTConfig

Denoiser = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # x [2B, C, H, W], timesteps [2B], labels [2B] -> output


def to_diffusers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under diffusers' names: q, k, v apart, an embedder in each block."""
    out = {f"pos_embed.proj.{kind}": state[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        out[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for part, value in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{part}.{kind}"] = value
            out[f"{theirs}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            out[f"{theirs}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            out[f"{theirs}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
            out[f"{theirs}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            embedder = f"{theirs}.norm1.emb.timestep_embedder"
            out[f"{embedder}.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            out[f"{embedder}.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
    for i in range(depth):
        name = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        out[name] = state["y_embedder.embedding_table.weight"]
    return out


def diffusers_transformer(model: DiT, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the weights of `model`, frozen; ImportError without diffusers."""
    from diffusers import DiTTransformer2DModel  # deferred: an optional package

    c = model.config
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=c.hidden_size // c.num_heads,
            in_channels=c.in_channels,
            out_channels=model.out_channels,
            num_layers=c.depth,
            sample_size=c.input_size,
            patch_size=c.patch_size,
            num_embeds_ada_norm=c.num_classes,
            norm_eps=c.mlp_norm_eps,
        )
    transformer = _fill(transformer, model, dtype, device)
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = c.downscale_freq_shift  # diffusers fixes 1
    return transformer


def plain_transformer(model: DiT, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`PlainTransformer` with the weights of `model`, frozen."""
    with torch.device("meta"):
        transformer = PlainTransformer(model.config, model.out_channels)
    return _fill(transformer, model, dtype, device)


def _fill(transformer: Any, model: DiT, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformer that was made on `meta`, with real weights; no second copy of them at any time."""
    transformer = nn.Module.to(transformer, dtype).to_empty(device=device)  # diffusers' own `to` warns
    transformer.pos_embed.pos_embed.copy_(model.pos_embed.detach())
    transformer.load_state_dict(to_diffusers_state(model.state_dict()))
    return transformer.eval().requires_grad_(False)


def denoiser(transformer: Callable[..., Any]) -> Denoiser:
    """Either transformer, compiled or not, as a function of (x, timesteps, labels)."""

    def call(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return cast(
            Tensor, transformer(x, timestep=timesteps, class_labels=class_labels, return_dict=False)[0]
        )

    return call


def compiled(transformer: nn.Module, mode: str) -> Denoiser:
    """`torch.compile` of the whole transformer in one mode; it compiles at its first call."""
    call = denoiser(torch.compile(transformer, mode=mode, dynamic=False))

    def step(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # for `reduce-overhead`: the last output is done with
        return call(x, timesteps, class_labels)

    return step


class PlainTransformer(nn.Module):
    """The operators of diffusers' DiTTransformer2DModel, in its order and under its parameter names."""

    def __init__(self, config: DiTConfig, out_channels: int):
        super().__init__()
        d = config.hidden_size
        self.patch_size, self.out_channels = config.patch_size, out_channels
        self.pos_embed = PatchEmbed(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(d, 2 * d)
        self.proj_out_2 = nn.Linear(d, config.patch_size**2 * out_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        hidden_states = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep, class_labels)
        embed = cast(Block, self.transformer_blocks[0]).norm1.emb
        conditioning = embed(timestep, class_labels, hidden_states.dtype)
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        hidden_states = self.proj_out_2(hidden_states)
        grid, p, c = math.isqrt(hidden_states.shape[1]), self.patch_size, self.out_channels
        hidden_states = hidden_states.reshape(-1, grid, grid, p, p, c)
        hidden_states = torch.einsum("nhwpqc->nchpwq", hidden_states)
        return (hidden_states.reshape(-1, c, grid * p, grid * p),)


class PatchEmbed(nn.Module):
    pos_embed: Tensor

    def __init__(self, config: DiTConfig):
        super().__init__()
        p, d = config.patch_size, config.hidden_size
        self.proj = nn.Conv2d(config.in_channels, d, kernel_size=p, stride=p)
        self.register_buffer("pos_embed", torch.empty(1, (config.input_size // p) ** 2, d), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        latent = self.proj(latent).flatten(2).transpose(1, 2)
        return (latent + self.pos_embed).to(latent.dtype)


class Block(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.hidden_size
        self.norm1 = AdaLayerNormZero(config)
        self.attn1 = Attention(d, config.num_heads)
        self.norm3 = nn.LayerNorm(d, elementwise_affine=False, eps=config.mlp_norm_eps)
        self.ff = FeedForward(d)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        norm, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, timestep, class_labels)
        hidden_states = gate_msa.unsqueeze(1) * self.attn1(norm) + hidden_states
        norm = self.norm3(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return gate_mlp.unsqueeze(1) * self.ff(norm) + hidden_states


class AdaLayerNormZero(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.hidden_size
        self.emb = Embeddings(config)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(d, 6 * d)
        self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, ...]:
        emb = self.linear(self.silu(self.emb(timestep, class_labels, x.dtype)))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class Embeddings(nn.Module):
    """Timestep and class embedding, which diffusers computes anew in every block."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.hidden_size
        self.downscale_freq_shift = config.downscale_freq_shift
        self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, d), "linear_2": nn.Linear(d, d)})
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, d)})

    def forward(self, timestep: Tensor, class_labels: Tensor, dtype: torch.dtype) -> Tensor:
        half = 128
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
        emb = torch.exp(exponent / (half - self.downscale_freq_shift))
        emb = timestep[:, None].float() * emb[None, :]
        emb = 1 * emb  # diffusers' `scale`
        emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)
        emb = torch.cat([emb[:, half:], emb[:, :half]], dim=-1)
        mlp = self.timestep_embedder
        timesteps_emb = mlp["linear_2"](F.silu(mlp["linear_1"](emb.to(dtype))))
        return cast(Tensor, timesteps_emb + self.class_embedder["embedding_table"](class_labels))


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (t.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(batch, -1, width)
        return cast(Tensor, self.to_out[0](x)) / 1.0  # diffusers' `rescale_output_factor`


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        project_in = nn.ModuleDict({"proj": nn.Linear(hidden_size, 4 * hidden_size)})
        self.net = nn.ModuleList([project_in, nn.Identity(), nn.Linear(4 * hidden_size, hidden_size)])

    def forward(self, x: Tensor) -> Tensor:
        x = cast(nn.ModuleDict, self.net[0])["proj"](x)
        return cast(Tensor, self.net[2](F.gelu(x, approximate="tanh")))
