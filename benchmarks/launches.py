"""Records the launches of Triton ops instead of running them, and compiles them for GPUs that are not here.

The ops' launchers run as they are, on meta tensors, so what is compiled is what a GPU would get: the same
constants, the same specialisation of arguments (divisible by 16, equal to 1), the same warps and stages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from acs_fast.testing import Maker

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a block can have (CUDA C guide, table of limits)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORE = re.compile(r"\b(UTC[A-Z]*MMA|HGMMA|HMMA|QGMMA|IMMA)\b")
HALF_PRODUCT = re.compile(r"tt\.dot .*x(?:bf16|f16)>")
LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")


class MetaMaker(Maker):
    """The inputs of acs_fast.testing without data, so that production shapes cost nothing."""

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype, torch.device("meta"), seed=0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of the shape."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """An empty int64 tensor of the shape."""
        return torch.empty(shape, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid and bound arguments; how they are typed; warps, stages and the like."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel as `module.function`."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def source(self) -> ASTSource:
        """What the compiler takes."""
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments by name."""
        return {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class Machine:
    """What a kernel takes on one architecture, as its machine code says."""

    architecture: int
    warps: int | None  # None: chosen at the launch
    registers: int
    stack: int  # bytes of local memory per thread
    local_accesses: int  # STL and LDL: spills, and arrays that are indexed at run time
    shared: int  # bytes per block
    tensor_core: dict[str, int]  # instruction -> how often the code holds it
    half_product: bool  # its source multiplies matrices of bf16 or fp16

    @property
    def local(self) -> bool:
        """Whether the kernel keeps anything in local memory."""
        return bool(self.stack or self.local_accesses)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Triton kernels that are launched inside are recorded and not run."""
    launches: list[Launch] = []
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        _, signature, constexprs, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        shape = grid(bound) if callable(grid) else grid
        launches.append(Launch(self, tuple(shape), bound, signature, constexprs, attributes, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_for(launch: Launch, architecture: int) -> Machine:
    """Compile a launch for compute capability `architecture`, without a GPU, and read its machine code."""
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = resource_usage(file.name)
        code = _cuobjdump("-sass", file.name)
    (resources,) = usage.values()
    return Machine(
        architecture,
        compiled.metadata.num_warps,
        resources["REG"],
        resources["STACK"],
        len(LOCAL_MEMORY.findall(code)),
        compiled.metadata.shared,
        count(TENSOR_CORE, code),
        HALF_PRODUCT.search(compiled.asm["ttir"]) is not None,
    )


def library_kernels(path: Path, products: str) -> dict[str, list[Machine]]:
    """Kernel -> its machine code by architecture; `products` stands in the names of matrix kernels."""
    code, found = machine_code(path), {}
    for (architecture, function), resources in resource_usage(path).items():
        text = code[architecture, function]
        machine = Machine(
            int(re.sub(r"\D", "", architecture)),
            None,
            resources["REG"],
            resources["STACK"],
            len(LOCAL_MEMORY.findall(text)),
            resources["SHARED"],
            count(TENSOR_CORE, text),
            products in function,
        )
        found.setdefault(_demangled(function), []).append(machine)
    return found


def _demangled(name: str) -> str:
    """A C++ symbol without its arguments, where c++filt is found; else as it is."""
    try:
        text = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout
    except OSError:
        return name
    return text.strip()


def count(pattern: re.Pattern[str], text: str) -> dict[str, int]:
    """How often each of a pattern's matches stands in a text."""
    found = pattern.findall(text)
    return {name: found.count(name) for name in sorted(set(found))}


def resource_usage(path: str | Path) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, function) -> REG, STACK, SHARED, ... of the machine code in a file."""
    found, architecture, function = {}, "", ""
    for line in _cuobjdump("--dump-resource-usage", str(path)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif "REG:" in line:
            found[architecture, function] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def machine_code(path: str | Path) -> dict[tuple[str, str], str]:
    """(architecture, function) -> SASS of the machine code in a file."""
    found: dict[tuple[str, str], list[str]] = {}
    architecture, lines = "", []
    for line in _cuobjdump("-sass", str(path)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            lines = found.setdefault((architecture, match[1]), [])
        else:
            lines.append(line)
    return {key: "\n".join(code) for key, code in found.items()}


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout
