"""The settings of the other commands."""

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

BASELINES = ("random", "herding", "k-centre", "plain", "repulsion")
PROTOCOLS = ("hard-sgd", "hard-adamw", "soft")


@dataclass(frozen=True)
class EvaluateConfig:
    """How to judge a distilled set: fresh classifiers trained on it alone, tested on real held-out images."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    path: str = option("runs/digits", "run folder or image folder <class>/*.png", cli=False)
    real: str | None = option(None, "real images: 'digits' or a folder; default: those of the run")
    classes: str | None = option(
        None, "for an image folder: its class folders in label order, comma-separated, a text file or a list"
    )
    protocol: tuple[str, ...] = option(
        (),
        "comma-separated: hard-sgd, hard-adamw, soft; default hard-sgd, for runs on the digits hard-adamw",
    )
    network: tuple[str, ...] = option(
        (),
        "comma-separated: convnet-<depth>, resnet-18, resnetap-10, or torchvision's resnet18, resnet50, "
        "resnet101; default: convnet of the size's depth, resnet18 for soft",
    )
    image_size: int | None = option(
        None, "edge in px that images are resized and cropped to; default: the set's own, at most 224"
    )
    ipc: int | None = option(None, "use the first so many images of each class; default all")
    repeats: int = option(3, "classifiers trained, with seeds seed, seed + 1, ...")
    epochs: int | None = option(None, "training epochs; default: the protocol's, by ipc")
    baselines: tuple[str, ...] = option(
        (),
        "comma-separated: random, herding, k-centre (real images); plain, repulsion (sampling without ACS)",
    )
    redundancy: bool = option(False, "accuracy across and after curricula, coverage of the real images")
    features: str = option(
        "reference",
        "where coresets are chosen and coverage is measured: reference (a convnet trained on the real "
        "images), one of ours, timm:<model> or torchvision:<model>",
    )
    teacher: str | None = option(
        None,
        "for soft: a state dict of torchvision's resnet18, for ImageNet's or the set's classes; default: one "
        "trained here",
    )
    stored_soft_labels: str | None = option(
        None, "for soft: folder that keeps the teacher's labels with their crops, to be used again"
    )
    dtype: str = option(
        "auto",
        "of convolutions and linears; auto: bf16 from 64 px on, on a CPU that multiplies it, else fp32",
        ("auto", "bf16", "fp32"),
    )
    seed: int = option(0, "seed of the first repeat")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check(self, ("ipc", "repeats", "epochs", "image_size"))
        for what in ("baselines", "protocol", "network"):
            names = getattr(self, what)
            require(not isinstance(names, str), f"{what} is {names!r}, it must be a tuple: ({names!r},)")
        for known, chosen, what in (
            (BASELINES, self.baselines, "baseline"),
            (PROTOCOLS, self.protocol, "protocol"),
        ):
            for name in chosen:
                require(name in known, f"there is no {what} {name!r}; use {', '.join(known)}")
        for what in ("baselines", "protocol", "network"):
            chosen = getattr(self, what)
            require(len(set(chosen)) == len(chosen), f"--{what} {','.join(chosen)} names one twice")


@dataclass(frozen=True)
class EncodeConfig:
    """What `encode` puts through which VAE: the latent cache of a set of real images."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    out: str = option("runs/latents", "the cache's folder; an interrupted one is continued")
    real: str = option("", "real images: a folder train/<class>/* or <class>/*, or WebDataset shards")
    model: str = option("facebook/DiT-XL-2-256", "the latent DiT that they are for, as distill takes it")
    vae: str | None = option(None, "its VAE, as distill takes it")
    classes: str | None = option(
        None, "class names or label numbers, comma-separated or a text file; default: all of the model's"
    )
    loader: str = loader_option()
    batch_size: int = option(16, "images encoded together")
    dtype: str = option(
        "auto", "the VAE's on a GPU: that of distill's --dtype; auto: bf16", ("auto", "bf16", "fp32")
    )
    rank: int = option(0, "this process's number, where several share the work")
    num_ranks: int = option(1, "how many processes share the work")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check(self, ("batch_size", "num_ranks"))
        require(
            0 <= self.rank < self.num_ranks,
            f"--rank is {self.rank}, it must be 0 to --num-ranks - 1, {self.num_ranks - 1}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How a DiT is trained: epsilon prediction with learned-range variance (the hybrid loss of IDDPM)."""

    preset: str = option("digits", "named set of defaults for the fields below")
    out: str = option("runs/dit", "output folder for model.safetensors and train.json")
    real: str = option("digits", "training images: the bundled 'digits' or a folder train/<class>/*")
    hidden_size: int = option(128, "width of the transformer")
    depth: int = option(5, "number of blocks")
    num_heads: int = option(4, "attention heads")
    patch_size: int = option(2, "patch edge in pixels")
    iterations: int = option(13000, "training steps")
    batch_size: int = option(64, "images per step")
    lr: float = option(1e-3, "peak AdamW learning rate, cosine to zero after a short warm-up")
    weight_decay: float = option(0.01, "AdamW weight decay")
    class_dropout_prob: float = option(0.1, "probability of the null label, for classifier-free guidance")
    ema_decay: float = option(0.999, "decay of the exponential moving average that is saved")
    seed: int = option(0, "seed of weights, batches and noise")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check(self, ("hidden_size", "depth", "num_heads", "patch_size", "iterations", "batch_size"))
        dropped = self.class_dropout_prob
        require(self.lr > 0, f"--lr is {self.lr}, it must be positive")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}, it must not be negative")
        require(0 <= dropped < 1, f"--class-dropout-prob is {dropped}, it must be 0 or more and below 1")
        require(0 <= self.ema_decay < 1, f"--ema-decay is {self.ema_decay}, it must be 0 or more and below 1")


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` times, of which model, where. Settings of sampling are those of `distill`."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    what: str = option("step", "what is timed", ("step", "trajectory", "discriminator"), cli=False)
    model: str = option(
        "dit-xl-2",
        "a size, with random weights (dit-xl-2, dit-l-4, dit-s-8, ...), or a checkpoint as distill takes it",
    )
    batch_size: int | None = option(
        None,
        "images sampled together, or of a discriminator's training step; default: distill's on this device",
    )
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    backend: str = option("auto", "kernels: auto (the fastest here), cuda, triton or op=backend,...")
    dtype: str = dtype_option()
    attention: str = attention_option()
    compile: str = compile_option()
    guidance_space: str = guidance_space_option()
    discriminator: str = discriminator_option()
    num_classes: int = option(
        10, "classes of the batch, which the discriminator tells apart; at most the model's"
    )
    num_sampling_steps: int = option(50, "denoising steps of a trajectory")
    repeats: int = option(5, "timed rounds")

    def __post_init__(self) -> None:
        check(self, ("batch_size", "repeats"))
        check_discriminator(self.discriminator)
        require(self.num_classes >= 2, f"--num-classes is {self.num_classes}, it must be at least 2")
