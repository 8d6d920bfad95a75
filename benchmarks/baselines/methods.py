"""The methods that `benchmarks.step_speed` puts side by side, each a trajectory, and their check."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast import sampler
from acs_fast.diffusion import step_coefficients
from acs_fast.environment import version
from acs_fast.generator import ImageGenerator
from acs_fast.models.dit import DiTConfig
from acs_fast.networks import Networks
from benchmarks.baselines import sampling, setting, timing, transformer
from benchmarks.baselines.setting import DTYPES, Batch

MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune-no-cudagraphs", "reduce-overhead")}
# of a denoiser's output, against fp32: what eager PyTorch must hold for its errors to be a yardstick
SANE = {"bf16": 5e-2, "fp32": 1e-3}
FLOOR = {"bf16": 2.0**-9, "fp32": 1e-5}  # an error that rounding in another order explains, whatever E's is


@dataclass(frozen=True)
class Scene:
    """A batch to be sampled: model, labels, steps."""

    model: DiTConfig
    batch_size: int
    steps: int
    device: torch.device
    compile: str = "auto"

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a sample."""
        return (self.model.in_channels, self.model.input_size, self.model.input_size)

    def batch(self) -> Batch:
        """The labels, on the device."""
        return setting.batch(self.model, self.batch_size, self.device)

    def config(self, dtype: str = "fp32") -> Any:
        """The run's settings."""
        return setting.run_config(self.steps, self.batch_size, self.device, dtype=dtype, compile=self.compile)

    def discriminator(self, dtype: str) -> nn.Module:
        """ConvNet-3 on latents; in bf16 where the engine's is, on CUDA."""
        network = setting.guidance(self.config(), *self.shape[:2], self.device).discriminator
        return network.to(DTYPES[dtype]) if self.device.type == "cuda" else network

    def probe(self) -> Tensor:
        """x [B, C, H, W] of the denoiser's check."""
        generator = torch.Generator().manual_seed(3)
        return torch.randn(self.batch_size, *self.shape, generator=generator).to(self.device)


@dataclass
class Method:
    """One way to sample the batch of a scene."""

    name: str
    dtype: str
    run: Callable[[], Tensor]  # the trajectory as it is timed
    keyed: Callable[[], Tensor]  # the same with the engine's noise: x [B, C, H, W]
    denoise: Callable[[Tensor, int], Tensor]  # (x, step) -> the denoiser's output for both branches
    about: dict[str, Any] = field(default_factory=dict)  # what else its row says


@dataclass(frozen=True)
class Errors:
    """Relative errors against fp32: of x at the end of the trajectory, of one call of the denoiser."""

    x: float
    denoiser: float


@dataclass(frozen=True)
class Truth:
    """The plain sampler in fp32 with our own DiT: x after the trajectory, one call of the denoiser."""

    scene: Scene
    x: Tensor
    denoised: Tensor

    def errors(self, method: Method) -> Errors:
        """Those of a method, which runs for it."""
        with torch.no_grad():
            denoised = method.denoise(self.scene.probe(), probe_step(self.scene)).float().clone()
            return Errors(
                timing.relative_error(method.keyed(), self.x), timing.relative_error(denoised, self.denoised)
            )


def probe_step(scene: Scene) -> int:
    """The step at which the denoiser is called for its check."""
    return scene.steps // 2


def truth(scene: Scene) -> Truth:
    """See `Truth`."""
    model, batch = setting.random_dit(scene.model, torch.float32, scene.device), scene.batch()
    config = scene.config()
    guidance = setting.guidance(config, *scene.shape[:2], scene.device)
    for x in sampler.denoise(model, batch.class_labels, batch.indices, config, guidance, batch.targets):
        last = x
    with torch.no_grad():
        denoised = denoise_both(lambda *arguments: model(*arguments), torch.float32, scene)(
            scene.probe(), probe_step(scene)
        )
    return Truth(scene, last, denoised)


def denoise_both(
    denoiser: transformer.Denoiser, dtype: torch.dtype, scene: Scene
) -> Callable[[Tensor, int], Tensor]:
    """(x, step) -> the denoiser's output for the conditional and the null branch."""
    labels = scene.batch().class_labels
    both = torch.cat((labels, torch.full_like(labels, scene.model.num_classes)))
    timesteps = [c.timestep for c in step_coefficients(scene.steps)]

    def call(x: Tensor, step: int) -> Tensor:
        return denoiser(torch.cat((x, x)).to(dtype), torch.full_like(both, timesteps[step]), both)

    return call


