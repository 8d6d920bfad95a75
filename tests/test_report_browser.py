"""The pages as a headless Chromium shows them: nothing sticks out or is loaded, all text is readable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from acs_fast.report import compare, write_report
from tests.browser import Browser, find_chromium
from tests.report_runs import ODD, evaluation, redundancy, write_run

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="there is no chromium on this machine")
VIEWS = [(width, dark) for width in (1280, 400) for dark in (False, True)]
VIEW_NAMES = [f"{width}-{'dark' if dark else 'light'}" for width, dark in VIEWS]

SCROLLS = """const scrolls = e => ![document.documentElement, document.body].includes(e)
  && getComputedStyle(e).overflowX !== 'visible';"""

# elements beyond the window's edge that are not in a box which scrolls
OUTSIDE = """
(() => {
  SCROLLS
  const boxed = e => { for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) return true;
    return false };
  return [...document.body.querySelectorAll('*')].filter(e => {
    const r = e.getBoundingClientRect();
    return r.width && (r.right > innerWidth + 0.5 || r.left < -0.5) && !boxed(e);
  }).map(e => `${e.tagName}.${e.getAttribute('class')}: ${(e.textContent || '').slice(0, 40)}`);
})()
""".replace("SCROLLS", SCROLLS)

# texts whose contrast with what lies behind them is under 4.5 (WCAG 2, AA), and how many were looked at
CONTRAST = """
(() => {
  SCROLLS
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const rgba = c => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = c; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255] };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const paint = e => {
    const s = getComputedStyle(e), shape = e instanceof SVGElement && e.tagName !== 'svg';
    return shape ? (s.fill === 'none' ? [0, 0, 0, 0] : rgba(s.fill)) : rgba(s.backgroundColor) };
  const found = []; let count = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    if (!node.textContent.trim()) continue;
    const e = node.parentElement, range = document.createRange(), drawn = e instanceof SVGElement;
    if (!e.checkVisibility()) continue;  // within what is folded
    range.selectNodeContents(node);
    e.scrollIntoView({block: 'center', inline: 'center'});
    for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) {  // cells may be wider
      const [t, b] = [range.getClientRects()[0], p.getBoundingClientRect()];
      if (t) p.scrollLeft += t.left + t.width / 2 - b.left - b.width / 2;
    }
    const r = range.getClientRects()[0];
    if (!r || !r.width) continue;
    const stack = document.elementsFromPoint(r.left + r.width / 2, r.top + r.height / 2);
    if (!stack.includes(e)) { found.push(`covered ${e.tagName} ${node.textContent.trim()}`); continue }
    const below = stack.slice(stack.indexOf(e) + 1);
    let ground = [255, 255, 255, 1];
    for (const b of [...below.reverse(), ...(drawn ? [] : [e])]) ground = over(paint(b), ground);
    const style = getComputedStyle(e), ink = over(rgba(drawn ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    count += 1;
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.tagName} ${node.textContent.trim().slice(0, 40)}`);
  }
  return {count, found};
})()
""".replace("SCROLLS", SCROLLS)
OPEN = "for (const e of document.querySelectorAll('details:not(.sheet)')) e.open = true"
WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all."""
    program = find_chromium()
    assert program is not None
    with Browser(program) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of everything, one of a run with nothing, one of two runs, with names that are hard to show."""
    folder = tmp_path_factory.mktemp("pages")
    strange = "a-run-whose-name-is-long-and-<script>alert(1)</script>-odd".replace("/", "")
    full = {
        "evaluations": [evaluation(), evaluation(protocol="hard-sgd", seed=2)],
        "redundancy": redundancy(),
    }
    one = write_run(folder / strange, ODD, full)
    two = write_run(folder / "two", ODD, {"evaluations": [evaluation()], "redundancy": redundancy()}, seed=1)
    bare = write_run(folder / "bare", guidance_scale=0.0)
    for name in ("manifest.jsonl", "contact_sheet.png", "curricula.json", "logs/rank-0.log"):
        (bare / name).unlink()
    both = compare([one, two], folder / "comparison.html")
    return {"run": write_report(one), "bare": write_report(bare), "comparison": both}


@pytest.mark.parametrize("name", ["run", "bare", "comparison"])
@pytest.mark.parametrize(("width", "dark"), VIEWS, ids=VIEW_NAMES)
def test_the_page_fits_and_can_be_read(browser: Browser, pages, name: str, width: int, dark: bool) -> None:
    browser.open(pages[name], width, dark)
    for script in ("0", OPEN):  # as it is, and with everything unfolded
        browser.run(script)
        scrolled, inner = browser.run(WIDTHS)
        assert inner == width and scrolled <= width
        assert browser.run(OUTSIDE) == []
        contrast = browser.run(CONTRAST)
        assert contrast["found"] == [] and contrast["count"] > 20
    assert browser.problems == []


def test_the_two_schemes_differ_and_paper_is_light(browser: Browser, pages) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for medium, dark in (("screen", False), ("screen", True), ("print", True)):
        browser.open(pages["run"], 1280, dark, medium)
        seen[medium, dark] = browser.run(ground)
    assert seen["screen", False] == seen["print", True] == "rgb(255, 255, 255)" != seen["screen", True]


def test_a_click_on_the_sheet_enlarges_it(browser: Browser, pages) -> None:
    browser.open(pages["run"], 400)
    width = "document.querySelector('.sheet img').getBoundingClientRect().width"
    small = browser.run(width)
    browser.run("document.querySelector('.sheet summary').click()")
    assert browser.run(width) > 1.5 * small
    assert browser.run(OUTSIDE) == []
    browser.run("document.querySelector('.sheet summary').click()")
    assert browser.run(width) == small


def test_links_of_the_contents_lead_somewhere_and_ids_are_unique(browser: Browser, pages) -> None:
    for name in ("run", "comparison"):
        browser.open(pages[name], 1280)
        ids = browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
        links = browser.run("[...document.querySelectorAll('a[href]')].map(e => e.getAttribute('href'))")
        uses = browser.run("[...document.querySelectorAll('use')].map(e => e.getAttribute('xlink:href'))")
        assert len(ids) == len(set(ids)) and uses
        assert {link.removeprefix("#") for link in [*links, *uses]} <= set(ids)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("</h1>", "</h1><div style='width: 2000px'>wide</div>", OUTSIDE),
        ("--ink: #e8eaee", "--ink: #3a3d44", CONTRAST),
        ("--t7: #0b1220; --t8: #0b1220", "--t7: #0b1220; --t8: #e8eaee", CONTRAST),
        ("</h1>", "</h1><script>console.error('no')</script>", None),
        ("</h1>", "</h1><img alt='' src='elsewhere.png'>", None),
        ("</h1>", "</h1><style>@import 'https://example.invalid/a.css'</style>", None),
    ],
    ids=["wide", "ink", "heat", "console", "image", "import"],
)
def test_the_checks_find_what_they_look_for(browser: Browser, pages, tmp_path, old, new, what) -> None:
    text = pages["run"].read_text()
    assert old in text
    (tmp_path / "broken.html").write_text(text.replace(old, new, 1))
    browser.open(tmp_path / "broken.html", 400, dark=True)
    if what is None:
        browser.run("new Promise(done => setTimeout(done, 100))")
        assert browser.problems
    elif what == OUTSIDE:
        scrolled, width = browser.run(WIDTHS)
        assert browser.run(OUTSIDE) and scrolled > width
    else:
        assert browser.run(CONTRAST)["found"]
