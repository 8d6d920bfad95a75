"""The C ABI of libacs_fast_cuda.so through ctypes: structures, checks, and a method per op."""

from __future__ import annotations

import contextlib
import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acs_fast.kernels.structures import ACTIVATIONS, COLUMNS, OBJECTIVES, Network, Workspace

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_DEPTH = 4
_EPS = 1e-5  # of the discriminator's norms, the default of `conv_norm_act_pool`
_P, _I = ctypes.c_void_p, ctypes.c_int32


class _GuidedStep(ctypes.Structure):
    """AcsGuidedStep of arguments.h."""

    _fields_ = (
        *((name, _P) for name in ("x", "out", "denoised", "gradient", "class_labels", "indices", "seed")),
        *((name, _P) for name in ("step", "table")),
        *((name, _I) for name in ("x_dtype", "out_dtype", "denoised_dtype", "gradient_dtype")),
        *((name, _I) for name in ("batch", "channels", "pixels", "denoised_channels")),
        *((name, _I) for name in ("cfg_channels", "clip", "learned_range", "vector")),
    )


class _DiscriminatorGuidance(ctypes.Structure):
    """AcsDiscriminatorGuidance of arguments.h."""

    _fields_ = (
        ("guided", _GuidedStep),
        ("targets", _P),
        *((name, _P * _MAX_DEPTH) for name in ("weight", "gamma", "beta")),
        *((name, _P) for name in ("head_weight", "head_bias")),
        *((name, _I) for name in ("networks", "depth", "width", "size", "classes")),
        *((name, _I) for name in ("dtype", "activation", "objective")),
        *((name, ctypes.c_float) for name in ("omega", "eps")),
    )


_GUIDANCE = ctypes.POINTER(_DiscriminatorGuidance)
_ARGUMENTS = {
    "acs_philox_normal": (_P, _I, _P, _P, _P, _P, _I, ctypes.c_int64, _P),
    "acs_to_uint8": (_P, _P, _I, _I, _I, _I, _P),
    "acs_guided_step": (ctypes.POINTER(_GuidedStep), _P),
    "acs_discriminator_guidance": (_GUIDANCE, _P),
    "acs_discriminator_guidance_memory": (_GUIDANCE, ctypes.POINTER(_I), ctypes.POINTER(_I)),
}


