"""Checkpoints of the DiT: our safetensors, official `.pt`, folders and hub models in diffusers format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.data import imagenet_classes
from acs_fast.models.diffusers_format import (
    WEIGHTS,
    Layout,
    diffusers_layout,
    part_folder,
    read_dit_config,
    read_folder,
    read_json,
    weight_files,
)
from acs_fast.models.dit import SIZES, DiT, DiTConfig
from acs_fast.models.weights import Weights, list_weights

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"(|transformer/|vae/|scheduler/)(\w+\.json|{WEIGHTS}[^/]*\.json)")
HUB_WEIGHTS = re.compile(rf"(|transformer/|vae/){WEIGHTS}(-\d+-of-\d+)?\.(safetensors|bin)")
HUB_TIMEOUT = 10.0  # seconds to wait for the hub's answer
LISTED = 5  # tensors named in an error


def checkpoint_bytes(model: DiT, dtype: torch.dtype = torch.float16) -> bytes:
    """The weights as a safetensors file with the DiTConfig as JSON metadata."""
    tensors = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()
    }
    # one key alone: safetensors writes several in random order, and the same weights must be the same bytes
    metadata = {"config": json.dumps(dataclasses.asdict(model.config))}
    return save(tensors, metadata)


def save_checkpoint(model: DiT, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `checkpoint_bytes` to a file."""
    path.write_bytes(checkpoint_bytes(model, dtype))


def resolve(source: str, part: str = "transformer") -> Path:
    """The file or folder of a model: a path as it is, or a Hugging Face id `org/name` as its cached snapshot.

    part: `transformer` or `vae`, what is wanted of the model. The hub's cache is looked in first; what is
    missing there is downloaded: configurations and weights alone, safetensors rather than `.bin`.
    Raises InputError for what is neither, and names the cache folder where the hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(source) or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise _absent(path, part)
    try:
        import huggingface_hub  # deferred: an optional package, it comes with diffusers
        from huggingface_hub import constants
    except ImportError as error:
        raise InputError(
            f"{source} is no file or folder here, and a Hugging Face model needs "
            "pip install 'acs-fast[diffusers]'"
        ) from error
    cache = Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
    try:
        snapshot = Path(huggingface_hub.snapshot_download(source, local_files_only=True))
        if _is_complete(snapshot, part):
            return snapshot
    except Exception:  # whatever the cache holds, the hub is asked next
        pass
    try:
        listed = huggingface_hub.HfApi().model_info(source, timeout=HUB_TIMEOUT).siblings or []
        wanted = _needed([file.rfilename for file in listed])
        snapshot = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own kinds, its HTTP library's and OSError
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160].rstrip(": ")
        raise InputError(
            f"{source} is no file or folder here, and the Hugging Face model of that name is neither in the "
            f"cache {cache} nor can it be fetched ({reason}); download it elsewhere and give its folder"
        ) from error
    if not _is_complete(snapshot, part):
        raise InputError(
            f"the Hugging Face model {source} has no {part} in diffusers format; give another id or folder"
        )
    return snapshot


def _needed(names: Sequence[str]) -> list[str]:
    """What is fetched of a hub model: configurations and each part's weights, safetensors if it has them."""
    matches = [match for name in names if (match := HUB_WEIGHTS.fullmatch(name))]
    safe = {match[1] for match in matches if match[3] == "safetensors"}
    weights = [match[0] for match in matches if match[3] == "safetensors" or match[1] not in safe]
    return [name for name in names if HUB_FILE.fullmatch(name)] + weights


def _is_complete(snapshot: Path, part: str) -> bool:
    """Whether a snapshot has a part, and for a DiT also the VAE that its pipeline names."""
    parts = {part}
    index = snapshot / "model_index.json"
    if index.is_file() and "vae" in read_json(index):
        parts.add("vae")
    folders = [part_folder(snapshot, name) for name in parts]
    return all((folder / "config.json").is_file() and weight_files(folder) for folder in folders)


