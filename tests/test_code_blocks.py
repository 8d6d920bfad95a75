"""The code of the pages: Python blocks run, command lines are taken by the parsers, the rest says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, blocks, check_command, commands, mentions, script

SECONDS = 180  # for all blocks of a page
LANGUAGES = {"python", "bash", "console", "json", "yaml", "toml", "text"}
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
BLOCKS = [(name, block) for name, text in TEXTS.items() for block in blocks(text)]
RUN = sorted({name for name, block in BLOCKS if block.language == "python" and block.reason is None})
LEFT_OUT = [(name, block) for name, block in BLOCKS if block.reason is not None]
COMMANDS = [(name, words) for name, text in TEXTS.items() for words in commands(text) + mentions(text)]


@pytest.mark.parametrize("name", RUN)
def test_the_python_blocks_of_a_page_run_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{Path(name).stem}.py"
    path.write_text(script(TEXTS[name]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, path.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{name}, whose lines these are:\n{done.stderr[-3000:]}"


def test_blocks_that_cannot_run_here_say_why() -> None:
    for name, block in LEFT_OUT:
        assert block.reason and block.reason.startswith(("needs ", "is ")), f"{name}, line {block.line}"
        if block.language == "python":
            compile(block.text, name, "exec")
    if LEFT_OUT:  # pytest's summary lists what is skipped
        pytest.skip("; ".join(f"{name}, line {block.line}: {block.reason}" for name, block in LEFT_OUT))


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_says_its_language(name: str) -> None:
    text = TEXTS[name]
    found = blocks(text)
    assert text.count("```") == 2 * len(found), "a block is not closed, indented or inside another one"
    assert {block.language for block in found} <= LANGUAGES
    assert len(re.findall("^<!-- notest", text, re.M)) == sum(block.reason is not None for block in found)


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_the_commands_of_a_page_are_taken_by_the_parsers(name: str) -> None:
    for words in (words for page, words in COMMANDS if page == name):
        check_command(words)


def test_commands_are_found_however_a_page_writes_them() -> None:
    page = (
        "    acs-fast distill --ipc 5 \\\n        --out runs/a    # why\n\n"
        "text `acs-fast report\nRUN` text\n\n"
        "```bash\nsrun --cpus=4 torchrun --nnodes 2 -m acs_fast env &\n```\n"
    )
    assert commands(page) == [
        ["acs-fast", "distill", "--ipc", "5", "--out", "runs/a"],
        ["torchrun", "--nnodes", "2", "-m", "acs_fast", "env"],
    ]
    assert mentions(page) == [["acs-fast", "report", "RUN", "..."]]


@pytest.mark.parametrize(
    "line",
    [
        "acs-fast distil",
        "acs-fast distill --images 5",
        "acs-fast distill --images ...",
        "acs-fast distill --ipc many",
        "acs-fast distill --ipc 2 --num-curricula 3",
        "acs-fast evaluate RUN --protocol hard",
        "torchrun --no-such-flag 30",
        "torchrun --nproc-per-node 2 -m acs_fast distill --images 5",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line.split())


def test_blocks_keep_their_lines_and_their_reasons() -> None:
    page = (
        "# A\n\n```python\na = 1\n```\n\n"
        "<!-- notest: needs a GPU -->\n```python\nb\n```\n\n```python\nc = a\n```\n"
    )
    assert [(b.line, b.reason) for b in blocks(page)] == [(4, None), (9, "needs a GPU"), (13, None)]
    assert script(page).splitlines() == ["", "", "", "a = 1", *[""] * 8, "c = a"]
