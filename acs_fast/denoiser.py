"""The lean DiT forward over the ops: modulations from a table, QKV fused, every buffer allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.attention import Attention
from acs_fast.augment import to_device
from acs_fast.linear import Linear
from acs_fast.models.dit import DiT, DiTBlock, timestep_features
from acs_fast.ops import Ops

# where a block's six modulations lie in a row of the table, in units of the width D
SHIFT_MSA, SCALE_MSA, GATE_MSA, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


class Table:
    """All adaLN modulations of a trajectory: [steps, slots, (6 depth + 2) D] in the denoiser's dtype.

    They depend on (step, class) alone: Linear(SiLU(t_embedder(t) + y_embedder(y))) of every block, computed
    in fp32. The last slot is the null label's, the others hold `labels`. At DiT-XL/2 in bf16 a row is
    392 KB, so 50 steps of a class are 19.6 MB.
    """

    def __init__(self, model: DiT, timesteps: Sequence[int], slots: int):
        self.model, shape = model, model.config
        parameter = model.pos_embed
        self.timesteps = torch.tensor(timesteps, device=parameter.device)
        self.width = (6 * shape.depth + 2) * shape.hidden_size
        size = (len(timesteps), slots + 1, self.width)
        self.values = torch.empty(size, dtype=parameter.dtype, device=parameter.device)
        self.labels: tuple[int, ...] = ()
        self._fill(slice(slots, slots + 1), [model.null_label])

    @property
    def slots(self) -> int:
        """Classes that the table holds at a time, without the null label."""
        return self.values.shape[1] - 1

    def hold(self, labels: Sequence[int], upcoming: Sequence[int]) -> list[int]:
        """The slots of `labels`; those that are missing make the table anew, filled up with `upcoming`."""
        if not set(labels) <= set(self.labels):
            wanted = list(dict.fromkeys((*labels, *upcoming)))[: self.slots]
            if not set(labels) <= set(wanted):
                raise ValueError(f"{len(set(labels))} classes do not fit a table of {self.slots}")
            self._fill(slice(0, len(wanted)), wanted)
            self.labels = tuple(wanted)
        return [self.labels.index(label) for label in labels]

    @torch.no_grad()
    def _fill(self, slots: slice, labels: Sequence[int]) -> None:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        embedded = self._embed_timesteps(wide)  # [steps, D]
        rows = to_device(torch.tensor(labels), embedded.device)
        classes = self.model.y_embedder.embedding_table.weight[rows].to(wide)  # [slots, D]
        c = F.silu(embedded[:, None] + classes)  # [steps, slots, D]
        layers = [cast(DiTBlock, block).adaLN_modulation for block in self.model.blocks]
        at = 0
        for layer in (*layers, self.model.final_layer.adaLN_modulation):
            linear = cast(nn.Linear, layer[1])
            weight, bias = linear.weight.to(wide), linear.bias.to(wide)
            n = len(bias)
            for place, slot in enumerate(range(slots.start, slots.stop)):
                # class by class: a product may round by how many rows it has, and these hang on what is left
                self.values[:, slot, at : at + n] = F.linear(c[:, place], weight, bias).to(self.values.dtype)
            at += n

    def _embed_timesteps(self, dtype: torch.dtype) -> Tensor:
        embedder = self.model.t_embedder
        features = timestep_features(self.timesteps, embedder.downscale_freq_shift).to(dtype)
        first, _, second = embedder.mlp
        for linear in (cast(nn.Linear, first), cast(nn.Linear, second)):
            features = F.linear(features, linear.weight.to(dtype), linear.bias.to(dtype))
            features = F.silu(features) if linear is first else features
        return features


class _Block(NamedTuple):
    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    eps: tuple[float, float]  # of both norms


class Denoiser:
    """eps_theta(x_t, t, y) of both branches of classifier-free guidance, as `DiT` computes it.

    Call it with x [B, C, H, W] fp32, the step's number, and rows int64 [2B], the table slots of the B
    conditional samples and then of the B null ones; returns `denoised` [2B, C or 2C, H, W] in the denoiser's
    dtype, one static buffer. `with_variance=False` leaves the variance half of the final layer out;
    `with_null=False` the null branch, which guidance of scale 1 multiplies by zero: its half is a copy.
    """

    def __init__(
        self,
        model: DiT,
        ops: Ops,
        attention: Attention,
        *,
        timesteps: Sequence[int],
        batch_size: int,
        slots: int,
        with_variance: bool,
        pack: bool,
        with_null: bool = True,
    ):
        self.config, self.ops, self.attention, self.batch_size = model.config, ops, attention, batch_size
        self.table, self.with_null = Table(model, timesteps, slots), with_null
        shape, dtype, device = model.config, model.pos_embed.dtype, model.pos_embed.device
        d, p, self.grid = shape.hidden_size, shape.patch_size, shape.input_size // shape.patch_size
        n, self.tokens_per_image = batch_size * (2 if with_null else 1), self.grid**2
        rows = n * self.tokens_per_image
        proj = model.x_embedder.proj
        self.patch_weight = proj.weight.detach().flatten(1).t().contiguous()  # [C p p, D]
        wide = torch.promote_types(dtype, torch.float32)
        self.position = (model.pos_embed[0].to(wide) + cast(Tensor, proj.bias).to(wide)).to(dtype)  # [T, D]
        self.out_channels = model.out_channels if with_variance else shape.in_channels
        self.blocks = [self._block(cast(DiTBlock, block), rows, pack) for block in model.blocks]
        self.final, self.final_eps = self._final(model), model.final_layer.norm_final.eps

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.patches = empty(batch_size, self.tokens_per_image, shape.in_channels * p * p)
        self.tokens, self.normed = (empty(n, self.tokens_per_image, d) for _ in range(2))
        self.branch = empty(rows, d)  # what attention and MLP add
        self.hidden = empty(rows, 4 * d)  # the MLP's, and before it the fused q, k, v
        self.patched = empty(rows, p * p * self.out_channels)
        self.denoised = empty(2 * batch_size, self.out_channels, shape.input_size, shape.input_size)

    def _block(self, block: DiTBlock, rows: int, pack: bool) -> _Block:
        attn, mlp, eps = block.attn, block.mlp, (block.norm1.eps, block.norm2.eps)
        qkv, proj, fc2 = (Linear(module, rows, pack=pack) for module in (attn.qkv, attn.proj, mlp.fc2))
        fc1 = Linear(mlp.fc1, rows, gelu=True, pack=pack)
        if fc1.packed:  # a packed copy replaces the weights: they would be in memory twice
            block.attn, block.mlp = nn.Module(), nn.Module()  # type: ignore[assignment]
        return _Block(qkv, proj, fc1, fc2, eps)

    def _final(self, model: DiT) -> Linear:
        """The last projection, with the rows of the channels that are wanted, patch by patch."""
        with torch.device("meta"):  # its own start values would be drawn from the global generator
            linear, kept = model.final_layer.linear, nn.Linear(1, 1)
        layout = (self.config.patch_size**2, model.out_channels)
        weight, bias = (v.detach().unflatten(0, layout)[:, : self.out_channels] for v in linear.parameters())
        kept.weight, kept.bias = (nn.Parameter(v.flatten(0, 1), requires_grad=False) for v in (weight, bias))
        return Linear(kept, 0, pack=False)

    def __call__(self, x: Tensor, step: int, rows: Tensor) -> Tensor:
        tokens, normed, table = self.tokens, self.normed, self.table.values[step]
        d, n = self.config.hidden_size, len(tokens)
        rows = rows[:n]

        def columns(block: int, *which: int) -> tuple[Tensor, ...]:
            return tuple(table[:, (6 * block + w) * d : (6 * block + w + 1) * d] for w in which)

        def residual(y: Tensor, which: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
            y = y.view(tokens.shape)
            return self.ops.gated_residual_adaln(tokens, y, *which, rows, eps=eps, out=(tokens, normed))

        self._embed(x)
        first = columns(0, SHIFT_MSA, SCALE_MSA)
        normed = self.ops.adaln(tokens, *first, rows, eps=self.blocks[0].eps[0], out=normed)
        for i, block in enumerate(self.blocks):
            qkv = block.qkv(normed.view(-1, d), self.hidden.view(-1)[: 3 * normed.numel()].view(-1, 3 * d))
            heads = self.config.num_heads
            attended = self.attention(qkv.view(n, -1, 3, heads, d // heads)).view(-1, d)
            y = block.proj(attended, self.branch)
            within = columns(i, GATE_MSA, SHIFT_MLP, SCALE_MLP)
            tokens, normed = residual(y, within, block.eps[1])
            y = block.fc2(block.fc1(normed.view(-1, d), self.hidden), self.branch)
            # the final layer's shift and scale lie in the table where those of a next block would
            after = columns(i + 1, SHIFT_MSA, SCALE_MSA)
            eps = self.blocks[i + 1].eps[0] if i + 1 < len(self.blocks) else self.final_eps
            tokens, normed = residual(y, (*columns(i, GATE_MLP), *after), eps)
        return self._unpatchify(self.final(normed.view(-1, d), self.patched))

    def _embed(self, x: Tensor) -> None:
        """x to tokens; both branches start from the same."""
        (b, c, _, _), g, p = x.shape, self.grid, self.config.patch_size
        patches = self.patches.view(b, g, g, c, p, p)
        patches.copy_(x.view(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5))
        position, weight = (v.expand(b, -1, -1) for v in (self.position, self.patch_weight))
        torch.baddbmm(position, self.patches, weight, out=self.tokens[:b])
        if self.with_null:
            self.tokens[b:].copy_(self.tokens[:b])

    def _unpatchify(self, patched: Tensor) -> Tensor:
        g, p, c = self.grid, self.config.patch_size, self.out_channels
        target = self.denoised[: len(self.tokens)].view(-1, c, g, p, g, p)
        target.copy_(patched.view(-1, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4))
        if not self.with_null:
            self.denoised[self.batch_size :].copy_(self.denoised[: self.batch_size])
        return self.denoised
