"""For the reference: a setting's help and default stand in its field's metadata, not in a docstring."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import griffe

from acs_fast import config


class Settings(griffe.Extension):
    """Gives each attribute of a configuration its default as the value and its help as the docstring."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called once a class with its members is known."""
        known = getattr(config, cls.name, None)
        if not cls.path.startswith("acs_fast.config.") or not dataclasses.is_dataclass(known):
            return
        for field in dataclasses.fields(known):
            attribute, text = cls.members[field.name], as_markdown(field.metadata["help"])
            if field.metadata["choices"]:
                text += f"; one of `{'`, `'.join(field.metadata['choices'])}`"
            if isinstance(attribute, griffe.Attribute):
                attribute.value = repr(field.default)
                attribute.docstring = griffe.Docstring(text, parent=attribute)


def as_markdown(text: str) -> str:
    """Plain text as Markdown that shows it: `train/<class>/*` is no tag and no emphasis."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*_])", r"\\\1", text).replace("<", "&lt;")
