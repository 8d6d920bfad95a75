"""The VAE against diffusers' own: small random networks, saved by diffusers and loaded by us."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from acs_fast.config import InputError
from acs_fast.models.dit import DiTConfig
from acs_fast.models.vae import VAE, check_fits, load_vae

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_kl(**changes):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**{**settings, **changes}).eval()


def small_tiny():
    torch.manual_seed(0)
    widths = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


KINDS = {"kl": (small_kl, False), "tiny": (small_tiny, True)}


def saved(tmp_path, kind, dtype=torch.float32, **options):
    build, tiny = KINDS[kind]
    module = build()
    module.save_pretrained(tmp_path / kind)
    return module, load_vae(str(tmp_path / kind), tiny, CPU, dtype, **options)


def latents(batch=5, dtype=torch.float32):
    return torch.randn(batch, 4, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("kind", "scale"), [("kl", 0.18215), ("tiny", 1.0)])
def test_decode_is_diffusers_decode_of_the_unscaled_latents(tmp_path, kind, scale):
    module, vae = saved(tmp_path, kind)
    expected = module.decode(latents() / scale).sample
    assert vae.scaling_factor == scale and vae.latent_channels == 4 and vae.factor == 4
    images = vae.decode(latents().requires_grad_())
    assert images.shape == (5, 3, 24, 16) and not images.requires_grad
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    differentiable = vae.decode_differentiable(latents())
    torch.testing.assert_close(differentiable, expected, rtol=1e-5, atol=1e-5)


def test_shift_factor_is_added_after_the_division(tmp_path):
    module = small_kl(shift_factor=0.4, scaling_factor=0.5)
    module.save_pretrained(tmp_path)
    images = load_vae(str(tmp_path), False, CPU, torch.float32).decode(latents())
    torch.testing.assert_close(images, module.decode(latents() / 0.5 + 0.4).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("images", "parts"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (0.5, 5)])
def test_decode_in_parts_is_decode_at_once(tmp_path, kind, images, parts):
    module, vae = saved(tmp_path, kind)
    expected = module.decode(latents() / vae.scaling_factor).sample
    vae.budget = int(images * vae.bytes_per_image(6, 4))
    calls = []
    decode = vae.module.decode
    vae.module.decode = lambda z, **options: calls.append(len(z)) or decode(z, **options)
    torch.testing.assert_close(vae.decode(latents()), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == parts and sum(calls) == 5
    assert max(calls) <= max(1, images) and max(calls) - min(calls) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_budget_counts_the_widest_activation(tmp_path, kind):
    """Hooks on every module see the real sizes; the estimate is four times the largest."""
    _, vae = saved(tmp_path, kind)
    sizes = []
    for part in vae.module.decoder.modules():
        part.register_forward_hook(lambda module, args, output: sizes.append(output.nbytes))
    vae.decode(latents(batch=1))
    widest = {"kl": 16 * 24 * 16 * 4, "tiny": 8 * 24 * 16 * 4}[kind]
    assert max(sizes) == widest
    assert vae.bytes_per_image(6, 4) == 4 * widest
    half = load_vae(str(tmp_path / kind), kind == "tiny", CPU, torch.bfloat16)
    assert half.bytes_per_image(6, 4) == 2 * widest


def test_result_goes_into_the_given_tensor(tmp_path):
    module, vae = saved(tmp_path, "kl", torch.bfloat16)
    out = torch.full((5, 3, 24, 16), torch.nan)
    assert vae.decode(latents(), out) is out
    assert vae.decode(latents()).dtype == torch.bfloat16
    error = (out - module.decode(latents() / vae.scaling_factor).sample).abs().max()
    assert 0 < error < 0.05 * out.abs().max()


def test_no_image_is_no_work(tmp_path):
    assert saved(tmp_path, "kl")[1].decode(latents(batch=0)).shape == (0, 3, 24, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_to_the_latents_by_finite_differences(tmp_path, kind):
    _, vae = saved(tmp_path, kind, torch.float64)
    x = latents(2, torch.float64).requires_grad_()
    weights = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(z):
        return (vae.decode_differentiable(z) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)
    assert gradient.abs().min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in vae.module.parameters())


def test_vae_of_a_pipeline_folder_and_old_weights(tmp_path):
    """A pipeline keeps it in vae/; files of before diffusers 0.18 name the attention's parts otherwise."""
    module = small_kl()
    module.save_pretrained(tmp_path / "vae")
    state = load_file(tmp_path / "vae" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        for key in [key for key in state if f"attentions.0.{new}." in key]:
            state[key.replace(new, name)] = state.pop(key)
    assert any("attentions.0.query" in key for key in state)
    (tmp_path / "vae" / WEIGHTS).unlink()
    torch.save(state, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    vae = load_vae(str(tmp_path), False, CPU, torch.float32)
    torch.testing.assert_close(
        vae.decode(latents()), module.decode(latents() / 0.18215).sample, rtol=1e-5, atol=1e-5
    )


def test_encoder_is_not_kept(tmp_path):
    assert not [name for name, _ in saved(tmp_path, "kl")[1].module.named_parameters() if "encoder" in name]


def change_weights(change):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return damage


def change_config(**values):
    def damage(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **values}))

    return damage


