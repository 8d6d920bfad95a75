"""HTML by function: everything that is not `Html` is escaped, wide things scroll inside their own box."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from acs_fast.report.style import STYLE

DASH = "—"  # what is not known


class Html(str):
    """Text that is markup already."""


def escape(value: object) -> str:
    """A value as markup: `Html` as it is, anything else escaped, also for attributes."""
    return value if isinstance(value, Html) else html.escape(str(value))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The values one after another."""
    return Html(between.join(map(escape, parts)))


def tag(name: str, content: object = "", **attributes: object) -> Html:
    """An element. attributes: by name, `class_` and `data_x` as `class` and `data-x`."""
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()]
    return Html(f"<{name}{''.join(pairs)}>{escape(content)}</{name}>")


def section(name: str, title: str, *content: object) -> Html:
    """A part of the page that its contents name."""
    return tag("section", join((tag("h2", title), *content), "\n"), id=name)


def details(summary: object, *content: object, class_: str = "more") -> Html:
    """What is shown when it is asked for."""
    return tag("details", join((tag("summary", summary), *content), "\n"), class_=class_)


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, numbers_from: int = 1
) -> Html:
    """A table in a box that scrolls; columns before `numbers_from` are texts, the first names the row."""
    lines = []
    for row in rows:
        cells = [tag("th", row[0], scope="row")]
        cells += [
            tag("td", value, class_="text") if place < numbers_from else tag("td", value)
            for place, value in enumerate(row[1:], start=1)
        ]
        lines.append(tag("tr", join(cells)))
    titles = [
        tag("th", title, scope="col", class_="text")
        if place < numbers_from
        else tag("th", title, scope="col")
        for place, title in enumerate(head)
    ]
    content = (tag("thead", tag("tr", join(titles))), tag("tbody", join(lines, "\n")))
    box = tag(
        "div", tag("table", join(content)), class_="scroll", tabindex=0, role="region", aria_label=caption
    )
    above = tag("p", caption, class_="caption")  # not in the table: it stays when that scrolls
    return tag("div", join((above, box), "\n"), class_="table")


def figure(drawing: object, caption: object, title: object = "") -> Html:
    """A drawing with what it is above it and what is to be said of it below."""
    parts = [tag("p", title, class_="title")] if title else []
    parts.append(Html(escape(drawing)))
    parts += [tag("figcaption", caption)] if caption else []
    return tag("figure", join(parts, "\n"))


def reproduce(commands: Sequence[str], stood_on: str = "") -> Html:
    """How a figure is made again: commands, and what it stood on."""
    note = [tag("p", stood_on)] if stood_on else []
    return details("Reproduce", listing(commands), *note, class_="how")


def listing(commands: Sequence[str]) -> Html:
    """Commands, each a paragraph of its own."""
    return tag("pre", join(map(typed, commands)))


def typed(command: str) -> Html:
    """A command, whose lines break between words and not after a flag's hyphens."""
    return tag("code", join((tag("span", word) for word in command.split(" ")), " "))


def missing(what: str, command: str = "", does: str = "makes it") -> Html:
    """One line for a part that a run lacks, and the command that makes it."""
    made = join((": ", typed(command), f" {does}.")) if command else "."
    return tag("p", join((what, made)), class_="missing")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values in a strip."""
    return tag("dl", join(tag("div", join((tag("dt", k), tag("dd", v)))) for k, v in pairs), class_="facts")


def facts_line(stood_on: Mapping[str, Any]) -> str:
    """Commit, versions and device in a line; what is not known is left out."""
    versions = stood_on.get("versions")
    known = versions if isinstance(versions, dict) else {}
    parts = [f"commit {stood_on['commit']}"] if stood_on.get("commit") else []
    parts += [f"{name} {version}" for name, version in known.items() if version]
    parts += [str(stood_on["device"])] if stood_on.get("device") else []
    threads = stood_on.get("threads")
    parts += [f"{threads} thread{'s' * (threads != 1)}"] if threads else []
    return ", ".join(parts)


def number(value: float, digits: int = 1) -> str:
    """A number, or a dash for what is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def mean_std(mean: float, std: float, repeats: int, digits: int = 1) -> str:
    """Mean and standard deviation; of one repeat its value."""
    if not math.isfinite(mean):
        return DASH
    return number(mean, digits) + (f" ± {number(std, digits)}" if repeats > 1 else "")


def document(title: str, *content: object) -> bytes:
    """The whole page: nothing in it is loaded from elsewhere, and no script runs."""
    head = (
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
    )
    body = tag("main", join(content, "\n"))
    lines = (
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        *head,
        "</head>",
        f"<body>{body}</body>",
        "</html>",
    )
    return ("\n".join(lines) + "\n").encode()
