"""The settings of `distill`."""

from __future__ import annotations

from dataclasses import dataclass

from acs_fast.config.fields import (
    attention_option,
    check,
    check_discriminator,
    compile_option,
    discriminator_option,
    dtype_option,
    guidance_space_option,
    loader_option,
    option,
    require,
)


@dataclass(frozen=True)
class DistillConfig:
    """What `distill` does: model, method (equations 1 to 4 of docs/method.md), output; fields are flags."""

    preset: str = option("digits", "named set of defaults for the fields below")
    out: str = option("runs/digits", "output folder; an interrupted run there is continued")
    model: str = option(
        "digits",
        "DiT: the bundled 'digits', a Hugging Face id or folder in diffusers format, an official .pt, or our "
        ".safetensors",
    )
    vae: str | None = option(
        None,
        "VAE of a latent model: Hugging Face id or folder in diffusers format; default: the model folder's "
        "own, else stabilityai/sd-vae-ft-mse",
    )
    tiny_vae: str = option(
        "madebyollin/taesd", "AutoencoderTiny of --guidance-space pixel-tiny: id or folder"
    )
    real: str = option(
        "digits",
        "real images: the bundled 'digits', a folder train/<class>/*, val/<class>/*, or WebDataset shards",
    )
    loader: str = loader_option()
    cache: str | None = option(
        None,
        "latents of the real images, as `encode` makes them, for latent models whose objective needs real "
        "images; made there if absent; default: latents/ in the output folder",
    )
    classes: str | None = option(
        None,
        "class names or label numbers, comma-separated, a text file with one a line (ImageNet: wnids) or one "
        "of the lists imagewoof, imagenette, imagenet100, imagenet1k; "
        "default: all of the model's",
    )
    ipc: int = option(10, "images per class")
    num_curricula: int = option(5, "number of curricula the ipc images are split into")
    objective: str = option(
        "adversarial",
        "what the guidance ascends; learnability and density_ratio are trained on real images too",
        ("adversarial", "nonsaturating", "learnability", "density_ratio"),
    )
    omega: float = option(1.0, "weight of the real-image classifier in the learnability objective")
    repulsion: float = option(
        0.0, "weight of the repulsion from the nearest earlier sample of the class (IGD's diversity term)"
    )
    guidance_scale: float = option(
        0.15, "length of the guidance step in trust radii; 0 samples without guidance"
    )
    trust_radius: str = option("sigma", "unit of the guidance step", ("sigma", "eps"))
    guidance_window: tuple[float, float] = option((0.1, 0.7), "guide while t/T lies in this closed interval")
    guidance_space: str = guidance_space_option()
    jacobian: str = option("identity", "how d x0 / d x_t is taken", ("identity", "full"))
    cfg_scale: float = option(2.0, "classifier-free guidance scale; 1 is the conditional model")
    cfg_channels: int | None = option(
        None, "guide the first so many channels (3 for the official DiT); default all"
    )
    num_sampling_steps: int = option(50, "denoising steps after respacing")
    sampler: str = option("ddpm", "sampler", ("ddpm", "ddim"))
    eta: float = option(0.0, "DDIM noise level: 0 deterministic, 1 as much as DDPM")
    variance: str = option(
        "auto",
        "DDPM variance; auto: learned_range if the model has it",
        ("auto", "learned_range", "fixed_small"),
    )
    clip_denoised: bool | None = option(
        None, "clamp the predicted x0 to [-1, 1]; default: for pixel models, not for latent ones"
    )
    discriminator: str = discriminator_option()
    discriminator_init: str = option(
        "scratch", "start each discriminator anew or from the last one", ("scratch", "warm")
    )
    discriminator_steps: int = option(100, "training steps of each discriminator")
    discriminator_lr: float = option(3e-3, "AdamW learning rate of the discriminators")
    discriminator_batch_size: int = option(64, "images per training step of the discriminators")
    real_steps: int = option(2000, "training steps of the real-image classifier (learnability)")
    batch_size: int | None = option(
        None, "images sampled together; default: 66 on a GPU, 4 on a CPU, 100 for small models"
    )
    format: str = option(
        "png",
        "of the images: PNG, JPEG (quality 95) or lossless WebP files, or WebDataset tar shards of PNGs",
        ("png", "jpeg", "webp", "wds"),
    )
    keep_latents: bool = option(False, "keep samples/, what the images were decoded from")
    deterministic: bool = option(
        False,
        "train discriminators in one process alone: then the images hang on no number of processes",
    )
    log_json: bool = option(False, "write the log files as JSON, an event a line")
    seed: int = option(0, "seed of the run: noise is keyed by (seed, class, index, step)")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    backend: str = option(
        "auto", "kernels: auto (the fastest here), cuda, triton, reference (plain PyTorch) or op=backend,..."
    )
    dtype: str = dtype_option()
    attention: str = attention_option()
    compile: str = compile_option()

    @property
    def guided(self) -> bool:
        """Whether curricula after the first are steered by a discriminator."""
        return self.guidance_scale > 0 and self.num_curricula > 1

    def __post_init__(self) -> None:
        counts = (
            "num_curricula",
            "discriminator_steps",
            "discriminator_batch_size",
            "real_steps",
            "batch_size",
        )
        check(self, counts)
        check_discriminator(self.discriminator)
        low, high = self.guidance_window
        curricula, steps = self.num_curricula, self.num_sampling_steps
        require(
            self.ipc >= curricula,
            f"--ipc {self.ipc} is smaller than --num-curricula {curricula}; "
            "every curriculum needs an image of each class",
        )
        require(2 <= steps <= 1000, f"--num-sampling-steps is {steps}, it must be 2 to 1000")
        require(0 <= low <= high <= 1, f"--guidance-window {low} {high} is no interval inside 0 to 1")
        require(self.repulsion >= 0, f"--repulsion is {self.repulsion}, it must not be negative")
        require(
            self.guidance_scale >= 0, f"--guidance-scale is {self.guidance_scale}, it must not be negative"
        )
        require(0 <= self.eta <= 1, f"--eta is {self.eta}, it must be 0 to 1")
        require(
            self.discriminator_lr > 0, f"--discriminator-lr is {self.discriminator_lr}, it must be positive"
        )
