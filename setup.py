"""Builds the CUDA library where nvcc and sources for it are found; the rest stands in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def why_no_cuda() -> str | None:
    """Why the CUDA library cannot be built here, or None if it can."""
    if not any((ROOT / "kernels" / "cuda").glob("*.cu")):
        return "there are no CUDA sources"
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found on PATH" if missing else None


class BuildCuda(Command):
    """Puts libacs_fast_cuda.so into the package; not in build_py, whose errors an editable install hides."""

    def initialize_options(self) -> None:
        self.build_lib, self.build_temp, self.editable_mode = None, None, False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self) -> None:
        if reason := why_no_cuda():
            print(f"acs-fast: {reason}; shipping the Python kernels only", flush=True)
            return
        root = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={root / 'acs_fast/kernels/cuda'}"
        temp = Path(self.build_temp, "cmake")
        subprocess.run(["cmake", "-S", ROOT, "-B", temp, output], check=True)
        subprocess.run(["cmake", "--build", temp, "--parallel"], check=True)


class BdistWheel(bdist_wheel):
    """One wheel serves every Python on a platform, since the library has a plain C ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if self.root_is_pure else ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """Tied to a platform only where the CUDA library is built."""

    def has_ext_modules(self) -> bool:
        return why_no_cuda() is None


build.sub_commands.append(("build_cuda", None))
setup(distclass=PlatformDistribution, cmdclass={"build_cuda": BuildCuda, "bdist_wheel": BdistWheel})
