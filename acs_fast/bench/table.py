"""A benchmark's row as the command prints it."""

from __future__ import annotations

from typing import Any

DIGITS_SHOWN = {"ms": 2, "s": 3}
LABELS = {
    "images_per_s": "images/s",
    "unguided_images_per_s": "images/s without guidance",
    "gflop_per_step": "GFLOP of the denoiser per step",
    "gflop_per_s": "GFLOP/s of the guided step",
    "gemm_gflop_per_s": "GFLOP/s of a block's four GEMMs alone",
    "percent_of_gemm": "percent of the GEMM rate",
    "peak_mb": "peak memory, MB",
    "memory_before_mb": "memory before the timed batches, MB",
    "memory_after_mb": "memory after them, MB",
    "host_launches_per_batch": "host launches per batch",
    "operator_calls_per_step": "operator calls per guided step",
    "captured_graphs": "captured graphs",
}


def table(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    where = f"{row['device']}, {row['threads']} threads" if row["device"].startswith("cpu") else row["device"]
    code = "compiled" if row["compiled"] else "eager" if row["device"].startswith("cpu") else "captured"
    attention = f", attention {row['attention']}" if row["attention"] else ""
    lines = [
        f"{row['kind']}: {row['model']} ({row['weights']} weights), batch {row['batch_size']}",
        f"{row['dtype']}, {code}{attention}, guidance {row['guidance_space']} by {row['discriminator']}",
        *row["notes"],
        _check_line(row["check"]),
    ]
    if "figures" in row:
        lines += ["", f"{'':24}{'median':>12}{'p20':>12}{'p80':>12}"]
        for name, f in row["figures"].items():
            cells = "".join(f"{f[key]:>12.{DIGITS_SHOWN[f['unit']]}f}" for key in ("median", "p20", "p80"))
            lines.append(f"{name + ', ' + f['unit']:24}{cells}")
        if row["kind"] == "bench step" and "decode" not in row["figures"]:
            lines.append(f"{'decode, ms':24}" + f"{'-':>12}" * 3)
        lines.append("")
        lines += [f"{LABELS[name]:44}{_shown(value):>16}" for name, value in row["totals"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    lines += ["", f"{where}; {versions}; commit {row['commit']}; tier {row['tier']}; {row['repeats']} rounds"]
    return "\n".join(lines)


def _check_line(result: dict[str, Any]) -> str:
    word = "ok" if result["passed"] else "FAILED"
    errors = (f"{name} {e:.1e} of {result['allowed'][name]:.0e}" for name, e in result["errors"].items())
    finite = "" if result["finite"] else "; a result is not finite"
    return f"check: {word}, relative errors of the allowed: {', '.join(errors)}{finite}"


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 100 else f"{value:,.1f}"
