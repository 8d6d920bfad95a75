"""What single trainings of an evaluation gave, kept so that a stopped one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """Values by what they are a function of: a line each in `path`, appended as soon as it is known.

    path: None keeps nothing. world: what every value hangs on (versions, device, test images). A line that a
    kill has cut is ignored.
    """

    def __init__(self, path: Path | None, world: dict[str, Any]):
        self.path, self.world = path, world
        self.values: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                self.values[row["key"]] = row["value"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue

    def get(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The value of a key, or what `make` gives, which is kept; as JSON has it: tuples are lists."""
        text = json.dumps({**self.world, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        if name not in self.values:
            value = json.loads(json.dumps(make()))
            self.values[name] = value
            if self.path is not None:
                self._append({"key": name, "value": value})
        return self.values[name]

    def _append(self, row: dict[str, Any]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            whole = not file.tell()
            if not whole:
                file.seek(-1, 2)
                whole = file.read(1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")
