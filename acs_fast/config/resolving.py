"""A configuration from flags, a file, a preset and the defaults."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from acs_fast.config.fields import InputError, T
from acs_fast.config.presets import PRESETS


def resolve(cls: type[T], given: dict[str, Any], file: str | None = None) -> T:
    """A configuration from, in falling order, the given values, a JSON or YAML file, preset and defaults.

    Raises InputError for an unknown preset, a name that is no field, or a value of the wrong type.
    """
    values = {**(_read_file(Path(file)) if file else {}), **given}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{key!r} is no setting of {cls.__name__}; known: {', '.join(fields)}")
        values[key] = _convert(key, value, hints[key])
    preset = PRESETS[cls.__name__].get(values.get("preset", fields["preset"].default), {})
    return cls(**{**preset, **values})


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; JSON and YAML have lists for tuples and integers for floats."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            raise InputError(f"{name} is {value!r}, it must be a list like {kind}")
        return tuple(_convert(name, part, parts[0]) for part in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}, it must be {kind.__name__}")
    return value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix in (".yaml", ".yml"):
            import yaml  # deferred: the command line starts without it

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"configuration {path} cannot be read ({error}); give a JSON or YAML file"
        ) from error
    except Exception as error:  # yaml.YAMLError, a class of the deferred module
        raise InputError(f"configuration {path} is not valid YAML ({error})") from error
    if isinstance(values, dict):
        values = values.get("config", values)  # a run's own config.json serves too
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} holds no settings; write one 'name: value' a line")
    return values
