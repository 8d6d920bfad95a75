"""The drawings of the pages: matplotlib's SVG with text as text, in the colours of the page's style.

matplotlib draws in colours that stand for names (`INK` and so on); in the SVG they become the style's
variables, so one drawing serves the light and the dark scheme and print. The same values give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from acs_fast.report.markup import Html, escape, join, tag
from acs_fast.report.results import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
NAMES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
FAMILIES = {"02": "c", "03": "h", "04": "t"}  # #0102xx is var(--cx): of series, heat, text on heat
SERIES, HEAT = 7, 9  # colours of each kind in the style
MARKERS = "os^DvPX"
ORDER = (
    "distilled",
    "plain",
    "random real",
    "herding",
    "k-centre",
    "plain, repulsion",
)  # who has which colour
PIXELS = 72  # an inch of matplotlib's is as many px of the page
NUMBERED = 12  # increments: larger matrices have no numbers in their cells


@dataclass(frozen=True)
class Line:
    """A line with error bars; std may be NaN."""

    name: str
    series: int
    x: Sequence[float]
    scores: Sequence[Score]
    hollow: bool = False


@dataclass(frozen=True)
class Row:
    """A row of `dots`: its label beside the drawing, its name in words, best and last accuracy."""

    label: str
    name: str
    series: int
    best: Score
    last: Score


def series_of(names: Sequence[str]) -> dict[str, int]:
    """The place of each name among the series' colours and markers: the known sets always have the same."""
    free = itertools.cycle([*range(len(ORDER), SERIES), *range(SERIES)])
    return {name: ORDER.index(name) if name in ORDER else next(free) for name in names}


def colour(series: int) -> str:
    """The colour that stands for that of a series."""
    return f"#0102{series % SERIES:02x}"


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, and ours."""
    # deferred: only the report draws, and the import takes half a second
    import matplotlib.style

    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "acs-fast",
        "font.size": 12,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "lines.linewidth": 2.0,
        "lines.markersize": 6.5,
    }
    with matplotlib.style.context(["default", ours]):
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A drawing of so many px with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / PIXELS, height / PIXELS), layout="constrained")
    figure.patch.set_visible(False)
    return figure, figure.subplots()


def svg(figure: Figure, name: str, description: str) -> Html:
    """The drawing as an element of the page. name: prefix of its ids, unlike any other on the page."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", "", text, flags=re.S
    )
    used = set(re.findall(r"<[^>]*(?:href=\"#|url\(#)([^\")]+)", text))
    ids = {identity: f"{name}-{number}" for number, identity in enumerate(sorted(used))}
    text = re.sub(r"<[^>]*>", lambda match: adapted(match[0], ids), text)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None
    head = (
        f'<svg class="plot" role="img" aria-label="{escape(description)}" viewBox="{box[0][9:-1]}" '
        f'width="{float(box[1]):.0f}" height="{float(box[2]):.0f}">'
    )
    body = re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :])
    return Html(head + body.strip())


def adapted(element: str, ids: Mapping[str, str]) -> str:
    """An opening tag with the page's colours, font and ids; ids that nothing refers to go."""
    element = re.sub(r"#010[1-4]0[0-9a-f]\b", lambda match: name_of(match[0]), element)
    element = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", element)
    element = re.sub(r' id="([^"]*)"', lambda m: f' id="{ids[m[1]]}"' if m[1] in ids else "", element)
    return re.sub(r"(href=\"#|url\(#)([^\")]+)", lambda m: m[1] + ids[m[2]], element)


def name_of(sentinel: str) -> str:
    """The style's name for a colour that stands for it."""
    if sentinel in NAMES:
        return NAMES[sentinel]
    return f"var(--{FAMILIES[sentinel[3:5]]}{int(sentinel[5:], 16)})"


def legend(names: Mapping[str, int], note: Sequence[tuple[str, bool]] = ()) -> Html:
    """The names of the series beside their markers; note: further words, each with a full or hollow point."""
    items = [
        tag("li", join((key(series, f"var(--c{series % SERIES})", False), name)))
        for name, series in names.items()
    ]
    items += [tag("li", join((key(0, "currentColor", hollow), text))) for text, hollow in note]
    return tag("ul", join(items), class_="legend")


