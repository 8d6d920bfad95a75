"""What a run computes, keeps in memory and writes: numbers that follow from its configuration alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import torch

from acs_fast.config import DistillConfig
from acs_fast.diffusion import NUM_TRAIN_TIMESTEPS, step_coefficients
from acs_fast.engine import table_bytes, table_slots
from acs_fast.estimate.flop import (
    Cost,
    classifier_cost,
    decoder_flops,
    denoiser_flops,
    denoiser_parameters,
    full_jacobian_flops,
)
from acs_fast.generator import GRADIENT_FACTOR, ImageGenerator
from acs_fast.images import IMAGES, Images
from acs_fast.models.vae import VAE
from acs_fast.plan import Layout, available_memory, bytes_per_image
from acs_fast.shards import read_members

FP32 = 4
# bytes of a file beside its pixels, by the digits, and per pixel and channel: of 150 photographs at 256 px
# (PNG 1.54, JPEG 0.47, WebP 1.01 bytes a pixel)
IMAGE_BYTES = {"png": (80, 0.51), "jpeg": (380, 0.155), "webp": (60, 0.34), "wds": (80, 0.51)}
TAR_BYTES = 1792  # of an image in a shard: its header and what fills its last block, and its label's
BLOCK = 4096  # bytes: a file takes whole blocks of most disks
ROW_BYTES = 300  # of a manifest's line
LOOKED_AT = 200  # files whose size is taken for that of all
TRAINED_COPIES = 4  # of a network in training: weights, gradients and AdamW's two moments
BACKWARD = 1.5  # of what is kept for it: the widest layer's gradients lie beside
PROCESS_BYTES = {"cpu": 400 << 20, "cuda": 600 << 20}  # PyTorch itself: libraries, on a GPU its context


@dataclass(frozen=True)
class Work:
    """What is still to be computed. `rank_`: of the rank that has most; the others count all ranks."""

    images: int
    guided_images: int
    steps: int
    guided_steps: int  # of a guided image's steps, those in the window
    calls: int  # of the denoiser, a batch each
    rank_images: int
    rank_batches: int
    rank_guided_batches: int
    training_steps: int  # of all discriminators that are to be trained
    training_images: int
    denoiser_flop: int
    guidance_flop: int
    decode_flop: int
    training_flop: int

    @property
    def flop(self) -> int:
        """Of everything."""
        return self.denoiser_flop + self.guidance_flop + self.decode_flop + self.training_flop


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank on its device, where all parts are counted as if none gave anything back.

    host: beside a GPU, images that a pixel-space discriminator is trained on, in the machine's memory.
    """

    process: int
    weights: int
    engine: int
    table: int
    decode: int
    guidance: int
    discriminator: int
    latents: int  # of all earlier curricula, at the last one
    host: int

    @property
    def device(self) -> int:
        """Of all parts on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class Disk:
    """Bytes in the run folder: of the whole run, and those that are still to be written."""

    images: int
    latents: int
    discriminators: int
    manifest: int
    missing: int
    image: float  # of one, as the disk counts it
    measured: int  # images that this was measured on; 0: it is assumed

    @property
    def most(self) -> int:
        """While the run goes on."""
        return self.images + self.latents + self.discriminators + self.manifest


def guided_steps(config: DistillConfig) -> int:
    """The respaced steps whose t/T lies in the guided window."""
    low, high = config.guidance_window
    timesteps = (c.timestep / NUM_TRAIN_TIMESTEPS for c in step_coefficients(config.num_sampling_steps))
    return sum(low <= t <= high for t in timesteps)


def shares(count: int, num_ranks: int) -> list[int]:
    """`count` images in equal parts for the ranks, the largest first."""
    return [count // num_ranks + (rank < count % num_ranks) for rank in range(num_ranks)]


def count_work(
    generator: ImageGenerator,
    layout: Layout,
    *,
    bucket: int,
    num_ranks: int,
    missing: Mapping[int, int],
    trained: int,
    trains_real: bool,
) -> Work:
    """The work that is left; arguments as `make_plan` has them."""
    config, shape = generator.config, generator.shape
    guided = config.guided
    batches = {
        curriculum: [-(-share // bucket) for share in shares(count, num_ranks)]
        for curriculum, count in missing.items()
    }
    images = sum(missing.values())
    guided_images = sum(count for curriculum, count in missing.items() if guided and curriculum > 1)
    window = guided_steps(config)
    guidance_flop = _guidance_flop(generator, layout.num_classes) if guided_images else 0
    decode_flop = 0 if generator.vae is None or not images else decoder_flops(generator.vae, shape.input_size)
    steps, seen = training(config, layout, trained, trains_real)
    return Work(
        images=images,
        guided_images=guided_images,
        steps=config.num_sampling_steps,
        guided_steps=window if guided else 0,
        calls=sum(map(sum, batches.values())) * config.num_sampling_steps,
        rank_images=sum(shares(count, num_ranks)[0] for count in missing.values()),
        rank_batches=sum(parts[0] for parts in batches.values()),
        rank_guided_batches=sum(parts[0] for c, parts in batches.items() if guided and c > 1),
        training_steps=steps,
        training_images=seen,
        denoiser_flop=images * config.num_sampling_steps * denoiser_flops(shape, config.cfg_scale),
        guidance_flop=guided_images * window * guidance_flop,
        decode_flop=images * decode_flop,
        training_flop=seen * seen_cost(generator, layout.num_classes).training if seen else 0,
    )


def training(config: DistillConfig, layout: Layout, trained: int, trains_real: bool) -> tuple[int, int]:
    """(steps, images in their batches) of the last `trained` discriminators and, if it is to be, f_real.

    A set smaller than a batch is a batch; for the density ratio half of one is real.
    """
    size, steps = config.discriminator_batch_size, config.discriminator_steps
    real = size - size // 2 if config.objective == "density_ratio" else 0
    last = len(layout.ranges)
    sampled = [min(size - real or 1, layout.start(i)) for i in range(last - trained + 1, last + 1)]
    images = steps * sum(count + real for count in sampled)
    f_real = config.real_steps if trains_real else 0
    return steps * trained + f_real, images + f_real * size


def seen_cost(generator: ImageGenerator, num_classes: int) -> Cost:
    """Of a discriminator of the run."""
    channels, size = generator.seen_shape()
    return classifier_cost(generator.config.discriminator, channels, num_classes, size)


def _guidance_flop(generator: ImageGenerator, num_classes: int) -> int:
    """Of an image's guided step, beyond the unguided one."""
    config, shape = generator.config, generator.shape
    networks = 2 if config.objective == "learnability" else 1
    flop = networks * seen_cost(generator, num_classes).to_input
    if generator.seen_by is not None:
        flop += decoder_flops(generator.seen_by, shape.input_size, gradient=True)
    if config.jacobian == "full":
        flop += full_jacobian_flops(shape) - denoiser_flops(shape, config.cfg_scale)
    return flop


