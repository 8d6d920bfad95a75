"""DiTs in diffusers format: loaded by us, they are what diffusers runs."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from acs_fast.config import InputError
from acs_fast.data import imagenet_classes
from acs_fast.models import checkpoint
from acs_fast.models.checkpoint import digest, load_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMBEDDER = "norm1.emb.class_embedder.embedding_table.weight"


def small_dit(**changes):
    """A DiT of diffusers in which no parameter is zero and the embedders of all blocks are one."""
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 10,
        "num_embeds_ada_norm": 7,
    }
    model = DiTTransformer2DModel(**{**settings, **changes}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.01)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def save_pipeline(model, folder, **schedule):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler(**schedule)).save_pretrained(folder)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 10, 10, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 1, 333, 500, 998, 999]), torch.tensor([0, 7, 3, 6, 7, 1])


def assert_same_model(model, loaded):
    """Outputs agree in float64 to rounding alone, and in fp32 within what fp32 loses of it in diffusers."""
    x, timesteps, labels = inputs()
    lossy = model(x, timesteps, labels).sample
    ours = loaded(x, timesteps, labels)
    exact = model.double()(x.double(), timesteps, labels).sample
    torch.testing.assert_close(
        loaded.double()(x.double(), timesteps, labels),
        exact,
        rtol=1e-10,
        atol=1e-10 * exact.abs().max().item(),
    )
    assert (ours - exact).abs().max() <= 2 * (lossy - exact).abs().max()


@pytest.mark.parametrize(
    "changes", [{}, {"out_channels": None}, {"norm_eps": 1e-3}, {"patch_size": 5}], ids=str
)
def test_forward_is_diffusers_forward(tmp_path, changes):
    model = small_dit(**changes)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    config = loaded.config
    assert (config.hidden_size, config.depth, config.num_heads, config.num_classes) == (24, 3, 3, 7)
    assert config.learn_sigma == ("out_channels" not in changes) and config.classes == ()
    assert config.mlp_norm_eps == changes.get("norm_eps", 1e-5) and config.downscale_freq_shift == 1
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert_same_model(model, loaded)


def test_norm_eps_matters_here():
    """What diffusers' default epsilon changes is far above the tolerance of the test above."""
    model = small_dit().double()
    x, timesteps, labels = inputs(torch.float64)
    exact = model(x, timesteps, labels).sample
    for block in model.transformer_blocks:
        block.norm3.eps = 1e-6
    assert (model(x, timesteps, labels).sample - exact).abs().max() > 1e-8 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_cast_once(tmp_path, dtype):
    model = small_dit()
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, dtype)
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
    state = load_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(value, state[name].to(dtype)) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["whole", "sharded"])
def test_every_weight_file_is_read_the_same(tmp_path, monkeypatch, safe, shard):
    monkeypatch.setattr("acs_fast.models.weights.MAPPED_BYTES", 10_000)  # so that files are mapped anew
    model = small_dit()
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=shard)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) > 3 if shard == "40KB" else len(names) == 2, names
    assert_same_model(model, load_checkpoint(tmp_path))


def test_safetensors_are_preferred(tmp_path):
    model = small_dit()
    model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"not to be opened")
    assert_same_model(model, load_checkpoint(tmp_path))


def test_pipeline_folder_is_read(tmp_path):
    model = small_dit()
    save_pipeline(model, tmp_path, beta_end=0.02)
    assert_same_model(model, load_checkpoint(tmp_path))


def test_old_configuration_has_diffusers_defaults(tmp_path):
    """The hub's DiT-XL-2-256 names an older class and has no norm_eps."""
    model = small_dit()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["norm_eps"], settings["activation_fn"]
    (tmp_path / "config.json").write_text(
        json.dumps({**settings, "_class_name": "Transformer2DModel", "num_vector_embeds": None})
    )
    assert_same_model(model, load_checkpoint(tmp_path))


def test_thousand_classes_are_the_wnids(tmp_path):
    small_dit(num_embeds_ada_norm=1000, num_layers=1).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).config.classes == imagenet_classes()


def test_position_table_in_the_file_is_checked(tmp_path):
    model = small_dit()
    model.save_pretrained(tmp_path)
    state = {**load_file(tmp_path / WEIGHTS), "pos_embed.pos_embed": model.pos_embed.pos_embed.half()}
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    assert_same_model(model, load_checkpoint(tmp_path))
    state["pos_embed.pos_embed"][0, 3, 2] += 0.1
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"pos_embed\.pos_embed is not the sine-cosine table"):
        load_checkpoint(tmp_path)