def key(series: int, paint: str, hollow: bool) -> Html:
    """One marker as in the drawings."""
    shapes = {
        "o": '<circle cx="8" cy="7" r="4"/>',
        "s": '<rect x="4" y="3" width="8" height="8"/>',
        "^": '<path d="M8 2.5 12.5 11h-9z"/>',
        "D": '<path d="M8 2 13 7 8 12 3 7z"/>',
        "v": '<path d="M8 11.5 12.5 3h-9z"/>',
        "P": '<path d="M6.2 2.5h3.6v2.7h2.7v3.6H9.8v2.7H6.2V8.8H3.5V5.2h2.7z"/>',
        "X": '<path d="M5.5 2.5 8 5l2.5-2.5 2 2L10 7l2.5 2.5-2 2L8 9l-2.5 2.5-2-2L6 7 3.5 4.5z"/>',
    }
    fill = "var(--paper)" if hollow else paint
    shape = shapes[MARKERS[series % SERIES]]
    return Html(
        f'<svg width="16" height="14" viewBox="0 0 16 14" aria-hidden="true" '
        f'style="fill: {fill}; stroke: {paint}; stroke-width: 1.5">{shape}</svg>'
    )


def dots(name: str, rows: Sequence[Row], what: str) -> Html:
    """Accuracies as points with error bars, best hollow and last full, the repeats as strokes."""
    with style():
        gaps = [1.4 if row.label else 1.0 for row in rows]  # between the sets, if there are several runs
        places = [height - gaps[0] for height in itertools.accumulate(gaps)]
        figure, axes = canvas(440, 58 + 30 * sum(gaps))
        for place, row in zip(places, rows, strict=True):
            paint = colour(row.series)
            for score, up, fill in ((row.best, -0.17, PAPER), (row.last, 0.17, paint)):
                if not math.isfinite(score.mean):
                    continue
                y = place + up
                axes.plot(score.values, [y] * len(score.values), "|", ms=7, mew=1.2, color=MUTED, zorder=2)
                axes.errorbar(
                    score.mean, y, xerr=error(score), fmt=MARKERS[row.series % SERIES], color=paint,
                    mfc=fill, mec=paint, mew=1.6, ms=8, elinewidth=2, capsize=3.5, zorder=3,
                )  # fmt: skip
        axes.set(ylim=(places[-1] + 0.65, -0.65), xlabel=what)
        axes.set_yticks(places, [shortened(row.label) for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        text = "; ".join(f"{row.name}: best {spoken(row.best)}, last {spoken(row.last)}" for row in rows)
        return svg(figure, name, f"{what}. {text}")


def curves(
    name: str, lines: Sequence[Line], across: str, up: str, limits: tuple[float, float] | None = None
) -> Html:
    """Lines with markers and error bars over whole numbers. limits: of the y axis; default: as they need."""
    with style():
        figure, axes = canvas(400, 260)
        for line in lines:
            paint, marker = colour(line.series), MARKERS[line.series % SERIES]
            axes.errorbar(
                line.x, [s.mean for s in line.scores], yerr=[error(s) or 0.0 for s in line.scores],
                marker=marker, color=paint, mfc=PAPER if line.hollow else paint, mec=paint, mew=1.6,
                ls="--" if line.hollow else "-", elinewidth=1.6, capsize=3,
            )  # fmt: skip
        axes.set(xlabel=across, ylabel=up)
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks[:: math.ceil(len(ticks) / NUMBERED)])
        if limits:
            axes.set_ylim(limits)
        text = "; ".join(f"{line.name}: {', '.join(spoken(s) for s in line.scores)}" for line in lines)
        return svg(figure, name, f"{up} by {across}. {text}")


def limits_of(lines: Iterable[Line]) -> tuple[float, float] | None:
    """A y axis that bears all these lines with their error bars; None where nothing is known."""
    scores = [score for line in lines for score in line.scores if math.isfinite(score.mean)]
    if not scores:
        return None
    low = min(score.mean - (error(score) or 0.0) for score in scores)
    high = max(score.mean + (error(score) or 0.0) for score in scores)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def spikes(name: str, rows: Sequence[tuple[int, float, float]], series: tuple[int, int] = (0, 1)) -> Html:
    """Loss before and after by curriculum, joined by a line each. rows: curriculum, before, after."""
    with style():
        figure, axes = canvas(400, 260)
        numbers, before, after = zip(*rows, strict=True)
        axes.vlines(numbers, before, after, color=MUTED, lw=1.6, zorder=2)
        for values, place in ((before, series[0]), (after, series[1])):
            axes.plot(numbers, values, MARKERS[place], color=colour(place), ms=8, zorder=3)
        axes.set(xlabel="curriculum", ylabel="mean cross-entropy")
        axes.margins(x=0.1, y=0.15)
        if len(numbers) <= NUMBERED:
            axes.set_xticks(numbers)
        text = "; ".join(f"{n}: {b:.2f} before, {a:.2f} after" for n, b, a in rows)
        return svg(figure, name, f"discriminator loss by curriculum. {text}")


def bars(name: str, rows: Sequence[tuple[str, float, float]]) -> Html:
    """Expected (hollow) against actual seconds. rows: part, expected, actual."""
    with style():
        figure, axes = canvas(400, 60 + 42 * len(rows))
        paint = colour(0)
        for place, (_, expected, actual) in enumerate(rows):
            axes.barh(place - 0.19, expected, 0.32, facecolor=PAPER, edgecolor=paint, linewidth=1.6)
            axes.barh(place + 0.19, actual, 0.32, facecolor=paint, edgecolor=paint, linewidth=1.6)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="seconds")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        text = "; ".join(f"{part}: {e:.3g} s expected, {a:.3g} s taken" for part, e, a in rows)
        return svg(figure, name, f"plan against actual time. {text}")


