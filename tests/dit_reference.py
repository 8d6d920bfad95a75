"""What the official DiT is, written by hand: its tensors, its position embedding and its forward pass."""

import math

import numpy as np
import torch

from acs_fast.models.dit import DiT, DiTConfig

SMALL = DiTConfig(
    input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=3, num_classes=4,
    classes=("ant", "bee", "cat", "dog"),
)  # fmt: skip


def official_shapes(depth, d, patch, channels=4, size=32, num_classes=1000):
    """The state dict of the official DiT with learned sigma, written down by hand."""
    shapes = {
        "pos_embed": (1, (size // patch) ** 2, d),
        "x_embedder.proj.weight": (d, channels, patch, patch),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (num_classes + 1, d),
        "final_layer.linear.weight": (patch * patch * channels * 2, d),
        "final_layer.linear.bias": (patch * patch * channels * 2,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for i in range(depth):
        linears = {
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
            "adaLN_modulation.1": (6 * d, d),
        }
        for name, shape in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


def numpy_pos_embed(d, grid):
    """get_2d_sincos_pos_embed of MAE and DiT, in numpy; the grid's first entry varies along w."""

    def one_axis(positions):
        omega = 1.0 / 10000 ** (np.arange(d // 4, dtype=np.float64) / (d / 4))
        angle = np.outer(positions.reshape(-1), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    w, h = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64))
    return np.concatenate([one_axis(w), one_axis(h)], axis=1)


def randomised(config, seed=0):
    """A DiT in which every parameter is random and none is zero."""
    model, generator = DiT(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.01)
    return model.eval()


def inputs(config, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    return (
        torch.randn(shape, generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randint(0, config.num_classes + 1, (batch,), generator=generator),
    )


def plain_forward(state, config, image, timestep, label):
    """The official forward pass of one image [C, H, W] in float64 numpy, head by head and patch by patch."""
    w = {name: value.double().numpy() for name, value in state.items()}
    p, d, heads = config.patch_size, config.hidden_size, config.num_heads
    grid, width = config.input_size // p, config.hidden_size // config.num_heads

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm_modulate(x, shift, scale):
        centred = x - x.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
        return normed * (1 + scale) + shift

    def attention(x, name):
        q, k, v = np.split(linear(x, f"{name}.qkv"), 3, axis=1)
        outputs = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
            outputs.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
        return linear(np.concatenate(outputs, axis=1), f"{name}.proj")

    pixels = image.double().numpy()
    patches = [pixels[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r in range(grid) for c in range(grid)]
    kernel = w["x_embedder.proj.weight"].reshape(d, -1)
    x = (
        np.stack([kernel @ patch.reshape(-1) for patch in patches])
        + w["x_embedder.proj.bias"]
        + w["pos_embed"][0]
    )

    # fp32 in the official code too: at t = 999 its angles are off by 6e-5, which a checkpoint is trained with
    angle = np.float32(timestep) * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    features = torch.cat([angle.cos(), angle.sin()]).double().numpy()
    embedded = linear(silu(linear(features, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(embedded + w["y_embedder.embedding_table.weight"][label])
    for i in range(config.depth):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(c, f"{block}.adaLN_modulation.1"), 6)
        x = x + gate1 * attention(norm_modulate(x, shift1, scale1), f"{block}.attn")
        hidden = gelu(linear(norm_modulate(x, shift2, scale2), f"{block}.mlp.fc1"))
        x = x + gate2 * linear(hidden, f"{block}.mlp.fc2")
    shift, scale = np.split(linear(c, "final_layer.adaLN_modulation.1"), 2)
    tokens = linear(norm_modulate(x, shift, scale), "final_layer.linear")

    channels = tokens.shape[1] // p**2
    output = np.empty((channels, config.input_size, config.input_size))
    for number, token in enumerate(tokens):
        row, column = number // grid * p, number % grid * p
        output[:, row : row + p, column : column + p] = token.reshape(p, p, channels).transpose(2, 0, 1)
    return torch.from_numpy(output)
