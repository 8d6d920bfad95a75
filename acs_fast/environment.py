"""What a run stood on: versions, device and commit; and which device a run takes."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from acs_fast import __version__, attention, ops
from acs_fast.config import InputError

# package -> what it is for; missing ones are named by `acs-fast env`
OPTIONAL_PACKAGES = {
    "triton": "kernels on NVIDIA GPUs",
    "diffusers": "VAEs and checkpoints in diffusers format",
    "xformers": "an attention backend",
}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; InputError for `cuda` without one.

    A GPU comes with its number: another thread's own is the first one.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this package runs from, with `+` if files differ; None when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
        return head.stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """What belongs beside every result: versions, device, threads and commit."""
    return {
        "versions": {
            "acs_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
        },
        "device": f"{device.type} ({device_name(device)})",
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def _loader() -> str:
    """Which loader decodes real images."""
    found = version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120")
    return f"loader: dali {found}" if found else "loader: pil (nvidia-dali is not installed)"


def report() -> str:
    """What `acs-fast env` prints: versions, devices, and which optional part is missing and why."""
    lines = [f"acs-fast {__version__}  commit {commit() or '(installed package)'}"]
    lines.append(f"python {platform.python_version()}  {platform.platform()}")
    lines.append(f"torch {torch.__version__}  {torch.get_num_threads()} threads")
    cpu = torch.device("cpu")
    lines.append(f"device cpu: {device_name(cpu)}, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        lines.append(f"device cuda:{index}: {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"torch is built for CUDA {built} but finds no usable GPU" if built else "torch is a CPU build"
        )
        lines.append(f"device cuda: missing ({reason})")
    lines.append("")
    device = resolve_device("auto")
    lines += [ops.table(device), "", attention.table(device), ""]
    lines.append(_loader())
    for package, purpose in OPTIONAL_PACKAGES.items():
        found = version(package)
        lines.append(f"{package}: {found or f'missing (not installed; {purpose})'}")
    return "\n".join(lines)
