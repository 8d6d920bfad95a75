"""The run folder: its lock, its record, its files, each written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.log import LOG, LOGS

RUN_CONFIG = "config.json"
MANIFEST = "manifest.jsonl"
CURRICULA = "curricula.json"
# all that distill, evaluate and report put into a run folder; --overwrite removes these and nothing else
CONTENTS = (
    "images",
    "samples",
    "discriminators",
    "latents",
    LOGS,
    CURRICULA,
    "baselines",
    "contact_sheet.png",
    "results.json",
    "report.html",
    MANIFEST,
)
LOCK = ".lock"
TEMPORARY = ".tmp"  # suffix of what is being written
# settings a run may be continued with other values of: they change nothing, or what they lead to is compared
FREE = (
    "out", "preset", "backend", "device", "model", "classes", "vae", "tiny_vae", "cache", "keep_latents",
    "log_json",
)  # fmt: skip
DIGESTS = ("model_sha256", "vae_sha256", "seen_by_sha256")


def write_atomic(path: Path, data: bytes) -> None:
    """Write the file whole or not at all, and make its folder; OSError names the path."""
    write_whole(path, (data,))


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """`write_atomic` of parts, one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before what follows."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(out: Path) -> None:
    """Remove the unfinished files that killed processes left in a run folder, which is locked."""
    folders = [out, *(out / name for name in CONTENTS if (out / name).is_dir() and name != "baselines")]
    for folder in folders:
        found = folder.glob(f"*{TEMPORARY}") if folder == out else folder.rglob(f"*{TEMPORARY}")
        for path in found:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file, or None if it is missing or damaged (it is then made again)."""
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the run folder for this process; the kernel drops the lock however the process ends.

    Raises InputError for a folder with files of something else, and leaves it as it was.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    if not is_free(out):
        raise InputError(f"{out} holds files of something else; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing to {out}; wait for it or give another --out"
            ) from error
        yield


def is_free(out: Path) -> bool:
    """Whether a run may use `out`: nothing of a run's names lies there, or a run of ours does."""
    if not (out / RUN_CONFIG).is_file():
        names = [name for name in CONTENTS if name != LOGS or not holds_logs(out)]
        return not any((out / name).exists() for name in names)
    stored = read_json(out / RUN_CONFIG)
    if stored is None:
        return (out / LOCK).is_file() and (out / MANIFEST).is_file()
    return is_record(stored)


def holds_logs(out: Path) -> bool:
    """Whether `logs` is a folder of our log files alone: they begin before a run has its record."""
    folder = out / LOGS
    return folder.is_dir() and all(map(LOG.fullmatch, os.listdir(folder)))


def read_json(path: Path) -> Any:
    """The value of a JSON file, or None if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


def is_record(value: Any) -> bool:
    """Whether a JSON value is what `claim` writes: other programs call their files config.json too."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("config"), dict)
        and {"model_sha256", "class_labels"} <= value.keys()
    )


def claim(out: Path, record: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Make `out`, which is locked, the folder of the run that `record` describes: continue there, or start.

    Returns the record in the folder: that of the start. InputError for a run of another configuration,
    unless `overwrite`, which removes it.
    """
    path = out / RUN_CONFIG
    record = json.loads(json.dumps(record))
    if path.is_file() and not overwrite:
        return check_same(out, record)
    if path.is_file():
        clear(out)
    write_json(path, record)
    return record


def check_same(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record in a run folder; InputError for a run of another configuration."""
    stored = read_json(out / RUN_CONFIG)
    if difference := config_difference(stored, json.loads(json.dumps(record))):
        raise InputError(
            f"{out} holds a run of another configuration ({difference}); give another --out, or --overwrite"
        )
    return stored


def config_difference(stored: Any, record: dict[str, Any]) -> str:
    """The first difference that matters between a stored JSON value and `record`; empty if none."""
    if not is_record(stored):
        return f"{RUN_CONFIG} cannot be read"
    # the plain sampler leaves attention and compile open
    names = [n for n in record["config"] if n not in FREE and stored["config"].get(n) != "auto"]
    pairs = {name: (stored["config"].get(name), record["config"][name]) for name in names}
    pairs |= {name: (stored.get(name), record[name]) for name in (*DIGESTS, "classes", "class_labels")}
    old_device, device = (str(side.get("device")).partition(" ")[0] for side in (stored, record))
    pairs["device"] = old_device, device  # of `cuda (its name)` the type alone
    different = (f"{name} {old} there, {new} here" for name, (old, new) in pairs.items() if old != new)
    return next(different, "")


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`, for --overwrite; anything else in the folder stays.

    The configuration goes last: while it is there, an interrupted removal still counts as a run folder.
    """
    for name in (*CONTENTS, RUN_CONFIG):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
