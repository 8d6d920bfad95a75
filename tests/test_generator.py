"""What a run samples with: every choice that `auto` leaves open, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from acs_fast import compiled, generator, networks, ops
from acs_fast.config import DistillConfig, InputError
from acs_fast.curriculum import distill
from acs_fast.engine import StepEngine
from acs_fast.generator import ImageGenerator
from acs_fast.images import Images
from acs_fast.models.checkpoint import save_checkpoint
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.networks import resolve_dtype
from acs_fast.record import keep_resolved, with_absolute_paths
from acs_fast.report import contact_sheet
from tests.runs import contents, stored
from tests.test_sampler import randomise

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = DiTConfig(8, 2, 4, hidden_size=512, depth=1, num_heads=8, num_classes=3)
SMALL = dataclasses.replace(LARGE, hidden_size=16, num_heads=2)


class Clock:
    """Time that passes `fp32` or `bf16` seconds in a linear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float):
        self.now, self.cost = 0.0, {torch.float32: fp32, torch.bfloat16: bf16}
        monkeypatch.setattr(networks.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.nn.functional, "linear", self.linear)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.now += self.cost[x.dtype]
        return x


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.9, "fp32"), (1.0, 1.8, "fp32")]
)
def test_on_a_cpu_bf16_must_win_its_measurement(monkeypatch, fp32, bf16, chosen) -> None:
    monkeypatch.setattr(networks, "has_bf16", lambda: True)
    Clock(monkeypatch, fp32, bf16)
    assert resolve_dtype("auto", CPU, LARGE) == networks.DTYPES[chosen]
    assert resolve_dtype("auto", CPU, SMALL) == torch.float32
    monkeypatch.setattr(networks, "has_bf16", lambda: False)
    assert resolve_dtype("auto", CPU, LARGE) == torch.float32


def test_a_named_dtype_is_taken_and_cuda_has_bf16() -> None:
    assert resolve_dtype("bf16", CPU, SMALL) == torch.bfloat16
    assert resolve_dtype("fp32", CUDA, LARGE) == torch.float32
    assert resolve_dtype("auto", CUDA, SMALL) == torch.bfloat16


def test_what_auto_chose_is_in_the_record_and_kept(tiny) -> None:
    out = distill(tiny(batch_size=None))
    config = json.loads((out / "config.json").read_text())["config"]
    resolved = {"dtype": "fp32", "attention": "flash", "compile": "off", "batch_size": 100}
    assert {name: config[name] for name in resolved} == resolved
    record = json.loads((out / "config.json").read_text())
    other = {"dtype": "bf16", "attention": "math", "compile": "on", "batch_size": 3}
    record["config"] |= other
    (out / "config.json").write_text(json.dumps(record))
    kept = keep_resolved(tiny(batch_size=None), out, CPU)
    assert {name: getattr(kept, name) for name in other} == other
    assert keep_resolved(tiny(dtype="fp32", batch_size=2), out, CPU).dtype == "fp32"  # what is named stays
    assert keep_resolved(tiny(dtype="fp32", batch_size=2), out, CPU).batch_size == 2
    assert keep_resolved(tiny(batch_size=None), out, CUDA) == tiny(
        batch_size=None
    )  # of another kind of device
    (out / "config.json").write_text("{")
    assert keep_resolved(tiny(batch_size=None), out, CPU) == tiny(batch_size=None)


def test_a_run_in_bf16_says_so_and_is_near_the_one_in_fp32(tiny, tmp_path: Path) -> None:
    settings = {"num_curricula": 1, "sampler": "ddim"}
    runs = [distill(tiny(dtype=dtype, out=str(tmp_path / dtype), **settings)) for dtype in ("fp32", "bf16")]
    assert json.loads((runs[1] / "config.json").read_text())["config"]["dtype"] == "bf16"
    from safetensors.torch import load_file

    one, two = (load_file(stored(run, 1))["samples"] for run in runs)
    assert one.dtype == two.dtype == torch.float32
    assert 0 < (one - two).abs().mean() < 0.05