def engine_of(scene: Scene, dtype: str, steps: int) -> tuple[ImageGenerator, str]:
    """The engine with the choices of this machine, guided, its table for all classes; what compiling took."""
    model = setting.random_dit(scene.model, DTYPES[dtype], scene.device)
    config = dataclasses.replace(scene.config(dtype), num_sampling_steps=steps)
    made = ImageGenerator(config, scene.device, Networks(model, None, None))
    note = made.choose(scene.batch_size)
    made.prepare(scene.batch_size, setting.run_labels(scene.model))
    assert made.engine is not None
    made.engine.load(setting.guidance(config, *scene.shape[:2], scene.device))
    return made, note


def ours(scene: Scene, dtype: str) -> Method:
    """The engine over the ops that this machine chooses."""
    started = time.perf_counter()
    made, note = engine_of(scene, dtype, scene.steps)
    engine, kernel = made.engine, made.attention
    assert engine is not None and kernel is not None
    batch = setting.batch(scene.model, scene.batch_size, torch.device("cpu"))

    def run() -> Tensor:
        for x in engine.denoise(batch.class_labels, batch.indices, batch.targets):
            last = x
        return last

    run()  # compiles and captures what it will
    about = {
        "build_seconds": round(time.perf_counter() - started, 1),
        "attention": kernel.name,
        "ops": dict(made.ops.sources),
        "compile": note,
    }
    return Method("ours", dtype, run, run, lambda x, step: engine.denoiser(x, step, engine.rows), about)


def make_transformer(scene: Scene, dtype: str) -> tuple[nn.Module, str]:
    """diffusers' transformer and its version, or the same in plain PyTorch where diffusers is absent."""
    model = setting.random_dit(scene.model, DTYPES[dtype], scene.device)
    try:
        module = transformer.diffusers_transformer(model, DTYPES[dtype], scene.device)
        return module, f"diffusers {version('diffusers')}"
    except ImportError:
        return transformer.plain_transformer(model, DTYPES[dtype], scene.device), "plain PyTorch"


def eager(scene: Scene, dtype: str, module: nn.Module, source: str) -> Method:
    """Baseline E, `E-plain` where diffusers is absent."""
    name = "E" if source.startswith("diffusers") else "E-plain"
    return _sampled(scene, name, dtype, transformer.denoiser(module), {"transformer": source})


def _sampled(
    scene: Scene, name: str, dtype: str, denoiser: transformer.Denoiser, about: dict[str, Any]
) -> Method:
    trajectory = partial(
        _last, denoiser, scene.discriminator(dtype), scene.config(), scene.batch(), scene.shape,
        scene.model.num_classes, DTYPES[dtype],
    )  # fmt: skip
    return Method(
        name,
        dtype,
        partial(trajectory, sampling.torch_noise(scene.device)),
        partial(trajectory, sampling.keyed_noise(scene.batch(), scene.config().seed)),
        denoise_both(denoiser, DTYPES[dtype], scene),
        about,
    )


def _last(*arguments: Any) -> Tensor:
    *_, x = sampling.guided_steps(*arguments)
    return x


def compiled(
    scene: Scene, dtype: str, module: nn.Module, source: str, modes: tuple[str, ...]
) -> list[Method]:
    """Baseline C in every mode of torch.compile that works, compiled; `about` says how long that took."""
    torch.compiler.reset()  # else a later shape of the same function is one recompilation too many
    found: list[Method] = []
    for mode in modes:
        method = _sampled(scene, "C", dtype, transformer.compiled(module, mode), {"transformer": source})
        started = time.perf_counter()
        try:
            method.run()
        except Exception as failure:  # the compiler's exceptions are of many kinds
            print(f"C, {mode}: no figure, {type(failure).__name__}: {timing.first_line(failure)}", flush=True)
            continue
        method.about |= {"mode": mode, "compile_seconds": round(time.perf_counter() - started, 1)}
        found.append(method)
    return found


def relatives(scene: Scene) -> Method:
    """Baseline P: fp32, TF32 on CUDA, guidance through the decode of a VAE; ImportError without diffusers."""
    decode = setting.random_vae(torch.float32, scene.device)
    pixels = setting.VAE_FACTOR * scene.model.input_size
    discriminator = setting.guidance(scene.config(), 3, pixels, scene.device).discriminator
    module, source = make_transformer(scene, "fp32")
    method = _sampled(scene, "P", "fp32", transformer.denoiser(module), {"transformer": source})

    def run() -> Tensor:
        with tf32():
            return _last(
                transformer.denoiser(module), discriminator, scene.config(), scene.batch(), scene.shape,
                scene.model.num_classes, torch.float32, sampling.torch_noise(scene.device), decode,
            )  # fmt: skip

    method.run = run
    method.about |= {"tf32": scene.device.type == "cuda", "guidance": f"decode to {pixels} pixels, convnet-3"}
    return method


@contextmanager
def tf32() -> Iterator[None]:
    """fp32 products and convolutions by TF32, as the relatives' code sets it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
