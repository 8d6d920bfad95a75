"""The DiT: official names and shapes, initialisation, and its forward pass against an independent one."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from acs_fast.models.dit import SIZES, DiT, official_config
from tests.dit_reference import SMALL, inputs, numpy_pos_embed, official_shapes, plain_forward, randomised

# depth, hidden size, heads, patch size, and the parameters with pos_embed, as official code prints them
OFFICIAL = {
    "DiT-XL/2": (28, 1152, 16, 2, 675_129_632),
    "DiT-B/4": (12, 768, 12, 4, 130_475_648),
    "DiT-S/8": (12, 384, 6, 8, 33_148_160),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_state_dict_fits(name):
    depth, d, heads, patch, parameters = OFFICIAL[name]
    with torch.device("meta"):
        model = DiT(official_config(name))
        state = {key: torch.empty(shape) for key, shape in official_shapes(depth, d, patch).items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == official_shapes(
        depth, d, patch
    )
    assert [key for key, value in model.named_parameters() if not value.requires_grad] == ["pos_embed"]
    model.load_state_dict(state, strict=True, assign=True)
    assert model.blocks[0].attn.num_heads == heads
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.null_label == 1000


def test_official_size_follows_the_resolution():
    assert official_config("DiT-XL/2", 64) == dataclasses.replace(official_config("DiT-XL/2"), input_size=64)
    assert SIZES["DiT-L"] == (24, 1024, 16)


@pytest.mark.parametrize(("d", "grid"), [(8, 1), (24, 3), (1152, 16)], ids=["8x1", "24x3", "DiT-XL/2"])
def test_position_embedding_is_the_official_one(d, grid):
    config = dataclasses.replace(SMALL, input_size=grid, patch_size=1, hidden_size=d, num_heads=1)
    got = DiT(config).pos_embed
    assert got.shape == (1, grid * grid, d) and not got.requires_grad
    np.testing.assert_allclose(got[0].numpy(), numpy_pos_embed(d, grid), atol=1e-6)


@pytest.mark.parametrize("learn_sigma", [True, False], ids=["learned-sigma", "eps-only"])
@pytest.mark.parametrize(("patch", "batch"), [(1, 3), (2, 1), (2, 5), (3, 2)], ids=lambda v: str(v))
def test_forward_matches_a_plain_reimplementation(patch, batch, learn_sigma):
    config = dataclasses.replace(SMALL, patch_size=patch, learn_sigma=learn_sigma)
    model = randomised(config)
    x, timesteps, labels = inputs(config, batch)
    expected = torch.stack(
        [
            plain_forward(model.state_dict(), config, *row)
            for row in zip(x, timesteps.tolist(), labels, strict=True)
        ]
    )
    assert expected.shape[1] == (6 if learn_sigma else 3)
    single = model(x, timesteps, labels)
    torch.testing.assert_close(model.double()(x.double(), timesteps, labels), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-4)


def test_forward_tells_labels_and_timesteps_apart():
    model = randomised(SMALL)
    x, _, _ = inputs(SMALL, 1)
    timesteps, labels = torch.tensor([0, 1, 999, 0, 0]), torch.tensor([0, 0, 0, 3, model.null_label])
    outputs = model(x.expand(5, -1, -1, -1), timesteps, labels)
    distances = torch.cdist(outputs.flatten(1)[None], outputs.flatten(1)[None])[0]
    assert distances[~torch.eye(5, dtype=torch.bool)].min() > 1e-3


def test_initialisation_is_adaln_zero():
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(SMALL, hidden_size=96))
    before = model.pos_embed.clone()
    model.initialize_weights()
    x, timesteps, labels = inputs(SMALL, 3)
    assert not model(x, timesteps, labels).any()
    zero = {name for name, value in model.state_dict().items() if name.endswith("weight") and not value.any()}
    modulations = {f"blocks.{i}.adaLN_modulation.1.weight" for i in range(SMALL.depth)}
    assert zero == modulations | {"final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"}
    assert torch.equal(model.pos_embed, before)
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.15)
    bound = math.sqrt(6 / (96 + 4 * 96))
    weight = model.blocks[0].mlp.fc1.weight.abs().max().item()
    assert 0.95 * bound < weight <= bound
