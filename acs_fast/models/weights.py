"""Weight files, safetensors and PyTorch's: shapes without reading, values mapped and a few at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acs_fast.config import InputError

MAPPED_BYTES = 1 << 25  # a file is mapped anew after so many bytes, which gives its pages back


@dataclass(frozen=True)
class Weights:
    """Tensors in files: their shapes, and their values when they are asked for."""

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, mapped where the format allows: use each before taking the next."""
        opened: Path | None = None
        mapped, used = False, 0
        for name in names:
            if self.files[name] != opened or (mapped and used > MAPPED_BYTES):
                opened, used = self.files[name], 0
                mapped, get = _is_mappable(opened), _open(opened)
            tensor = get(name)
            used += tensor.nbytes
            yield name, tensor


def list_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a file, and a safetensors file's metadata; InputError for a damaged or foreign one."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                return Weights(dict.fromkeys(names, path), shapes), file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint {path} is damaged ({error}); copy or train it again") from error
    shapes = {name: tuple(value.shape) for name, value in _load_torch(path).items()}
    return Weights(dict.fromkeys(shapes, path), shapes), {}


def _open(path: Path) -> Callable[[str], Tensor]:
    if path.suffix == ".safetensors":
        return safe_open(path, framework="pt").get_tensor
    return _load_torch(path).__getitem__


def _load_torch(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pt` or `.bin` file, of its moving average if it holds one: `ema`."""
    try:
        mapped = _is_mappable(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a damaged or pickled file
        raise InputError(
            f"checkpoint {path} cannot be read as plain weights ({type(error).__name__})"
        ) from error
    state = state.get("ema", state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"checkpoint {path}: {name!r} is a {type(value).__name__}, not a tensor")
    return state


def _is_mappable(path: Path) -> bool:
    """Whether PyTorch can map a file: its present format is a zip file, that of old versions is none."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)
