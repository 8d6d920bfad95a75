"""Edits that break a kernel or its specification, each of which must turn a few op tests red.

python -m tests.mutations            all of them; exit 1 and name the survivors
python -m tests.mutations WORD ...   those whose name holds one of the words

Each edit is made in a copy of the tree. Its tests are a `pytest -k` expression over one file, which must pass
without the edit and fail by an assertion with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ("acs_fast", "kernels", "tests", "pyproject.toml", "CMakeLists.txt")
OPS, SPECIFICATION, EMULATION = "tests/test_ops.py", "tests/test_reference.py", "tests/test_cuda.py"
WORKERS = 2


@dataclass(frozen=True)
class Mutation:
    """One edit: `old`, which the file holds exactly once, becomes `new`; `tests` are to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    path: str = OPS


REFERENCE, TRITON, CUDA = "kernels/reference", "kernels/triton", "kernels/cuda"
PHILOX = "philox_normal-B1-C1 and triton-fp32"
XSTART = "pred_xstart-B7 and triton-fp32"
CLIPPED = "pred_xstart-B3-C4 and True-triton-fp32"
STEP = "guided_step-B7-C3-H16-W16-ddpm-sigma-True-True-triton-fp32 and not discriminator"
ADALN = "adaln-B7-T5-D72-triton-fp32"
CONV = "conv_norm_act_pool-N1-B1-C_in4-C64-H8-W8-G64-triton-fp32"
BACKWARD = "conv_norm_act_pool_backward_input-N1-B1-C_in4-C64-H8-W8-G64-triton-fp32"
HEAD = "classifier_head_grad-B33 and triton-fp32"
GUIDANCE = "discriminator_guidance-B1-C9-H16-W16-width64-depth3-G64-K10-bf16"
SMOOTH = "discriminator_guidance-B1-C32-H8-W8-width64-depth2-G64-K1000-silu-bf16"
FUSED = "discriminator_guided_step-N2-B3-C4-H16-W16-width64-G64-triton-fp32"

