"""Checkpoints of the DiT: our safetensors and official `.pt` files, good and bad."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acs_fast.config import InputError
from acs_fast.data import ASSETS, imagenet_classes
from acs_fast.models.checkpoint import (
    _infer_official_config,
    checkpoint_bytes,
    digest,
    load_checkpoint,
    save_checkpoint,
)
from acs_fast.models.dit import DiT, DiTConfig, official_config
from tests.dit_reference import SMALL, inputs, official_shapes, plain_forward, randomised

CONFIG = json.dumps(dataclasses.asdict(SMALL))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "small.safetensors"
    save_checkpoint(randomised(SMALL), path, torch.float32)
    return path


@pytest.fixture(scope="module")
def official_state():
    """A small state dict as an official `.pt` holds it: DiT-S widths, patch 8, two blocks."""
    generator = torch.Generator().manual_seed(3)
    shapes = official_shapes(depth=2, d=384, patch=8, num_classes=7)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_save_and_load_round_trip(checkpoint):
    model, loaded = randomised(SMALL), load_checkpoint(checkpoint)
    assert loaded.config == SMALL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(model(*inputs(SMALL, 2)), loaded(*inputs(SMALL, 2)))


def test_half_precision_checkpoint_loads_as_fp32(tmp_path):
    model = randomised(SMALL)
    save_checkpoint(model, tmp_path / "half.safetensors")
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * 4 * sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_checkpoint_loads_in_the_given_dtype(checkpoint, dtype):
    stored, loaded = load_checkpoint(checkpoint).state_dict(), load_checkpoint(checkpoint, dtype).state_dict()
    for name, value in stored.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value.to(dtype)), name


def test_constants_of_diffusers_are_kept(tmp_path):
    config = dataclasses.replace(SMALL, mlp_norm_eps=1e-3, downscale_freq_shift=1)
    model = randomised(config)
    save_checkpoint(model, tmp_path / "other.safetensors", torch.float32)
    loaded = load_checkpoint(tmp_path / "other.safetensors")
    assert loaded.config == config and loaded.blocks[1].norm2.eps == 1e-3
    output = model(*inputs(SMALL, 2))
    assert torch.equal(output, loaded(*inputs(SMALL, 2)))
    for change in ({"mlp_norm_eps": 1e-6}, {"downscale_freq_shift": 0}):
        other = randomised(dataclasses.replace(config, **change))
        assert not torch.allclose(output, other(*inputs(SMALL, 2)))


def test_digest_of_a_file_is_its_sha256(checkpoint, tmp_path):
    assert digest(checkpoint) == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"there is no checkpoint .*none\.pt"):
        digest(tmp_path / "none.pt")


def test_the_same_weights_are_the_same_bytes():
    model = randomised(SMALL)
    assert len({checkpoint_bytes(model) for _ in range(20)}) == 1


def test_bundled_checkpoint_loads():
    model = load_checkpoint(ASSETS / "digits-dit.safetensors")
    assert (model.config.in_channels, model.config.input_size, model.config.num_classes) == (1, 8, 10)
    assert model.config.classes == tuple("0123456789") and model.config.learn_sigma
    assert model(*inputs(model.config, 2)).isfinite().all()


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "none.safetensors"))):
        load_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "keep", [0, 5, 100, 0.5, 0.999], ids=["empty", "5-bytes", "100-bytes", "half", "most"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_checkpoint_is_refused(tmp_path, checkpoint, official_state, keep, suffix):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(official_state, path)
    else:
        path.write_bytes(checkpoint.read_bytes())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"config": "{"},
        {"config": "[]"},
        {"config": "{}"},
        {"config": CONFIG[:-1] + ', "x": 1}'},
    ],
    ids=["none", "foreign", "broken-json", "list", "empty", "unknown-field"],
)
def test_safetensors_without_our_metadata_is_refused(tmp_path, metadata):
    save_file(randomised(SMALL).state_dict(), tmp_path / "foreign.safetensors", metadata)
    with pytest.raises(InputError, match=r"foreign\.safetensors carries no usable DiT configuration"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_first_wrong_shape_is_named(tmp_path):
    state = randomised(SMALL).state_dict()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(95, 24)
    state["final_layer.linear.bias"] = torch.zeros(1)
    save_file(state, tmp_path / "wrong.safetensors", {"config": CONFIG})
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.weight has shape \[95, 24\].* \[96, 24\]"):
        load_checkpoint(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_tensors_are_named(tmp_path, change):
    state = randomised(SMALL).state_dict()
    if change == "missing":
        del state["blocks.1.attn.proj.bias"]
    else:
        state["blocks.1.attn.proj.gain"] = torch.zeros(1)
    save_file(state, tmp_path / "other.safetensors", {"config": CONFIG})
    name = "blocks.1.attn.proj." + ("bias" if change == "missing" else "gain")
    with pytest.raises(InputError, match=re.escape(name)):
        load_checkpoint(tmp_path / "other.safetensors")


def test_first_five_missing_and_unexpected_tensors_are_named(tmp_path):
    state = randomised(SMALL).state_dict()
    moved = [name for name in state if name.startswith("blocks.1.")]
    for name in moved:
        state[name.replace("blocks.1.", "blocks.2.")] = state.pop(name)
    save_file(state, tmp_path / "other.safetensors", {"config": CONFIG})
    with pytest.raises(InputError) as caught:
        load_checkpoint(tmp_path / "other.safetensors")
    unexpected = sorted(name.replace("blocks.1.", "blocks.2.") for name in moved)
    for kind, names in (("no ", moved), ("the unexpected ", unexpected)):
        assert f"it has {kind}{', '.join(names[:5])} and {len(moved) - 5} more" in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_first_tensor_with_a_bad_value_is_named(tmp_path, official_state, value, suffix):
    state = official_state if suffix == ".pt" else randomised(SMALL).state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["blocks.1.mlp.fc2.weight"][3, 2] = value
    state["final_layer.linear.bias"][0] = value
    path = tmp_path / f"bad{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path, {"config": CONFIG})
    with pytest.raises(
        InputError, match=r"bad\..*: blocks\.1\.mlp\.fc2\.weight holds NaN or infinite values"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("layout", ["plain", "ema", "old-format"])
def test_official_pt_loads_with_the_inferred_configuration(tmp_path, official_state, layout):
    other = {name: torch.zeros_like(value) for name, value in official_state.items()}
    stored = (
        {"model": other, "ema": official_state, "opt": {}, "args": None}
        if layout == "ema"
        else official_state
    )
    zipped = layout != "old-format"
    torch.save(stored, tmp_path / "official.pt", _use_new_zipfile_serialization=zipped)
    model = load_checkpoint(tmp_path / "official.pt")
    expected = DiTConfig(32, 8, in_channels=4, hidden_size=384, depth=2, num_heads=6, num_classes=7)
    assert model.config == expected
    for name, value in official_state.items():
        assert torch.equal(model.state_dict()[name], value), name
    x, timesteps, labels = inputs(expected, 1)
    plain = plain_forward(official_state, expected, x[0], 0, labels[0])
    torch.testing.assert_close(model(x, 0 * timesteps, labels)[0].double(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-L/4", "DiT-B/2", "DiT-S/8"])
@pytest.mark.parametrize("size", [32, 64], ids=["256px", "512px"])
def test_configuration_is_inferred_for_every_official_size(name, size):
    expected = official_config(name, size)
    shapes = official_shapes(expected.depth, expected.hidden_size, expected.patch_size, size=size)
    assert _infer_official_config(shapes) == expected


def test_official_imagenet_model_has_the_wnids(tmp_path):
    shapes = official_shapes(depth=1, d=384, patch=8)
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "imagenet.pt")
    assert load_checkpoint(tmp_path / "imagenet.pt").config.classes == imagenet_classes()


PEAK = """
import sys, torch
from pathlib import Path
from acs_fast.models.checkpoint import load_checkpoint