DAMAGES = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:9999]), "cannot be loaded"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "cannot be loaded"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken-config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "other-class": (change_config(_class_name="AutoencoderDC"), "class AutoencoderDC, --vae needs Auto"),
    "wrong-shape": (change_config(block_out_channels=[8, 8, 16]), "cannot be loaded"),
    "normalised": (change_config(latents_mean=[0.1] * 4), "normalises its latents"),
    "missing": (change_weights(lambda s: s.pop("decoder.conv_in.bias")), "lacks decoder.conv_in.bias"),
    "extra": (change_weights(lambda s: s.update(more=torch.zeros(1))), "has the unexpected more"),
    "nan": (
        change_weights(lambda s: s["decoder.conv_out.bias"].fill_(torch.nan)),
        "decoder.conv_out.bias holds",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_vae_is_refused_in_one_sentence(tmp_path, damage):
    small_kl().save_pretrained(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(InputError) as caught:
        load_vae(str(tmp_path), False, CPU, torch.float32)
    text = str(caught.value)
    assert message in text and str(tmp_path) in text and "\n" not in text


def test_kinds_are_not_mixed_up(tmp_path):
    for kind, (_, tiny) in KINDS.items():
        saved(tmp_path, kind)
        with pytest.raises(
            InputError, match="--vae needs AutoencoderKL" if tiny else "--tiny-vae needs Auto"
        ):
            load_vae(str(tmp_path / kind), not tiny, CPU, torch.float32)


def test_missing_vae_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no VAE .*nowhere; give a Hugging Face id or a folder"):
        load_vae(str(tmp_path / "nowhere"), False, CPU, torch.float32)


def test_latent_channels_must_fit_the_model(tmp_path):
    _, vae = saved(tmp_path, "kl")
    check_fits(vae, DiTConfig(in_channels=4))
    with pytest.raises(InputError, match="4 latent channels, the model samples 3"):
        check_fits(vae, DiTConfig(in_channels=3))


def changed(part, **settings):
    """A VAE of which one weight of a part is another."""
    vae = VAE(small_kl(**settings))
    with torch.no_grad():
        next(getattr(vae.module, part).parameters()).flatten()[0] += 1e-3
    return vae


@pytest.mark.parametrize("part", ["encoder", "quant_conv", "post_quant_conv", "decoder"])
def test_the_digests_are_of_the_weights(part) -> None:
    first, second = VAE(small_kl()), changed(part)
    decodes = part in ("post_quant_conv", "decoder")
    assert (first.digest() != second.digest()) == decodes
    assert (first.encoder_digest() != second.encoder_digest()) == (not decodes)


def test_the_encoders_digest_is_of_scaling_and_shift_too() -> None:
    settings = ({}, {"scaling_factor": 0.2}, {"shift_factor": 0.1})
    assert len({VAE(small_kl(**changes)).encoder_digest() for changes in settings}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_that_of_the_decoder_alone(tmp_path, kind):
    """As it was before there was an encoder, so that stored runs go on: names, dtypes and bytes in order."""
    _, alone = saved(tmp_path, kind)
    _, both = saved(tmp_path, kind, encoder=True)
    total = hashlib.sha256()
    for name, value in sorted(alone.module.state_dict().items()):
        total.update(f"{name} {value.dtype}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    assert total.hexdigest() == alone.digest() == both.digest()


def pictures(batch=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return (torch.rand(batch, 3, 24, 16, generator=generator) * 2 - 1).to(dtype)


@pytest.mark.parametrize("budget", [None, 1])
def test_latents_are_the_scaled_mean_of_diffusers_posterior(tmp_path, budget):
    module = small_kl(scaling_factor=0.5, shift_factor=0.4)
    module.save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path), False, CPU, torch.float32, budget, encoder=True)
    expected = (module.encode(pictures()).latent_dist.mean - 0.4) * 0.5
    found = vae.encode(pictures().requires_grad_())
    assert found.shape == (5, 4, 6, 4) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert vae.encode(pictures(0)).shape == (0, 4, 6, 4)


def test_latents_of_the_tiny_vae_are_its_encoders(tmp_path):
    module, vae = saved(tmp_path, "tiny", encoder=True)
    expected = module.encode(pictures()).latents
    torch.testing.assert_close(vae.encode(pictures()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("images", "parts"), [(1, 5), (2, 3), (4, 2), (5, 1), (0.5, 5)])
def test_encode_in_parts_is_encode_at_once(tmp_path, kind, images, parts):
    _, vae = saved(tmp_path, kind, encoder=True)
    expected = vae.encode(pictures())
    vae.budget = int(images * vae.bytes_per_encoded(6, 4))
    calls = []
    encode = vae.module.encode
    vae.module.encode = lambda x, **options: calls.append(len(x)) or encode(x, **options)
    torch.testing.assert_close(vae.encode(pictures()), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == parts and max(calls) - min(calls) <= 1


@pytest.mark.parametrize(("kind", "widest"), [("kl", 8 * 24 * 16 * 4), ("tiny", 8 * 24 * 16 * 4)])
def test_the_encoders_budget_counts_the_widest_activation(tmp_path, kind, widest):
    _, vae = saved(tmp_path, kind, encoder=True)
    sizes = []
    for part in vae.module.encoder.modules():
        part.register_forward_hook(lambda module, args, output: sizes.append(output.nbytes))
    vae.encode(pictures(1))
    assert max(sizes) == widest and vae.bytes_per_encoded(6, 4) == 4 * widest


def test_a_half_precision_encoder_gives_fp32_latents(tmp_path):
    module, vae = saved(tmp_path, "kl", torch.bfloat16, encoder=True)
    found = vae.encode(pictures())
    error = (found - module.encode(pictures()).latent_dist.mean * vae.scaling_factor).abs().max()
    assert found.dtype == torch.float32 and 0 < error < 0.05 * found.abs().max()


def test_encoding_without_the_encoder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"encoder=True\) keeps it"):
        saved(tmp_path, "kl")[1].encode(pictures())
