"""The documentation's site: built without a warning, with an entry for every public name, loading nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import acs_fast
from tests.browser import Browser, find_chromium
from tests.pages import CONFIGURATIONS, ROOT

if not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers")):
    pytest.skip("mkdocs-material and mkdocstrings[python] are not installed", allow_module_level=True)

LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
HTML = """
a abbr article aside body br button code details div em footer form h1 h2 h3 h4 h5 h6 head header hr html img
input label li link main meta nav ol p path pre script small span strong sub summary sup svg table tbody td th
thead title tr ul
"""
TAGS = set(HTML.split())


class Page(HTMLParser):
    """What a page holds: tags, ids, addresses that it loads, its text, the same without code."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.text = self.prose = ""
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.ids.add(given.get("id") or "")
        self._code += tag in ("code", "script")
        if tag in LOADING:
            self.loads.append(given.get(LOADING[tag]) or "")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "script")

    def handle_data(self, data: str) -> None:
        self.text += data
        self.prose += "" if self._code else data


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages by name, of a strict build."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]  # `--quiet` would not count warnings
    assert not list(out.rglob("*.py"))
    return {path.name: Page(path) for path in out.glob("*.html")}


def test_every_page_of_the_documentation_is_there(pages) -> None:
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {Path(name).stem for name in pages}


def test_every_public_name_has_an_entry(pages) -> None:
    entries = {name.rpartition(".")[2] for name in pages["api.html"].ids if name.startswith("acs_fast.")}
    assert set(acs_fast.__all__) <= entries


def test_every_setting_of_the_public_configurations_is_explained(pages) -> None:
    for cls in CONFIGURATIONS.values():
        if cls.__name__ not in acs_fast.__all__:
            continue
        for field in dataclasses.fields(cls):
            assert f"acs_fast.{cls.__name__}.{field.name}" in pages["api.html"].ids, field.name
            assert field.metadata["help"].replace("`", "") in pages["api.html"].text


def test_nothing_is_left_unrendered(pages) -> None:
    for name, page in pages.items():
        assert ":::" not in page.prose, name
        assert page.tags <= TAGS, f"{name}: <{'>, <'.join(page.tags - TAGS)}> is text that became a tag"


def test_the_pages_load_nothing_from_elsewhere(pages) -> None:
    for name, page in pages.items():
        assert page.loads and not [url for url in page.loads if re.match(r"(https?:)?//", url)], name


@pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium")
def test_the_pages_fit_and_the_browser_loads_nothing_from_elsewhere(pages) -> None:
    program = find_chromium()
    assert program is not None
    with Browser(program) as browser:
        for name, page in pages.items():
            if name == "404.html":  # its addresses are a server's
                continue
            for width in (1280, 400):
                browser.open(page.path, width)
                assert browser.run("document.documentElement.scrollWidth") <= width, (name, width)
                loaded = [problem for problem in browser.problems if "request: file:" not in problem]
                assert loaded == [], name