def count_memory(generator: ImageGenerator, layout: Layout, *, bucket: int, num_ranks: int) -> Memory:
    """What a rank needs at the last curriculum, where it needs most."""
    config, shape, size = generator.config, generator.shape, generator.shape.input_size
    numel = shape.in_channels * size**2
    plain, guided = config.backend == "reference", config.guided
    steps = config.num_sampling_steps
    slots = table_slots(generator.model, steps, bucket, layout.num_classes) + 1
    vaes = {id(vae): vae for vae in (generator.vae, generator.seen_by) if vae is not None}
    weights = denoiser_parameters(shape) * generator.dtype.itemsize
    weights += sum(v.nbytes for vae in vaes.values() for v in vae.module.state_dict().values())
    earlier = layout.start(len(layout.ranges)) if guided else 0
    trained_on = earlier * numel * FP32
    repelling = trained_on if config.repulsion else 0
    host = guidance = discriminator = 0
    if guided:
        cost, networks = seen_cost(generator, layout.num_classes), 1 + (config.objective == "learnability")
        batch = config.discriminator_batch_size
        batch = batch if config.deterministic else -(-batch // num_ranks)
        discriminator = (TRAINED_COPIES + networks) * FP32 * cost.parameters + round(
            BACKWARD * batch * cost.saved
        )
        guidance = round(BACKWARD * networks * _guided_together(generator, bucket) * cost.saved)
    if guided and generator.seen_by is not None:
        guidance += _guided_together(generator, bucket) * _gradient_bytes(generator.seen_by, size)
        channels, edge = generator.seen_shape()
        trained_on, host = 0, earlier * channels * edge**2 * FP32
    if generator.device.type == "cpu":
        trained_on, host = trained_on + host, 0
    return Memory(
        process=PROCESS_BYTES[generator.device.type],
        weights=weights,
        engine=bucket * bytes_per_image(shape, generator.dtype, config.jacobian if guided else "identity"),
        table=0 if plain else slots * table_bytes(generator.model, steps),
        decode=0 if generator.vae is None else _decode_bytes(generator.vae, size, bucket),
        guidance=guidance,
        discriminator=discriminator,
        latents=trained_on + repelling,
        host=host,
    )


def _guided_together(generator: ImageGenerator, bucket: int) -> int:
    """Images whose gradient is taken at a time."""
    if generator.seen_by is None:
        return bucket
    each = _gradient_bytes(generator.seen_by, generator.shape.input_size)
    return min(bucket, max(1, generator.seen_by.budget // each))


def _gradient_bytes(vae: VAE, size: int) -> int:
    """Of one sample's decode with its gradient."""
    return GRADIENT_FACTOR * vae.bytes_per_image(size, size)


def _decode_bytes(vae: VAE, size: int, bucket: int) -> int:
    """Of a batch's decode: its activations, within their budget; the images and their bytes."""
    each, values = vae.bytes_per_image(size, size), vae.out_channels * (vae.factor * size) ** 2
    return max(each, min(bucket * each, vae.budget)) + bucket * values * (vae.dtype.itemsize + 1)


def count_disk(
    generator: ImageGenerator,
    layout: Layout,
    *,
    missing: Mapping[int, int],
    trained: int,
    trains_real: bool,
    out: Path,
) -> Disk:
    """What the run folder holds; an image is as large as those that lie there, or as `IMAGE_BYTES` says."""
    config, shape = generator.config, generator.shape
    channels, edge = shape.in_channels, shape.input_size
    if generator.vae is not None:
        channels, edge = generator.vae.out_channels, generator.vae.factor * edge
    left = sum(missing.values())
    image, measured = image_bytes(out, config.format, channels * edge**2)
    latent = shape.in_channels * shape.input_size**2 * FP32
    network, networks, last = 0, 0, len(layout.ranges)
    if config.guided:
        network = seen_cost(generator, layout.num_classes).parameters * FP32
        networks = config.num_curricula - 1 + (config.objective == "learnability")
    # the last curriculum's samples are for nobody to train on
    held = {i: config.keep_latents or (config.guided and i < last) for i in range(1, last + 1)}
    new = left * (image + ROW_BYTES) + sum(count for i, count in missing.items() if held[i]) * latent
    return Disk(
        images=round(layout.total * image),
        latents=sum(layout.size(i) for i in held if held[i]) * latent,
        discriminators=networks * network,
        manifest=layout.total * ROW_BYTES,
        missing=round(new) + (trained + trains_real) * network,
        image=image,
        measured=measured,
    )


def image_bytes(out: Path, format: str, values: int) -> tuple[float, int]:
    """(bytes that an image takes on the disk, images that say so; 0 if it is assumed).

    values: pixels x channels. Some of the images that are in the folder say so, of shards one.
    """
    folder, suffix = out / IMAGES, Images(out, format).suffix
    if format == "wds":
        shard = next(folder.glob("*.tar"), None)
        if shard is not None and (members := len(list(read_members(shard)))):
            return shard.stat().st_size / members, members
    else:
        paths = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
        sizes = [path.stat().st_size for path in islice(paths, LOOKED_AT) if path.suffix == suffix]
        if sizes:
            return sum(map(_on_disk, sizes)) / len(sizes), len(sizes)
    beside, each = IMAGE_BYTES[format]
    size = beside + each * values
    return (size + TAR_BYTES, 0) if format == "wds" else (_on_disk(size), 0)


def _on_disk(size: float) -> int:
    return -(-int(size) // BLOCK) * BLOCK


def free_space(out: Path) -> int:
    """Bytes that are free where a run folder lies or will lie."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def reachable_memory(device: torch.device) -> int | None:
    """Bytes that this process holds or may still take, on the GPU or of the machine; None if unknown."""
    available = available_memory(device)
    if available is None:
        return None
    if device.type == "cuda":
        return available + torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return available + pages * os.sysconf("SC_PAGE_SIZE")