def damaged(folder, change):
    """A small DiT in a folder after `change` of its state dict."""
    small_dit().save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize("block", [1, 2])
def test_embedders_that_differ_are_refused(tmp_path, block):
    name = f"transformer_blocks.{block}.{EMBEDDER}"
    text = refusal(damaged(tmp_path, lambda state: state[name][5, 3].add_(1e-3)))
    assert f"{name} differs from transformer_blocks.0.{EMBEDDER}" in text


def test_first_five_missing_and_unexpected_tensors_are_named(tmp_path):
    def change(state):
        for x in "qkv":
            for kind in ("weight", "bias"):
                state[f"more.{x}.{kind}"] = state.pop(f"transformer_blocks.1.attn1.to_{x}.{kind}")

    text = refusal(damaged(tmp_path, change))
    missing = [f"transformer_blocks.1.attn1.to_{x}.{kind}" for kind in ("weight", "bias") for x in "qkv"]
    assert f"it has no {', '.join(missing[:5])} and 1 more" in text
    unexpected = [f"more.{x}.{kind}" for x in "kqv" for kind in ("bias", "weight")]
    assert f"it has the unexpected {', '.join(unexpected[:5])} and 1 more" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_first_tensor_with_a_bad_value_is_named(tmp_path, value):
    def change(state):
        state["transformer_blocks.1.attn1.to_v.weight"][0, 1] = value
        state["proj_out_2.bias"][0] = value

    text = refusal(damaged(tmp_path, change))
    assert "transformer_blocks.1.attn1.to_v.weight holds NaN or infinite values" in text


def test_wrong_shape_is_named(tmp_path):
    name = "transformer_blocks.1.attn1.to_q.weight"
    text = refusal(damaged(tmp_path, lambda state: state.update({name: torch.ones(24, 23)})))
    assert f"{name} has shape [24, 23], its configuration needs [24, 24]" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "describes a PixArtTransformer2DModel, not a DiT"),
        ({"norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single', a DiT has 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn 'geglu'"),
        ({"attention_bias": False}, "attention_bias False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine True"),
        ({"out_channels": 6}, "out_channels 6 for in_channels 4"),
        ({"sample_size": 11}, "patch_size 2 does not divide"),
        ({"sample_size": [10, 10]}, "input_size is [10, 10]"),
        ({"num_layers": None}, "depth is None"),
        ({"norm_eps": 0}, "mlp_norm_eps is 0.0"),
        ({"norm_eps": "tiny"}, "could not convert"),
        ({"num_attention_heads": None}, "describes no DiT"),
    ],
    ids=str,
)
def test_configuration_that_is_no_dit_is_refused(tmp_path, setting, message):
    small_dit().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **setting}))
    assert message in refusal(tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    assert "transformer/config.json is missing" in refusal(tmp_path)
    model = small_dit()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    assert "holds no diffusion_pytorch_model.safetensors or .bin" in refusal(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    assert "index.json cannot be read" in refusal(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": []}')
    assert "holds no diffusion_pytorch_model.safetensors or .bin" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "scaled_linear"),
        ("beta_start", 0.00085),
        ("beta_end", 0.012),
        ("num_train_timesteps", 500),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
        ("beta_schedule", None),
    ],
)
def test_other_noise_schedules_are_refused(tmp_path, key, value):
    save_pipeline(small_dit(num_layers=1), tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(file.read_text()), key: value}
    if value is None:
        del settings[key]  # as in the file of a flow-matching scheduler, which has no betas
    file.write_text(json.dumps(settings))
    assert f"scheduler_config.json has {key} {value!r}" in refusal(tmp_path)


def test_digest_is_of_configuration_and_weights(tmp_path):
    model = small_dit()
    save_pipeline(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "a" / "transformer")
    config = tmp_path / "b" / "config.json"
    stored = config.read_text()
    config.write_text(stored.replace('"norm_eps": 1e-05', '"norm_eps": 1e-06'))
    assert config.read_text() != stored and digest(tmp_path / "b") != digest(tmp_path / "a")
    config.write_text(stored)
    model.proj_out_2.bias[0] += 1
    model.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "b") != digest(tmp_path / "a")


def test_listed_names_are_five():
    assert checkpoint._listed(list("abcde")) == "a, b, c, d, e"
    assert checkpoint._listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