def heat_map(name: str, matrix: Sequence[Sequence[float]], limits: tuple[float, float], of: str) -> Html:
    """A matrix in percent as coloured cells with their numbers. limits: those of faintest and strongest."""
    from matplotlib.patches import Rectangle

    size = len(matrix)
    cell = max(6.0, min(46.0, 300 / size))
    with style():
        figure, axes = canvas(max(150.0, cell * size + 62), max(140.0, cell * size + 58))
        for i, j in itertools.product(range(size), repeat=2):
            value = matrix[i][j]
            level = heat_level(value, limits)
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=f"#0103{level:02x}", edgecolor=PAPER, lw=1.5))
            if size <= NUMBERED and math.isfinite(value):
                text = f"{value:.0f}" if value >= 99.95 or size > 8 else f"{value:.1f}"
                axes.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center", color=f"#0104{level:02x}", size=11
                )
        axes.set(xlim=(0, size), ylim=(size, 0), xlabel="tested on increment", ylabel="trained on increment")
        axes.set_aspect("equal")
        step = 1 if size <= NUMBERED else math.ceil(size / 8)
        places = range(0, size, step)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([place + 0.5 for place in places], [str(place + 1) for place in places])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, name, f"cross-increment accuracy of {of}, percent: {spoken_matrix(matrix)}")


def heat_level(value: float, limits: tuple[float, float]) -> int:
    """The place of a value among the colours of heat; the faintest for one that is not known."""
    low, high = limits
    if not math.isfinite(value):
        return 0
    return max(0, min(HEAT - 1, int(HEAT * (value - low) / (high - low)))) if high > low else HEAT // 2


def error(score: Score) -> float | None:
    """The length of an error bar; None where it is not known."""
    return score.std if math.isfinite(score.std) else None


def shortened(text: str, most: int = 26) -> str:
    """A label that fits beside a drawing."""
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def spoken(score: Score) -> str:
    """A score for those who cannot see the drawing."""
    return f"{score.mean:.1f} ± {score.std:.1f}"


def spoken_matrix(matrix: Sequence[Sequence[float]]) -> str:
    """The rows of a matrix in words; the size alone of a large one."""
    if len(matrix) > NUMBERED:
        return f"{len(matrix)} by {len(matrix)}"
    return "; ".join(
        f"row {i}: {', '.join(f'{v:.0f}' for v in row)}" for i, row in enumerate(matrix, start=1)
    )