MUTATIONS = [
    # the specification, against plain PyTorch; its noise, which has no other, against Triton's
    Mutation(
        "the noise forgets the step",
        f"{REFERENCE}/noise.py",
        "(block, step.view(1, 1),",
        "(block, 0 * step.view(1, 1),",
        PHILOX,
    ),
    Mutation(
        "the Philox key's words change places",
        f"{REFERENCE}/noise.py",
        "(seed & _MASK, (seed >> 32) & _MASK)",
        "((seed >> 32) & _MASK, seed & _MASK)",
        PHILOX,
    ),
    Mutation(
        "conditional and null branch change places",
        f"{REFERENCE}/step.py",
        "cond, null = wide(denoised)",
        "null, cond = wide(denoised)",
        "pred_xstart-B3",
        SPECIFICATION,
    ),
    Mutation(
        "guidance on one channel too many",
        f"{REFERENCE}/step.py",
        "(eps[:, :cfg_channels], cond[:, cfg_channels:])",
        "(eps[:, : cfg_channels + 1], cond[:, cfg_channels + 1 :])",
        "pred_xstart-B3",
        SPECIFICATION,
    ),
    Mutation(
        "the gradient's norm is missing",
        f"{REFERENCE}/step.py",
        "return g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)",
        "return g",
        "guided_step-B7",
        SPECIFICATION,
    ),
    Mutation(
        "the real classifier's gradient loses its sign",
        f"{REFERENCE}/discriminator.py",
        "-omega * factor[1]",
        "omega * factor[1]",
        "classifier_head_grad-B3 and learnability",
        SPECIFICATION,
    ),
    Mutation(
        "the norm's backward forgets mean(d)",
        f"{REFERENCE}/discriminator.py",
        "d = d - d.mean(dim=-1, keepdim=True) - grouped",
        "d = d - grouped",
        "backward_input",
        SPECIFICATION,
    ),
    Mutation(
        "the guided step leaves omega out",
        "kernels/compose.py",
        "objective=objective, omega=omega, out",
        "objective=objective, omega=0.0, out",
        "discriminator_guidance and learnability",
        SPECIFICATION,
    ),
    # the kernels
    Mutation(
        "a stale step counter in the table",
        f"{TRITON}/device.py",
        "table + tl.load(step) * COLUMNS",
        "table + (tl.load(step) - 1) * COLUMNS",
        XSTART,
    ),
    Mutation(
        "a stale step counter in the noise",
        f"{TRITON}/device.py",
        "tl.load(step).to(tl.uint32)",
        "(tl.load(step) - 1).to(tl.uint32)",
        PHILOX,
    ),
    Mutation(
        "cos and sin change places",
        f"{TRITON}/device.py",
        "return radius * real, radius * imaginary",
        "return radius * imaginary, radius * real",
        PHILOX,
    ),
    Mutation(
        "guidance from the wrong branch",
        f"{TRITON}/device.py",
        "null + cfg_scale * (cond - null)",
        "cond + cfg_scale * (null - cond)",
        XSTART,
    ),
    Mutation(
        "guidance on one element too many",
        f"{TRITON}/device.py",
        "offsets < cfg_elements",
        "offsets <= cfg_elements",
        XSTART,
    ),
    Mutation(
        "x0 is clamped from below only",
        f"{TRITON}/device.py",
        "tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL)",
        "value",
        CLIPPED,
    ),
    Mutation(
        "a variance for a standard deviation", f"{TRITON}/device.py", "tl.exp(0.5 * (low", "tl.exp((low", STEP
    ),
    Mutation(
        "the push loses its sign", f"{TRITON}/guided_step.py", "value += length", "value -= length", STEP
    ),
    Mutation(
        "a row of the table for the batch index",
        f"{TRITON}/adaln.py",
        "row = tl.load(rows + b)",
        "row = b",
        ADALN,
    ),
    Mutation(
        "padding counts in the variance",
        f"{TRITON}/adaln.py",
        "tl.where(mask, x - tl.sum(x) / D, 0.0)",
        "x - tl.sum(x) / D",
        ADALN,
    ),
    Mutation(
        "the residual is not gated",
        f"{TRITON}/gated_residual_adaln.py",
        "+ gated * branch",
        "+ branch",
        f"gated_residual_{ADALN}",
    ),
    Mutation(
        "truncated, not rounded",
        f"{TRITON}/to_uint8.py",
        "(value + 12582912.0) - 12582912.0",
        "value",
        "to_uint8-B3-C3-H17 and triton-fp32",
    ),
    Mutation("an off-by-one halo below", f"{TRITON}/convolution.py", "(row < H)", "(row < H - 1)", CONV),
    Mutation(
        "an off-by-one halo in the backward",
        f"{TRITON}/convolution.py",
        "(y >= 0) & (y < H)",
        "(y > 0) & (y < H)",
        BACKWARD,
    ),
    Mutation(
        "the backward does not flip the filter",
        f"{TRITON}/convolution.py",
        "(2 - dy) * 3",
        "dy * 3",
        BACKWARD,
    ),
    Mutation(
        "the mean is not subtracted",
        f"{TRITON}/conv_norm_act_pool.py",
        "(conv - mean[:, None]) * inverse",
        "conv * inverse",
        CONV,
    ),
    Mutation(
        "one class too many",
        f"{TRITON}/classifier_head_grad.py",
        "(k < K) & (k != target)",
        "(k <= K) & (k != target)",
        f"{HEAD} and adversarial",
    ),
    Mutation(
        "the real classifier's gradient loses its sign in the kernel",
        f"{TRITON}/classifier_head_grad.py",
        "factor_1 = -omega",
        "factor_1 = omega",
        f"{HEAD} and learnability",
    ),
    Mutation(
        "the activation's scale lacks the norm's weight",
        f"{TRITON}/convolution.py",
        "g * (0.25 * gamma[:, None])",
        "g * 0.25",
        BACKWARD,
    ),
    Mutation(
        "every channel takes its group's first weight",
        f"{TRITON}/group_norm_silu.py",
        "first_channel + offsets // AREA",
        "first_channel + 0 * offsets",
        "group_norm_silu-B2 and triton-fp32",
    ),
    Mutation(
        "the gradient of one network only",
        f"{TRITON}/discriminator_guided_step.py",
        "NETWORKS=n,",
        "NETWORKS=1,",
        FUSED,
    ),
    # the CUDA sources, built for their CPU emulation
    Mutation(
        "guidance from the wrong branch",
        f"{CUDA}/step.cuh",
        "null + row.cfg_scale * (cond - null)",
        "cond + row.cfg_scale * (null - cond)",
        "guided_step-B1-C1-H8-W8-fp32",
        EMULATION,
    ),
    Mutation(
        "a stale step counter in the table",
        f"{CUDA}/step.cuh",
        "table + step * ACS_COLUMNS",
        "table + (step - 1) * ACS_COLUMNS",
        "guided_step-B1-C1-H8-W8-fp32",
        EMULATION,
    ),
    Mutation(
        "the Philox key's words change places",
        f"{CUDA}/philox.cuh",
        "static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)",
        "static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key)",
        "philox_normal-B2-C1-H5-W7-fp32",
        EMULATION,
    ),
    Mutation(
        "the real classifier's gradient loses its sign",
        f"{CUDA}/objective.cuh",
        "-omega * sigmoid(m)",
        "omega * sigmoid(m)",
        "discriminator_guidance-B3 and learnability-bf16",
        EMULATION,
    ),
    Mutation(
        "an off-by-one halo at the right edge",
        f"{CUDA}/inner_layer.cuh",
        "(last && g == 7)",
        "(last && g == 6)",
        GUIDANCE,
        EMULATION,
    ),
    Mutation(
        "the backward does not flip the filter",
        f"{CUDA}/inner_layer.cuh",
        "TRANSPOSED ? 4 - 3 * dy - dx",
        "TRANSPOSED ? 4 - 3 * dy + dx",
        GUIDANCE,
        EMULATION,
    ),
    Mutation(
        "the norm's backward forgets mean(d)",
        f"{CUDA}/first_layer.cuh",
        "(d - d_mean[k] - xhat[r] * product_mean[k])",
        "(d - 0.0f * d_mean[k] - xhat[r] * product_mean[k])",
        SMOOTH,
        EMULATION,
    ),
]