def make(tmp_path: Path, shape: DiTConfig, **settings: object) -> ImageGenerator:
    """A generator of random weights saved as a file."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(randomise(DiT(shape), 0.1, seed=0), path, torch.float32)
    return ImageGenerator(DistillConfig(model=str(path), **settings), CPU)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_space": "pixel"}, "--guidance-space pixel: this model samples pixels"),
        ({"cfg_channels": 2}, "--cfg-channels is 2, this model has 1"),
        ({"variance": "learned_range"}, "--variance learned_range: this model has no variance channels"),
    ],
)
def test_what_a_pixel_model_cannot_do(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(tmp_path, dataclasses.replace(SMALL, in_channels=1, learn_sigma=False), **settings)


def test_batches_of_large_models_are_bounded(tmp_path: Path) -> None:
    pixels = {"in_channels": 1}
    assert make(tmp_path, dataclasses.replace(LARGE, **pixels)).config.batch_size == 4
    assert make(tmp_path, dataclasses.replace(SMALL, **pixels)).config.batch_size == 100
    assert make(tmp_path, dataclasses.replace(LARGE, **pixels), batch_size=7).config.batch_size == 7


def test_a_batch_beyond_the_memory_names_the_one_that_fits(tmp_path: Path, monkeypatch) -> None:
    made = make(tmp_path, dataclasses.replace(LARGE, in_channels=1), compile="off")
    one = generator.bytes_per_image(made.shape, made.dtype)
    table = generator.table_bytes(made.model, made.config.num_sampling_steps)  # of the one class
    monkeypatch.setattr(generator, "available_memory", lambda device: table + int(3.5 * one / 0.9))
    with pytest.raises(
        InputError, match=r"a batch of 4 images does not fit .* about 3 would: --batch-size 3"
    ):
        made.prepare(4, [0])
    made.prepare(3, [0])
    monkeypatch.setattr(generator, "available_memory", lambda device: one // 2)
    with pytest.raises(InputError, match="not even one image would"):
        made.prepare(3, [0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_ops_are_the_ops(tmp_path: Path) -> None:
    choice = ops.select("auto", CPU)
    tokens = torch.zeros(4, 16, 32)
    kept, note = compiled.compile_ops(choice, "on", tokens, 200)
    assert compiled.is_compiled(kept) and "compile: took" in note and "compiled is used" in note
    assert kept.sources["adaln"] == "reference, compiled" and kept.sources["to_uint8"] == "reference"
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 16, 32, generator=generator)
    table = torch.randn(3, 200, generator=generator)
    shift, scale, gate = (table[:, i * 32 : (i + 1) * 32] for i in range(3))
    rows = torch.tensor([2, 0, 1, 1])
    got = kept.gated_residual_adaln(x, y, gate, shift, scale, rows, eps=1e-6)
    expected = choice.gated_residual_adaln(x, y, gate, shift, scale, rows, eps=1e-6)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    got = kept.adaln(x, shift, scale, rows, eps=1e-6)
    torch.testing.assert_close(got, choice.adaln(x, shift, scale, rows, eps=1e-6), rtol=0, atol=1e-5)


def test_auto_takes_the_faster_ops_and_off_compiles_nothing(monkeypatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", lambda op, dynamic: op)
    choice, tokens = ops.select("auto", CPU), torch.zeros(4, 16, 32)
    for times, taken in (((1.0, 2.0), False), ((2.0, 1.0), True)):
        order = iter([*[times[0]] * compiled.REPEATS, *[times[1]] * compiled.REPEATS])
        monkeypatch.setattr(compiled, "_timed", lambda call, order=order: next(order))
        assert compiled.is_compiled(compiled.compile_ops(choice, "auto", tokens, 200)[0]) is taken
    assert compiled.compile_ops(choice, "off", tokens, 200) == (choice, "")


def test_compile_on_is_refused_where_it_cannot_be(monkeypatch) -> None:
    choice, tokens = ops.select("auto", CPU), torch.zeros(4, 16, 32)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile on: there is no C\+\+ compiler on PATH; use auto"):
        compiled.compile_ops(choice, "on", tokens, 200)
    assert compiled.compile_ops(choice, "auto", tokens, 200) == (choice, "")


def test_a_compiler_that_fails_leaves_the_ops_as_they_are(monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no header")

    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", lambda op, dynamic: fail)
    choice, tokens = ops.select("auto", CPU), torch.zeros(4, 16, 32)
    kept, note = compiled.compile_ops(choice, "auto", tokens, 200)
    assert kept is choice and "failed (RuntimeError)" in note
    with pytest.raises(InputError, match=r"torch\.compile failed"):
        compiled.compile_ops(choice, "on", tokens, 200)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_lost(tiny, monkeypatch) -> None:
    out = distill(tiny())
    before = contents(out)
    monkeypatch.setattr(generator, "available_memory", lambda device: 10_000)
    with pytest.raises(InputError, match="does not fit into the memory"):
        distill(tiny(seed=1), overwrite=True)
    assert contents(out) == before
    distill(tiny())  # nothing is to be sampled, so nothing is refused


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_memory_that_ends_on_the_way_is_one_sentence(tiny, monkeypatch, error) -> None:
    def walk(self: object, *inputs: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(StepEngine, "walk", walk)
    with pytest.raises(InputError, match=r"of 2 images does not fit .*--batch-size 1, in another --out"):
        distill(tiny())


def test_another_error_is_not_taken_for_the_memory(tiny, monkeypatch) -> None:
    def walk(self: object, *inputs: torch.Tensor) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(StepEngine, "walk", walk)
    with pytest.raises(RuntimeError, match="something else"):
        distill(tiny())


def test_a_run_begun_with_what_this_machine_lacks_says_so(tiny) -> None:
    out = distill(tiny())
    record = json.loads((out / "config.json").read_text())
    record["config"]["attention"] = "xformers"
    (out / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"was begun with --attention xformers .*, which does not go here"):
        distill(tiny())


def test_a_run_of_the_plain_sampler_is_continued_by_the_engine(tiny) -> None:
    out = distill(tiny(backend="reference"))
    assert json.loads((out / "config.json").read_text())["config"]["attention"] == "auto"
    stored(out, 3).unlink()
    distill(tiny())
    assert stored(out, 3).is_file()


def test_a_long_list_of_classes_is_no_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n1").mkdir()
    names = ",".join(f"n{number:08}" for number in range(100))
    for text in (names, "n1"):
        assert with_absolute_paths(DistillConfig(classes=text)).classes == text
    (tmp_path / "list.txt").write_text("n1")
    assert with_absolute_paths(DistillConfig(classes="list.txt")).classes == str(tmp_path / "list.txt")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_memory_that_is_asked_for_holds_the_buffers(tmp_path: Path, batch_size: int) -> None:
    made = make(tmp_path, dataclasses.replace(LARGE, in_channels=1), compile="off")
    made.prepare(batch_size, [0])
    held = vars(made.engine.denoiser).values()
    buffers = sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.shape[0] > 1)
    asked = batch_size * generator.bytes_per_image(made.shape, made.dtype)
    assert 0.4 * asked < buffers < asked + 200_000  # the rest is attention's and the libraries'


def test_the_record_says_which_attention_ran_and_what_refused(tiny) -> None:
    record = json.loads((distill(tiny()) / "config.json").read_text())
    assert record["attention"]["name"] == record["config"]["attention"] == "flash"
    assert record["attention"]["refusals"]["xformers"] and record["attention"]["seconds"] == {}


def test_the_sheet_of_many_images_is_small(tmp_path: Path, monkeypatch) -> None:
    images = Images(tmp_path)
    for index in range(3):
        images.write(("a", index), images.encode(torch.zeros(64, 64, 3, dtype=torch.uint8)))
    whole = Image.open(io.BytesIO(contact_sheet(images, ("a",), [range(3)])))
    monkeypatch.setattr("acs_fast.report.sheet.MAX_PIXELS", 3 * 20 * 20)
    small = Image.open(io.BytesIO(contact_sheet(images, ("a",), [range(3)])))
    assert whole.height - small.height == 64 - 20
