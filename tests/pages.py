"""What a page of the documentation holds: its code blocks and the command lines in them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.run import get_args_parser

from acs_fast.cli import given, make_parser
from acs_fast.config import (
    BenchConfig,
    Configuration,
    DistillConfig,
    EncodeConfig,
    EvaluateConfig,
    TrainConfig,
    resolve,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*.md")])
CONFIGURATIONS: dict[str, type[Configuration]] = {
    "bench": BenchConfig,
    "distill": DistillConfig,
    "encode": EncodeConfig,
    "evaluate": EvaluateConfig,
    "train": TrainConfig,
}
STARTS = ("acs-fast ", "torchrun ", "python -m acs_fast ", "srun ")
BLOCK = re.compile(
    r"^(?:<!-- notest: (?P<reason>[^\n]*?) -->\n+)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of the page where its text begins (from 1), the text.

    reason: why it cannot run here, said by the line `<!-- notest: REASON -->` above the fence; None: it can.
    """

    language: str
    line: int
    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, top to bottom."""
    return [
        Block(m["language"], page[: m.start("text")].count("\n") + 1, m["text"], m["reason"])
        for m in BLOCK.finditer(page)
    ]


def script(page: str) -> str:
    """The Python blocks of a page that can run here as one file, each on its lines of the page."""
    lines = [""] * (page.count("\n") + 1)
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            text = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(text)] = text
    return "\n".join(lines).rstrip("\n") + "\n"


def commands(page: str) -> list[list[str]]:
    """Every command line of ours in the fenced and indented blocks of a page, in words.

    A comment, an `&` at the end and what stands before `torchrun` (`srun --flag=...`) are cut off.
    """
    text = re.sub(r" *\\\n *", " ", page)
    lines = [line.split(" #")[0].strip().rstrip("&") for line in text.splitlines()]
    return [shlex.split(re.sub(r"^srun \S+ ", "", line)) for line in lines if line.startswith(STARTS)]


def mentions(page: str) -> list[list[str]]:
    """Every `command` in the sentences of a page, in words, with `...`: it need not be a whole one."""
    found = re.findall(r"(?<!`)`((?:acs-fast|torchrun|python -m acs_fast) [^`]+)`", page)
    return [[*shlex.split(code), "..."] for code in found]


def check_command(words: list[str]) -> None:
    """AssertionError unless the parsers take this command; with `...` its flags alone are looked up."""
    rest, parts = words[1:], any("..." in word for word in words)
    if words[0] == "torchrun" and "-m" not in rest:  # `torchrun --flag` in a sentence
        known = get_args_parser().format_help()
        assert all(word in known for word in rest if word.startswith("--")), words
        return
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(rest)
        assert args.module and args.training_script == "acs_fast", words
        rest = args.training_script_args
    elif words[0] == "python":
        rest = words[3:]
    if parts:
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= flags(rest[0]), words
    else:
        check_arguments(rest)


def check_arguments(rest: list[str]) -> None:
    """AssertionError unless `acs-fast REST` is a command with flags and values that are taken."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            args = make_parser().parse_args(rest)
        except SystemExit:
            why = said.getvalue().rpartition("error: ")[2].strip()
            raise AssertionError(f"acs-fast {shlex.join(rest)}: {why}") from None
    cls = CONFIGURATIONS.get(rest[0])
    if cls is None or "--config" in rest:  # a file that is not here
        return
    settings = {name: value for name, value in given(args, cls).items() if name in fields(cls)}
    try:
        resolve(cls, settings)
    except ValueError as error:
        raise AssertionError(f"acs-fast {shlex.join(rest)}: {error}") from None


def fields(cls: type[Configuration]) -> set[str]:
    """The settings of a configuration."""
    return {field.name for field in dataclasses.fields(cls)}


def flags(command: str) -> set[str]:
    """The flags of a command, AssertionError for one that there is not."""
    parsers = make_parser()._subparsers
    assert parsers is not None
    choices = parsers._group_actions[0].choices
    assert choices is not None and command in choices, f"there is no command {command}"
    return {flag for action in choices[command]._actions for flag in action.option_strings}
