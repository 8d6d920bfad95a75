"""The diffusion transformer (DiT, Peebles & Xie 2023) with official parameter names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_EMBEDDING_SIZE = 256


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT. `classes`: the class folders in label order (empty: they are the label numbers).

    diffusers' DiT differs from the official one in two constants: `mlp_norm_eps`, the epsilon of the norm
    before the MLP, and `downscale_freq_shift`, by which its timestep frequencies are spaced more widely.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    learn_sigma: bool = True
    classes: tuple[str, ...] = ()
    mlp_norm_eps: float = 1e-6
    downscale_freq_shift: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in label order: the label numbers where they have no names."""
        return self.classes or tuple(map(str, range(self.num_classes)))

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, it must be a positive integer")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide input_size {self.input_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 4 and num_heads {self.num_heads}"
            )
        if len(self.classes) not in (0, self.num_classes):
            raise ValueError(f"{len(self.classes)} class names for num_classes {self.num_classes}")
        if type(self.mlp_norm_eps) is not float or not 0.0 < self.mlp_norm_eps < 1.0:
            raise ValueError(f"mlp_norm_eps is {self.mlp_norm_eps!r}, it must lie between 0 and 1")
        if self.downscale_freq_shift not in (0, 1):
            raise ValueError(f"downscale_freq_shift is {self.downscale_freq_shift!r}, it must be 0 or 1")


SIZES = {  # the official sizes: depth, hidden size, heads
    "DiT-XL": (28, 1152, 16),
    "DiT-L": (24, 1024, 16),
    "DiT-B": (12, 768, 12),
    "DiT-S": (12, 384, 6),
}


def official_config(name: str, input_size: int = 32) -> DiTConfig:
    """An official model's configuration by name, as `DiT-XL/2`; `input_size` 32 is 256 px, 64 is 512 px."""
    size, _, patch = name.partition("/")
    depth, hidden_size, num_heads = SIZES[size]
    return DiTConfig(input_size, int(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads)


def sincos_pos_embed(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding, columns (w) in the first half of the width, rows (h) in the second.

    fp32 [1, grid^2, hidden_size]; each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-4k / hidden_size).
    """
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4.0))
    position = torch.arange(grid, dtype=torch.float64)
    angle = position[:, None] * omega  # [grid, D / 4]
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)  # [grid, D / 2]
    table = torch.cat((axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)), dim=1)
    return table.float().unsqueeze(0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x [B, T, D] and shift, scale [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_features(timesteps: Tensor, downscale_freq_shift: int = 0) -> Tensor:
    """[cos(t w_k), sin(t w_k)] with w_k = 10000^(-k / (128 - shift)), k = 0 to 127: [B] to fp32 [B, 256].

    shift: 0 in the official DiT, 1 in diffusers' (`Timesteps` of its `CombinedTimestepLabelEmbeddings`).
    """
    half = FREQUENCY_EMBEDDING_SIZE // 2
    k = torch.arange(half, device=timesteps.device)
    freqs = torch.exp(-math.log(10000.0) * k / (half - downscale_freq_shift))
    angle = timesteps[:, None].float() * freqs
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class TimestepEmbedder(nn.Module):
    """Scalar timesteps [B] to [B, D]: cosine-sine features of 128 frequencies, then a two-layer MLP."""

    def __init__(self, hidden_size: int, downscale_freq_shift: int = 0):
        super().__init__()
        self.downscale_freq_shift = downscale_freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        features = timestep_features(timesteps, self.downscale_freq_shift)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B, D]; row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)


class PatchEmbed(nn.Module):
    """[B, C, H, W] to tokens [B, T, D] by a strided convolution, row-major."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a fused QKV projection."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between; width ratio 4."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=mlp_norm_eps)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """eps_theta(x_t, t, y): [B, C, H, W] to the same; [B, 2C, H, W] (eps, variance values) if learn_sigma."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        grid = config.input_size // config.patch_size
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.downscale_freq_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.pos_embed = nn.Parameter(sincos_pos_embed(config.hidden_size, grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(config.hidden_size, config.num_heads, config.mlp_norm_eps) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, self.out_channels)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.config.num_classes

    def initialize_weights(self) -> None:
        """As the official code: Xavier linears, N(0, 0.02) embeddings, zero gates and output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[0]).weight, std=0.02)
        nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[2]).weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            linear = cast(nn.Linear, cast(DiTBlock | FinalLayer, layer).adaLN_modulation[1])
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, T, p p C] to [B, C, H, W]."""
        p, grid = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = tokens.view(-1, grid, grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid * p, grid * p)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(timesteps) + self.y_embedder(class_labels)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))