class Library:
    """The ops of one shared library on tensors of one device type ("cpu" for the tests' emulation)."""

    def __init__(self, path: Path, device_type: str):
        self._library, self._device_type = ctypes.CDLL(str(path)), device_type
        for name, types in _ARGUMENTS.items():
            getattr(self._library, name).argtypes = types

    def philox_normal(
        self,
        class_labels: Tensor,
        indices: Tensor,
        seed: Tensor,
        step: Tensor,
        *,
        shape: tuple[int, ...],
        out: Tensor | None = None,
    ) -> Tensor:
        """As `reference.philox_normal`; `out` is of any dtype but float64."""
        op, batch = "philox_normal", len(class_labels)
        if out is None:
            out = torch.empty((batch, *shape), dtype=torch.float32, device=class_labels.device)
        self._check(op, out, "out", (batch, *shape), out.dtype)
        self._check_keys(op, class_labels, indices, seed, step)
        _aligned(op, out, "out")
        numel = math.prod(shape)
        self._call(
            "acs_philox_normal", out, out.data_ptr(), _DTYPES[out.dtype], class_labels.data_ptr(),
            indices.data_ptr(), seed.data_ptr(), step.data_ptr(), batch, numel,
        )  # fmt: skip
        return out

    def to_uint8(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """As `reference.to_uint8`."""
        op, (b, c, h, w) = "to_uint8", x.shape
        if out is None:
            out = torch.empty((b, h, w, c), dtype=torch.uint8, device=x.device)
        self._check(op, x, "x", x.shape, x.dtype)
        self._check(op, out, "out", (b, h, w, c), torch.uint8)
        _aligned(op, x, "x")
        _aligned(op, out, "out")
        self._call("acs_to_uint8", x, out.data_ptr(), x.data_ptr(), _DTYPES[x.dtype], b, c, h * w)
        return out

    def guided_step(
        self,
        x: Tensor,
        denoised: Tensor,
        class_labels: Tensor,
        indices: Tensor,
        seed: Tensor,
        step: Tensor,
        table: Tensor,
        gradient: Tensor | None = None,
        *,
        cfg_channels: int,
        clip: bool,
        learned_range: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `reference.guided_step`: one launch, one block per sample where there is a gradient."""
        out = torch.empty_like(x) if out is None else out
        arguments = self._step(
            "guided_step", x, denoised, class_labels, indices, seed, step, table, gradient, out,
            cfg_channels, clip, learned_range,
        )  # fmt: skip
        self._call("acs_guided_step", x, ctypes.byref(arguments))
        return out

    def discriminator_guidance(
        self,
        x: Tensor,
        denoised: Tensor,
        class_labels: Tensor,
        indices: Tensor,
        targets: Tensor,
        seed: Tensor,
        step: Tensor,
        table: Tensor,
        network: Network,
        *,
        groups: int,
        activation: str,
        objective: str,
        omega: float,
        cfg_channels: int,
        clip: bool,
        learned_range: bool,
        workspace: Workspace | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `reference.discriminator_guidance`, in one launch that needs no workspace.

        Networks in bfloat16 or float16, 64 or 128 wide, 2 to 4 blocks, one norm group a channel; samples of
        8x8, 16x16 or 32x32 whose activations fit into the shared memory of one block.
        """
        op = "discriminator_guidance"
        out = torch.empty_like(x) if out is None else out
        guided = self._step(
            op, x, denoised, class_labels, indices, seed, step, table, None, out,
            cfg_channels, clip, learned_range,
        )  # fmt: skip
        if not guided.vector:
            raise ValueError(f"{op}: x, denoised and out must start at a multiple of four elements")
        self._check(op, targets, "targets", (len(x),), torch.int64)
        arguments = self._network(op, x, network, groups)
        arguments.guided, arguments.targets = guided, targets.data_ptr()
        arguments.activation, arguments.objective = ACTIVATIONS.index(activation), OBJECTIVES.index(objective)
        arguments.omega, arguments.eps = omega, _EPS
        if arguments.networks != (2 if objective == "learnability" else 1):
            raise ValueError(
                f"{op}: {objective} takes {'two networks' if objective == 'learnability' else 'one network'}"
            )
        needed, given = _I(), _I()
        self._call("acs_discriminator_guidance_memory", x, ctypes.byref(arguments), ctypes.byref(needed),
                   ctypes.byref(given), stream=False)  # fmt: skip
        if needed.value > given.value:
            raise ValueError(
                f"{op}: this shape takes {needed.value} bytes of shared memory, a block has {given.value}"
            )
        self._call("acs_discriminator_guidance", x, ctypes.byref(arguments))
        return out

    def _step(
        self, op: str, x: Tensor, denoised: Tensor, class_labels: Tensor, indices: Tensor, seed: Tensor,
        step: Tensor, table: Tensor, gradient: Tensor | None, out: Tensor,
        cfg_channels: int, clip: bool, learned_range: bool,
    ) -> _GuidedStep:  # fmt: skip
        b, c, h, w = x.shape
        channels = denoised.shape[1]
        if channels not in (c, 2 * c) or (learned_range and channels == c):
            raise ValueError(f"{op}: denoised has {channels} channels for x of {c}")
        self._check(op, x, "x", x.shape, x.dtype)
        self._check(op, denoised, "denoised", (2 * b, channels, h, w), denoised.dtype)
        self._check(op, out, "out", x.shape, out.dtype)
        self._check(op, table, "table", (len(table), COLUMNS), torch.float32)
        self._check_keys(op, class_labels, indices, seed, step)
        given = [x, denoised, out]
        if gradient is not None:
            self._check(op, gradient, "gradient", x.shape, gradient.dtype)
            given.append(gradient)
        vector = c * h * w % 4 == 0 and all(t.data_ptr() % (4 * t.element_size()) == 0 for t in given)
        return _GuidedStep(
            x.data_ptr(), out.data_ptr(), denoised.data_ptr(),
            None if gradient is None else gradient.data_ptr(),
            class_labels.data_ptr(), indices.data_ptr(), seed.data_ptr(), step.data_ptr(), table.data_ptr(),
            _DTYPES[x.dtype], _DTYPES[out.dtype], _DTYPES[denoised.dtype],
            0 if gradient is None else _DTYPES[gradient.dtype],
            b, c, h * w, channels, cfg_channels, clip, learned_range, vector,
        )  # fmt: skip

    def _network(self, op: str, x: Tensor, network: Network, groups: int) -> _DiscriminatorGuidance:
        blocks, head = network
        dtype, depth = head.weight.dtype, len(blocks)
        n, width = blocks[0].bias.shape
        classes = head.bias.shape[1]
        _, c, h, w = x.shape
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{op}: the CUDA kernel takes networks in bfloat16 or float16, not {dtype}")
        if groups != width or width not in (64, 128):
            raise ValueError(f"{op}: the CUDA kernel takes 64 or 128 channels with a norm group each")
        if h != w or h not in (8, 16, 32) or not 2 <= depth <= _MAX_DEPTH or h >> depth == 0:
            raise ValueError(
                f"{op}: the CUDA kernel takes 8x8, 16x16 or 32x32 and 2 to 4 blocks that leave a pixel"
            )
        if n > 2 or c > 32:
            raise ValueError(f"{op}: the CUDA kernel takes at most 2 networks and 32 channels")
        side = h >> depth
        self._check(op, head.weight, "head.weight", (n, classes, width * side * side), dtype)
        self._check(op, head.bias, "head.bias", (n, classes), dtype)
        _aligned(op, head.weight, "head.weight")
        arguments = _DiscriminatorGuidance(
            head_weight=head.weight.data_ptr(), head_bias=head.bias.data_ptr(), networks=n, depth=depth,
            width=width, size=h, classes=classes, dtype=_DTYPES[dtype],
        )  # fmt: skip
        for i, block in enumerate(blocks):
            self._check(op, block.weight, "weight", (n, width, width if i else c, 3, 3), dtype)
            for name in ("weight", "gamma", "beta"):
                tensor = getattr(block, name)
                if name != "weight":
                    self._check(op, tensor, name, (n, width), dtype)
                _aligned(op, tensor, name)
                getattr(arguments, name)[i] = tensor.data_ptr()
        return arguments

    def _check_keys(self, op: str, class_labels: Tensor, indices: Tensor, seed: Tensor, step: Tensor) -> None:
        batch = (len(class_labels),)
        self._check(op, class_labels, "class_labels", batch, torch.int64)
        self._check(op, indices, "indices", batch, torch.int64)
        self._check(op, seed, "seed", (1,), torch.int64)
        self._check(op, step, "step", (1,), torch.int64)

    def _check(self, op: str, t: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if t.device.type != self._device_type:
            raise ValueError(f"{op}: {name} is on {t.device.type}, not on {self._device_type}")
        if t.is_cuda and t.device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            raise ValueError(f"{op}: {name} is on {t.device}, the current device is cuda:{current}")
        if t.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} has the shape {tuple(t.shape)}, not {tuple(shape)}")
        if t.dtype != dtype or (t.is_floating_point() and dtype not in _DTYPES):
            raise ValueError(f"{op}: {name} is {t.dtype}, which the CUDA kernel does not take there")
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} is not contiguous")

    def _call(self, function: str, on: Tensor, *arguments: Any, stream: bool = True) -> None:
        with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            if stream:
                arguments += (torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else None,)
            status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} returned CUDA error {status}")


def _aligned(op: str, t: Tensor, name: str) -> None:
    """Four elements at once are read or written there."""
    if t.data_ptr() % (4 * t.element_size()):
        raise ValueError(f"{op}: {name} does not start at a multiple of {4 * t.element_size()} bytes")