def _absent(path: Path, part: str) -> InputError:
    if part == "vae":
        return InputError(f"there is no VAE {path}; give a Hugging Face id or a folder in diffusers format")
    return InputError(
        f"there is no checkpoint {path}; give --model a Hugging Face id, a folder in diffusers format, an "
        "official DiT .pt file or a .safetensors of acs-fast train"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def digest(path: Path) -> str:
    """SHA-256 (hex) of a checkpoint file, or of a folder's DiT: its configuration, then its weights."""
    files = [path]
    if path.is_dir():
        folder = part_folder(path, "transformer")
        files = [folder / "config.json", *weight_files(folder)]
    total = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise _absent(file, "transformer")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def load_checkpoint(
    path: Path, dtype: torch.dtype | Callable[[DiTConfig], torch.dtype] = torch.float32
) -> DiT:
    """A DiT in `dtype`, or in what that returns for its shape, in eval mode, without gradients.

    path: our safetensors, an official `.pt`, or a folder in diffusers format: a pipeline's or its DiT's.
    Files are mapped and cast tensor by tensor, so that the memory stays near one copy in `dtype`. A model of
    1000 unnamed classes gets the ImageNet wnids. From diffusers the weights come as they are, with QKV fused
    and the redundant copies of the embedders dropped; constants are those that diffusers runs it with.

    Raises InputError for a missing, truncated or foreign file; it names the first five missing and unexpected
    tensors, the first of another shape, the first with NaN or infinite values.
    """
    weights, config, layout = _open(path)
    if not isinstance(dtype, torch.dtype):
        dtype = dtype(config)
    with torch.device("meta"):
        model = DiT(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layout = layout or Layout({name: (name,) for name in shapes})
    _check_shapes(path, weights, layout, shapes)
    model.load_state_dict(_read_state(path, weights, layout, shapes, dtype), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def from_transformer(transformer: Any) -> DiT:
    """The DiT of a diffusers `DiTTransformer2DModel`: its own tensors, but for copies of the fused QKV.

    It is on the transformer's device and in its dtype, in eval mode and without gradients; the transformer
    stays as it is. The embedders, of which each of its blocks has a copy, are the first block's.
    Raises InputError for a transformer that is no DiT, as one is whose blocks' embedders differ.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    config = read_dit_config(transformer.config, "the transformer's configuration")
    if config.num_classes == 1000:
        config = dataclasses.replace(config, classes=imagenet_classes())
    layout, stored = diffusers_layout(config), dict(transformer.named_parameters())
    if missing := [part for parts in layout.parts.values() for part in parts if part not in stored]:
        raise InputError(
            f"the transformer has no parameter {_listed(missing)}; give a DiT as diffusers loads it, neither "
            "quantised nor with adapters that are not fused"
        )
    with torch.device("meta"):
        model = DiT(config)
    state = {}
    for name, parts in layout.parts.items():
        found = [stored[part].detach() for part in parts]
        for copy in layout.copies.get(parts[0], ()):
            if not torch.equal(stored[copy], found[0]):
                raise InputError(
                    f"the transformer's {copy} differs from {parts[0]}; a DiT has one embedder for all "
                    "blocks, so this model cannot be run as one"
                )
        state[name] = found[0] if len(found) == 1 else torch.cat(found)
    some = next(iter(state.values()))
    for name, (_, value) in layout.constants.items():
        state[name] = value.to(some.device, some.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def read_config(path: Path) -> DiTConfig:
    """The shape and classes of a checkpoint's DiT, without its weights; InputError for what is none."""
    return _open(path)[1]


def _open(path: Path) -> tuple[Weights, DiTConfig, Layout | None]:
    """A checkpoint's tensors, not read yet, its configuration, and its layout if it is not the official."""
    layout = None
    if path.is_dir():
        weights, config, layout = read_folder(path)
    elif path.is_file():
        read = _read_torch if path.suffix in (".pt", ".pth") else _read_safetensors
        weights, config = read(path)
    else:
        raise _absent(path, "transformer")
    if config.num_classes == 1000 and not config.classes:
        config = dataclasses.replace(config, classes=imagenet_classes())
    return weights, config, layout


def _check_shapes(
    path: Path, weights: Weights, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether a file has every tensor of its configuration in its shape, and no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parts in layout.parts.items():
        rows, *rest = shapes[name]
        for part in parts:
            wanted[part] = (rows // len(parts), *rest)
            wanted |= {copy: wanted[part] for copy in layout.copies.get(part, ())}
    optional = {stored: shapes[name] for name, (stored, _) in layout.constants.items()}
    missing = [name for name in wanted if name not in weights.shapes]
    unexpected = sorted(name for name in weights.shapes if name not in wanted and name not in optional)
    if missing or unexpected:
        found = [f"it has no {_listed(missing)}"] if missing else []
        found += [f"it has the unexpected {_listed(unexpected)}"] if unexpected else []
        raise InputError(f"checkpoint {path} is not a DiT of its configuration: {', and '.join(found)}")
    for name, shape in {**wanted, **optional}.items():
        if weights.shapes.get(name, shape) != shape:
            raise InputError(
                f"checkpoint {path}: {name} has shape {list(weights.shapes[name])}, its configuration needs "
                f"{list(shape)}; give a checkpoint whose weights fit its configuration"
            )


def _read_state(
    path: Path, weights: Weights, layout: Layout, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The official state dict in `dtype`, filled in one pass over the files."""
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    targets: dict[str, Tensor] = {}
    order: list[str] = []
    for name, parts in layout.parts.items():
        targets |= zip(parts, state[name].chunk(len(parts)), strict=True)
        order += [source for part in parts for source in (part, *layout.copies.get(part, ()))]
    part, first = "", torch.empty(0)
    for source, tensor in weights.read(order):
        if source in targets:
            if not all(map(torch.isfinite, tensor.aminmax())):
                raise InputError(
                    f"checkpoint {path}: {source} holds NaN or infinite values; copy or train it again"
                )
            targets[source].copy_(tensor)
            part, first = source, tensor.clone() if source in layout.copies else first
        elif not torch.equal(tensor, first):
            raise InputError(
                f"checkpoint {path}: {source} differs from {part}; a DiT has one embedder for all blocks, "
                "so this model cannot be run as one"
            )
    for name, (source, value) in layout.constants.items():
        for _, tensor in weights.read([source] if source in weights.shapes else []):
            if not torch.allclose(tensor.float(), value, rtol=0.0, atol=4 * torch.finfo(tensor.dtype).eps):
                raise InputError(f"checkpoint {path}: {source} is not the sine-cosine table of a DiT")
        state[name].copy_(value)
    return state


def _read_safetensors(path: Path) -> tuple[Weights, DiTConfig]:
    weights, metadata = list_weights(path)
    try:
        fields = json.loads(metadata["config"])
        return weights, DiTConfig(**{**fields, "classes": tuple(fields["classes"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"checkpoint {path} carries no usable DiT configuration in its metadata ({error}); make it with "
            "acs-fast train, or give the folder of a model in diffusers format"
        ) from error


def _read_torch(path: Path) -> tuple[Weights, DiTConfig]:
    weights, _ = list_weights(path)
    try:
        return weights, _infer_official_config(weights.shapes)
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"checkpoint {path} is not an official DiT ({type(error).__name__}: {error})"
        ) from error


def _infer_official_config(shapes: Mapping[str, Sequence[int]]) -> DiTConfig:
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    num_heads = {hidden: heads for _, hidden, heads in SIZES.values()}.get(
        hidden_size, max(1, hidden_size // 64)
    )
    outputs = shapes["final_layer.linear.weight"][0] // patch_size**2
    return DiTConfig(
        input_size=math.isqrt(shapes["pos_embed"][1]) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        num_heads=num_heads,
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        learn_sigma=outputs == 2 * in_channels,
    )