def broken_edits(mutations: Iterable[Mutation], root: Path) -> list[str]:
    """Edits that do not fit the sources any more."""
    found = []
    for m in mutations:
        times = (root / m.file).read_text().count(m.old) if (root / m.file).exists() else 0
        if times != 1:
            found.append(f"{m.name}: {m.file} holds its old text {times} times, not once")
    return found


def copy_tree(target: Path) -> None:
    """What the op tests need, without data and caches."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, target / name)


def run_tests(tree: Path, path: str, expression: str) -> tuple[int, str]:
    """pytest's exit status and output for a -k expression, stopped at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", path, "-k", expression]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdict(path: str, expression: str, mutation: Mutation | None) -> tuple[str, float]:
    """`noticed`, or what went wrong, of one edit (None: no edit, must pass), and the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if mutation:
            file = tree / mutation.file
            file.write_text(file.read_text().replace(mutation.old, mutation.new))
        status, output = run_tests(tree, path, expression)
    if mutation is None:
        result = "pass" if status == 0 else f"FAILED (pytest exit {status}):\n{output[-2000:]}"
    elif status == 0:
        result = "SURVIVED"
    elif status == 1 and "AssertionError" in output and " error: " not in output:  # a compiler's
        result = "noticed"
    else:
        result = f"NOT TESTED (pytest exit {status}):\n{output[-2000:]}"
    return result, time.perf_counter() - started


def main(words: list[str]) -> int:
    """Run the edits whose name or file holds one of the words, or all; 0 if every one was noticed."""
    chosen = [m for m in MUTATIONS if not words or any(w in m.name or w in m.file for w in words)]
    if not (shutil.which("cmake") and shutil.which("c++")):
        print("the edits of the CUDA sources are left out: they need cmake and a C++ compiler")
        chosen = [m for m in chosen if m.path != EMULATION]
    wrong = broken_edits(chosen, ROOT)
    if wrong or not chosen:
        print("\n".join(wrong) or "no such mutation")
        return 1
    paths: dict[str, dict[str, None]] = {}
    for m in chosen:
        paths.setdefault(m.path, {})[f"({m.tests})"] = None
    with ThreadPoolExecutor(WORKERS) as pool:
        unedited = {p: pool.submit(verdict, p, " or ".join(tests), None) for p, tests in paths.items()}
        jobs = {m: pool.submit(verdict, m.path, m.tests, m) for m in chosen}
        for path, job in unedited.items():
            result, seconds = job.result()
            print(f"{path} without an edit: {result} ({seconds:.1f} s)", flush=True)
            wrong += [path] if result != "pass" else []
        for m, job in jobs.items():
            result, seconds = job.result()
            print(f"{m.file}: {m.name}: {result} ({seconds:.1f} s)", flush=True)
            wrong += [m.name] if result != "noticed" else []
    print(f"{len(chosen)} edits; " + (f"not as they must be: {'; '.join(wrong)}" if wrong else "all noticed"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