def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

load_checkpoint(Path(sys.argv[1]), torch.bfloat16)  # a small one, for what is imported and cached once
before = megabytes("VmRSS")
load_checkpoint(Path(sys.argv[2]), torch.bfloat16)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_loading_needs_little_more_than_the_weights(tmp_path, checkpoint, suffix):
    model = DiT(official_config("DiT-S/2"))
    path = tmp_path / f"large{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_checkpoint(model, path, torch.float32)
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(path)]
    root = Path(__file__).resolve().parent.parent
    peak = float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    weights = 2 * sum(p.numel() for p in model.parameters()) / 2**20
    assert 0.9 * weights < peak < weights + 80 < 3 * weights  # the file alone is twice the weights in bf16


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["bare", "inside"])
def test_pt_with_arbitrary_objects_is_refused_and_not_run(tmp_path, official_state, layout):
    trap = Trap(tmp_path / "sprung")
    torch.save(trap if layout == "bare" else {**official_state, "args": trap}, tmp_path / "trap.pt")
    with pytest.raises(InputError, match=r"trap\.pt cannot be read as plain weights"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


FOREIGN_PT = {
    "list": lambda state: list(state.values()),
    "tensor": lambda state: state["pos_embed"],
    "empty": lambda state: {},
    "other-model": lambda state: {"conv.weight": torch.zeros(1)},
    "no-labels": lambda state: {k: v for k, v in state.items() if not k.startswith("y_embedder")},
    "number-for-tensor": lambda state: {**state, "pos_embed": 3},
    "linear-patches": lambda state: {**state, "x_embedder.proj.weight": torch.zeros(384, 256)},
    "no-blocks": lambda state: {k: v for k, v in state.items() if not k.startswith("blocks.")},
    "ema-is-a-tensor": lambda state: {"ema": torch.zeros(3)},
    "number-beside-tensors": lambda state: {**state, "blocks.0.attn.qkv.bias": 3},
    "list-beside-tensors": lambda state: {**state, "extra": [1, 2]},
    "name-is-a-number": lambda state: {**state, 5: torch.zeros(1)},
    "ema-is-none": lambda state: {**state, "ema": None},
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("kind", FOREIGN_PT)
def test_foreign_pt_is_refused(tmp_path, official_state, kind):
    torch.save(FOREIGN_PT[kind](official_state), tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"foreign\.pt"):
        load_checkpoint(tmp_path / "foreign.pt")


@pytest.mark.parametrize(
    "fields",
    [{"patch_size": 0}, {"hidden_size": "24"}, {"depth": 2.5}, {"num_heads": 5}, {"classes": ["ant"]}],
    ids=["patch-0", "width-text", "half-a-block", "heads-do-not-divide", "class-names-missing"],
)
def test_impossible_configuration_is_refused(tmp_path, fields):
    config = json.dumps({**dataclasses.asdict(SMALL), **fields})
    save_file(randomised(SMALL).state_dict(), tmp_path / "odd.safetensors", {"config": config})
    with pytest.raises(InputError, match=r"odd\.safetensors"):
        load_checkpoint(tmp_path / "odd.safetensors")
