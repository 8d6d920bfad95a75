"""Amounts as people read them."""

from __future__ import annotations


def size(value: float) -> str:
    """Bytes in the unit that fits."""
    return scaled(value, "B")


def scaled(value: float, unit: str) -> str:
    """A value with the prefix that fits its unit."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if 0 < seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    for unit, length in (("s", 120.0), ("min", 120.0 * 60), ("h", 48.0 * 3600)):
        if seconds < length:
            return f"{seconds / {'s': 1, 'min': 60, 'h': 3600}[unit]:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
