"""diffusers' `DiTPipeline` on the engine, with ACS guidance: the same call, the same output."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from acs_fast.attention import KERNELS
from acs_fast.backends import Backend, OnStep, get_backend
from acs_fast.config import DistillConfig, InputError
from acs_fast.diffusion import Schedule
from acs_fast.models.checkpoint import from_transformer
from acs_fast.models.vae import VAE, check_fits
from acs_fast.networks import DTYPES, LARGE, Networks, dtype_name
from acs_fast.parts import Discriminator
from acs_fast.plan import curriculum_ranges
from acs_fast.schedulers import clips, read_schedule

try:
    from diffusers import DiTPipeline
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        "accelerate and ACSPipeline need diffusers: pip install 'acs-fast[diffusers]'"
    ) from error

OBJECTIVES = ("adversarial", "nonsaturating")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
BATCH_SIZES, SMALL_BATCH_SIZE = {"cuda": 66, "cpu": 8}, 100  # images that are sampled together at most
NOISE_KEYS = 1 << 32  # of an image's own noise

Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


def accelerate(pipe: Any, *, backend: str = "fast", attention: str = "auto") -> ACSPipeline:
    """An `ACSPipeline` of a diffusers `DiTPipeline`'s transformer, VAE, scheduler and labels.

    backend: as `get_backend` takes it. attention: `auto` (the fastest at the engine's shape), `cudnn`,
    `flash`, `efficient`, `math` or `xformers`. The pipeline that is given stays as it is: weights are shared
    with it where their layout is the engine's and copied where it is not, the scheduler is a copy.
    Raises InputError for another pipeline, a transformer that is no DiT, a scheduler that cannot be served.
    """
    if not isinstance(pipe, DiTPipeline):
        raise InputError(f"accelerate takes a diffusers DiTPipeline, this is a {type(pipe).__name__}")
    get_backend(backend)
    if attention not in ("auto", *KERNELS):
        raise InputError(f"attention is {attention!r}, it must be auto, {', '.join(KERNELS)}")
    check_fits(VAE(pipe.vae), from_transformer(pipe.transformer).config)
    read_schedule(pipe.scheduler, 2)
    names: dict[int, list[str]] = {}
    for name, number in pipe.labels.items():
        names.setdefault(number, []).append(name)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    id2label = {number: ", ".join(found) for number, found in sorted(names.items())}
    made = ACSPipeline(pipe.transformer, pipe.vae, scheduler, id2label or None)
    made.backend_name, made.attention = backend, attention
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


class ACSPipeline(DiTPipeline):
    """`DiTPipeline` on the engine: the same arguments and output, and ACS guidance beside them.

    It is saved as a `DiTPipeline`, which diffusers loads without this package, and `from_pretrained` loads
    any of those; backend and attention are `accelerate`'s to choose. The engine is made by the first call and
    kept as long as batch size, steps, scales, scheduler, VAE and weights stay as they are and, with ACS, the
    number of classes and the discriminator's network; `release` gives it up. Weights that are written through
    `.data` are not seen: `release` then.

    Differences to diffusers: latents stay in fp32 beside a transformer in 16 bits; with a stochastic
    scheduler the noise of an image hangs on its own key, which `generator` draws after the latents, and not
    on its neighbours or on how a call is cut into batches; the null label is the one after the last class,
    which diffusers takes to be 1000.
    """

    backend_name = "fast"
    attention = "auto"
    transformer: Any
    vae: Any
    scheduler: Any

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[int, str] | None = None):
        super().__init__(transformer, vae, scheduler, id2label)
        if id2label is not None:
            self.register_to_config(id2label=id2label)
        self._backend: Backend | None = None
        self._prepared: tuple[Any, ...] = ()

    def to_json_string(self) -> str:
        """The configuration as `DiTPipeline` writes it."""
        settings = json.loads(super().to_json_string())
        return json.dumps({**settings, "_class_name": "DiTPipeline"}, indent=2, sort_keys=True) + "\n"

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        curricula: int = 1,
        discriminator: str | Discriminator | None = None,
        objective: str = "adversarial",
        adversarial_scale: float = 0.15,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Images of `class_labels`, as `DiTPipeline` makes them, or steered by ACS.

        guidance_scale: of classifier-free guidance; 1 and less sample the conditional model alone.
        generator: draws the latents as diffusers does, one for all images or one each.
        output_type: `pil`, `np`, `pt` or `latent`, the scaled latents.

        curricula: the images of each class are sampled in so many parts; before each but the first a
        discriminator is trained on what exists. discriminator: its network's name (default `convnet-3`); or a
        fitted `Discriminator`, which steers every image of the call. adversarial_scale: length of a push in
        trust radii; 0 pushes nothing. objective: `adversarial` or `nonsaturating`; METHOD's (3) and (4).
        callback_on_step_end: called with (pipe, step, timestep, {"latents": x}) after each step of each
        batch; the latents of the dict that it returns replace x.

        Returns an `ImagePipelineOutput`, or a tuple of the images alone. Raises InputError for labels out of
        range, for a discriminator of another latent shape, and for what cannot be served.
        """
        labels = self._labels(class_labels)
        output_type = output_type or "np"
        numbers = {"guidance_scale": guidance_scale, "adversarial_scale": adversarial_scale}
        self._check(output_type, objective, numbers, callback_on_step_end_tensor_inputs)
        fitted = _fitted(discriminator, curricula)
        parts = _curricula(labels, curricula)
        settings: dict[str, Any] = {"cfg_scale": max(1.0, float(guidance_scale))}
        classes = list(dict.fromkeys(labels)) if fitted is None else list(fitted.class_labels)
        steered = adversarial_scale > 0 and (curricula > 1 or fitted is not None)
        if steered and len(classes) < 2:
            raise InputError(
                f"all images are of class {classes[0]}, and a discriminator tells classes apart; give two "
                "classes or more, or curricula=1"
            )
        if steered:
            name = fitted.settings["network"] if fitted is not None else discriminator or "convnet-3"
            scale = float(adversarial_scale)
            settings |= {"objective": objective, "guidance_scale": scale, "discriminator": name}
        targets = self._targets(labels, fitted)
        network = None if fitted is None or not adversarial_scale else fitted.network
        schedule = read_schedule(self.scheduler, num_inference_steps)
        latents, keys = self._draw(len(labels), generator, any(u.noise for u in schedule.updates))
        class_labels_, samples = torch.tensor(labels), torch.empty_like(latents)
        self.scheduler.set_timesteps(num_inference_steps)  # as diffusers leaves it
        batch_size = self._batch_size(max(map(len, parts)))
        if not steered:  # then a batch of the same size may be of any classes
            others = (k for k in range(self.transformer.config.num_embeds_ada_norm) if k not in classes)
            classes = [*classes, *islice(others, max(0, batch_size - len(classes)))]
            classes = classes[: max(batch_size, 1)]
        walks = callback_on_step_end is not None or latents.device.type != "cuda"
        total = sum(-(-len(rows) // batch_size) for rows in parts) * num_inference_steps
        with _on(latents.device), self.progress_bar(total=total if walks else len(parts)) as progress:
            backend = self._prepare(settings, classes, batch_size, schedule)
            for number, rows in enumerate(parts):
                if number and adversarial_scale:
                    done = torch.cat(parts[:number])
                    network = backend.fit(samples[done], targets[done], seed=number)
                samples[rows] = backend.sample(
                    class_labels_[rows], keys[rows], network, targets=targets[rows], latents=latents[rows],
                    on_step=self._on_step(callback_on_step_end, progress) if walks else None,
                )  # fmt: skip
                progress.update(0 if walks else 1)
            images = samples if output_type == "latent" else self._decode(backend, samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def release(self) -> None:
        """Give up the engine and its memory; the next call makes it anew, of the weights as they are then."""
        self._backend, self._prepared = None, ()

    def to(self, *args: Any, **keywords: Any) -> Any:
        """As diffusers' `to`; the engine does not stay behind."""
        self.release()
        return super().to(*args, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which makes an engine of its own."""
        return {**self.__dict__, "_backend": None, "_prepared": ()}

    def _labels(self, class_labels: Any) -> list[int]:
        """The labels as numbers; InputError for what is none of the model's."""
        known = self.transformer.config.num_embeds_ada_norm
        accepted = f"this model's are 0 to {known - 1}; get_label_ids has those of names"
        try:
            labels = [operator.index(label) for label in class_labels]
        except TypeError as error:
            raise InputError(
                f"class_labels is {class_labels!r}, a list of numbers is needed: {accepted}"
            ) from error
        wrong = [label for label in labels if not 0 <= label < known]
        if wrong or not labels:
            raise InputError(f"{f'class label {wrong[0]}' if wrong else 'class_labels is empty'}: {accepted}")
        return labels

    def _check(
        self, output_type: str, objective: str, numbers: dict[str, float], inputs: Sequence[str]
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {output_type!r}, it must be one of {', '.join(OUTPUT_TYPES)}")
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}, it must be a finite number, 0 or more")
        if objective not in OBJECTIVES:
            raise InputError(
                f"objective is {objective!r}, a pipeline takes {' or '.join(OBJECTIVES)}; those that need "
                "real images are `distill`'s"
            )
        if unknown := [name for name in inputs if name != "latents"]:
            raise InputError(f"callback_on_step_end_tensor_inputs holds {unknown[0]!r}; there is 'latents'")

    def _draw(self, count: int, generator: Any, noisy: bool) -> tuple[Tensor, Tensor]:
        """Latents [n, C, H, W] as diffusers draws them, then each image's key, int64 [n] on the CPU.

        No key is drawn where no step has noise: a generator is left as diffusers leaves it.
        """
        if isinstance(generator, list) and len(generator) not in (1, count):
            raise InputError(
                f"there are {len(generator)} generators for {count} images; give one, or one each"
            )
        config, device = self.transformer.config, self._execution_device
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        if not noisy:
            return latents.float(), torch.zeros(count, dtype=torch.long)
        generators = generator if isinstance(generator, list) else [generator]
        generators = generators * (count // len(generators))
        keys = [
            torch.randint(NOISE_KEYS, (), generator=g, device=device if g is None else g.device)
            for g in generators
        ]
        return latents.float(), torch.stack(keys).cpu()

    def _batch_size(self, images: int) -> int:
        """How many of a curriculum's images are sampled together: equal batches, as large as is sensible."""
        config = self.transformer.config
        large = config.num_attention_heads * config.attention_head_dim >= LARGE
        most = BATCH_SIZES.get(self._execution_device.type, BATCH_SIZES["cpu"]) if large else SMALL_BATCH_SIZE
        return -(-images // -(-images // most))

    def _prepare(
        self, settings: dict[str, Any], classes: list[int], batch_size: int, schedule: Schedule
    ) -> Backend:
        """The backend, ready for such batches; made anew where anything that it hangs on has changed.

        Of the classes it hangs on their number alone: `sample` is always told the targets.
        """
        transformer = self.transformer
        if transformer.dtype not in DTYPES.values():
            raise InputError(f"the transformer is in {transformer.dtype}; it must be in {', '.join(DTYPES)}")
        if hasattr(transformer, "_hf_hook"):
            raise InputError("the transformer is offloaded to the host; move the pipeline with .to('cuda')")
        weights = tuple((p.data_ptr(), p._version) for p in transformer.parameters())
        chosen = self.backend_name, self.attention
        key = (schedule, settings, len(classes), batch_size, chosen, weights, self._vae_key())
        if self._backend is None or self._prepared != key:
            self._backend = None  # its memory first
            model, backend = from_transformer(transformer), get_backend(self.backend_name)
            config = dataclasses.replace(
                DistillConfig(),
                ipc=1, num_curricula=1, device=self._execution_device.type, attention=self.attention,
                dtype=dtype_name(transformer.dtype), clip_denoised=clips(self.scheduler), **settings,
            )  # fmt: skip
            networks = Networks(model, VAE(self.vae), None)
            backend.prepare(config, networks, class_labels=classes, batch_size=batch_size, schedule=schedule)
            self._backend, self._prepared = backend, key
        return self._backend

    def _vae_key(self) -> tuple[Any, ...]:
        return id(self.vae), self.vae.dtype, self.vae.device

    def _targets(self, labels: list[int], fitted: Discriminator | None) -> Tensor:
        if fitted is None:
            places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
            return torch.tensor([places[label] for label in labels])
        config = self.transformer.config
        fitted.check_shape((len(labels), config.in_channels, config.sample_size, config.sample_size))
        return fitted.targets(torch.tensor(labels)).cpu()

    def _on_step(self, callback: Callback | None, progress: Any) -> OnStep:
        def on_step(step: int, timestep: int, x: Tensor) -> None:
            progress.update()
            if callback is None:
                return
            handed = x.clone()  # x is overwritten by the next step, and a callback may keep what it sees
            latents = (callback(self, step, timestep, {"latents": handed}) or {}).get("latents", handed)
            if latents.shape != x.shape:
                shapes = f"{tuple(latents.shape)}, it was given {tuple(x.shape)}"
                raise InputError(f"callback_on_step_end returned latents of the shape {shapes}")
            x.copy_(latents)

        return on_step

    def _decode(self, backend: Backend, samples: Tensor, output_type: str | None) -> Any:
        images = (backend.decode(samples) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        pixels = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels


# `from_pretrained` reads the types of its parameters, in older releases of diffusers not from strings
functools.update_wrapper(ACSPipeline.__init__, DiTPipeline.__init__)


def _fitted(discriminator: Any, curricula: int) -> Discriminator | None:
    """The discriminator of the whole call, if it is one; InputError for what cannot steer it."""
    if not isinstance(curricula, int) or isinstance(curricula, bool):
        raise InputError(f"curricula is {curricula!r}, it must be a whole number")
    if isinstance(discriminator, Discriminator):
        if curricula > 1:
            raise InputError("curricula train their discriminators: give a network's name, or curricula=1")
        return discriminator
    if discriminator is not None and not isinstance(discriminator, str):
        kind = type(discriminator).__name__
        raise InputError(
            f"discriminator is a {kind}; give a network's name or a fitted acs_fast.Discriminator"
        )
    if discriminator is not None and curricula == 1:
        raise InputError(
            f"discriminator={discriminator!r} is trained between curricula, and there is one; give "
            "curricula=2 or more, or a fitted Discriminator"
        )
    return None


def _on(device: torch.device) -> Any:
    """Makes a GPU the current one, which is where the engine captures."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _curricula(labels: Sequence[int], curricula: int) -> list[Tensor]:
    """The rows of each curriculum, int64: equal parts of every class, in the order of the labels."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    fewest = min(rows, key=lambda label: len(rows[label]))
    if not 1 <= curricula <= len(rows[fewest]):
        raise InputError(
            f"curricula is {curricula}, and class {fewest} has {len(rows[fewest])} images; every curriculum "
            "needs one of each class"
        )
    ranges = [(found, curriculum_ranges(len(found), curricula)) for found in rows.values()]
    return [
        torch.tensor(sorted(found[place] for found, parts in ranges for place in parts[number]))
        for number in range(curricula)
    ]
