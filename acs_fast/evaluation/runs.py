"""A finished run folder, as an evaluation reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from acs_fast.config import DistillConfig, InputError, resolve
from acs_fast.data import check_classes
from acs_fast.images import Images
from acs_fast.writer import RUN_CONFIG


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration, classes with the model's labels, the model's digest, the device."""

    path: Path
    config: DistillConfig
    classes: tuple[str, ...]
    class_labels: tuple[int, ...]
    model_sha256: str
    device: str


def read_run(path: Path) -> Run | None:
    """The finished run in a folder, or None for a folder without a configuration.

    InputError if there is no folder, an image is missing, or the contact sheet, which distill writes last.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a run folder or a folder of class folders")
    if not (path / RUN_CONFIG).is_file():
        return None
    run = read_record(path)
    total = run.config.ipc * len(run.classes)
    images, indices = Images(path, run.config.format), range(run.config.ipc)
    found = sum(images.holds((name, index)) for name in run.classes for index in indices)
    if found < total:
        raise InputError(f"{path} is unfinished: {found} of {total} images; run distill again")
    if not (path / "contact_sheet.png").is_file():
        raise InputError(f"{path} is unfinished: it has no contact_sheet.png; run distill again")
    return run


def read_record(path: Path) -> Run:
    """The run that the configuration in a folder describes; InputError if distill did not write it."""
    try:
        record = json.loads((path / RUN_CONFIG).read_text())
        if not isinstance(record["classes"], list) or not record["classes"]:
            raise ValueError("classes is no list of names")
        if not isinstance(record["model_sha256"], str):
            raise ValueError("model_sha256 is no text")
        return Run(
            path=path,
            config=resolve(DistillConfig, record["config"]),
            classes=check_classes(tuple(record["classes"])),
            class_labels=tuple(record["class_labels"]),
            model_sha256=record["model_sha256"],
            device=str(record.get("device")).partition(" ")[0],
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{path / RUN_CONFIG} cannot be read ({error}); distil again with --overwrite"
        ) from error
