"""The report's charts: numbers → SVG to stand inside a page, in its font and in its colours, light or dark.

matplotlib draws them in colours that only stand for something (`INK`, `FIRST` …); each becomes the page's CSS variable
of that name. Charts are some 400 units wide, so that a phone shows their text at nearly full size.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

INK, MUTED, LINE, FAINT, CARD, FIRST, SECOND, THIRD = (f"#00000{n}" for n in range(1, 9))
# The page declares each of these, for both themes.
VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, FAINT, CARD, FIRST, SECOND, THIRD),
        ("--ink", "--muted", "--line", "--faint", "--card", "--first", "--second", "--third"),
        strict=True,
    )
)

WIDTH = 400.0
TEXT, SMALL = 12.5, 11.5
# Mean advance of a sans-serif's letters as a share of its size; what the page will really use is not known here.
ADVANCE = 0.54


@dataclass(frozen=True)
class Words:
    """What a chart is called: `name` makes its ids unique in the page, `title` and `text` are for those who listen."""

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Scale:
    """What a verdict is counted in, from `low` to `high`, with the values that are written along it.

    Its 41 bins have both ends and what lies between them at whole 40ths in their middles.
    """

    name: str
    low: float
    high: float
    ticks: Sequence[float]

    @property
    def edges(self) -> list[float]:
        """Of the bins."""
        step = (self.high - self.low) / 40
        return [round(self.low + (n - 0.5) * step, 4) for n in range(42)]


@dataclass(frozen=True)
class Level:
    """How many rows are left after a stage.

    `parts` (kind, n) say what they are made of, `dropped` (reason, n) what went; `aside` is a remark on rows that
    the level before did not hold.
    """

    label: str
    count: int
    parts: tuple[tuple[str, int], ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()
    aside: str = ""


@dataclass(frozen=True)
class Ridge:
    """One distribution among several: counts by bin, what is said at both ends of its line, and a marked value."""

    label: str
    value: str
    counts: Sequence[int]
    colour: str = FIRST
    mark: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, where it has one. `filled` dots are the ones that matter most; `mark` is another
    figure to hold it against."""

    label: str
    value: str
    middle: float
    interval: tuple[float, float] | None
    colour: str = FIRST
    filled: bool = True
    mark: float | None = None


@dataclass(frozen=True)
class Curve:
    """What a training logged by step, with the bounds of its axis; `smooth` is its running mean, or empty."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]
    bounds: tuple[float, float]
    smooth: Sequence[float] = ()


def waterfall(levels: Sequence[Level], words: Words) -> str:
    """A bar a level, all from one zero: what is left, and pale behind it what was dropped on the way there."""
    wholes = [level.count + sum(n for _, n in level.dropped) for level in levels]
    told = [_wrapped(_told(level)) for level in levels]
    tall = [42.0 + 15 * len(lines) for lines in told]
    most = max(wholes, default=0) or 1
    height = sum(tall) - 8
    with _figure(WIDTH, height) as figure:
        axes, top = _plain(figure, WIDTH, height), 0.0
        for level, whole, lines, each in zip(levels, wholes, told, tall, strict=True):
            _ends(axes, top + 12, level.label, f"{level.count:,}", WIDTH)
            _bar(axes, top + 18, 12, level.count / most, whole / most, FAINT)
            left = 0
            for colour, (_, n) in zip((FIRST, SECOND, THIRD), level.parts or (("", level.count),), strict=False):
                _bar(axes, top + 18, 12, left / most, (left + n) / most, colour)
                left += n
            for number, line in enumerate(lines):
                _text(axes, 0, top + 44 + 15 * number, line, MUTED, SMALL)
            top += each
    return _svg(figure, words)


def histogram(below: Sequence[int], above: Sequence[int], scale: Scale, threshold: float | None, words: Words) -> str:
    """Counts by bin, told apart at the threshold by a line and by colour."""
    height, edges = 196.0, scale.edges
    with _figure(WIDTH, height) as figure:
        axes = _axes(figure, (36, 20, WIDTH - 4, height - 22), height)
        whole = [a + b for a, b in zip(below, above, strict=True)]
        axes.stairs(whole, edges, fill=True, color=FIRST, linewidth=0)
        axes.stairs(below, edges, fill=True, color=MUTED, linewidth=0)
        _span(axes, scale)
        axes.set_ylim(0, max(1, *whole) * 1.04)
        axes.yaxis.set_major_locator(_locator(4, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        plain = _plain(figure, WIDTH, height)
        _text(plain, 0, 12, "pairs", MUTED, SMALL)
        if threshold is not None:
            _mark_threshold(axes, plain, threshold, 36)
    return _svg(figure, words)


def ridges(rows: Sequence[Ridge], edges: Sequence[float], ticks: Sequence[tuple[float, str]], words: Words) -> str:
    """Distributions below each other, each scaled to its own highest bin. All bins are drawn equally wide."""
    each, foot = 72.0, 18.0
    height = each * len(rows) + foot
    with _figure(WIDTH, height) as figure:
        base = _plain(figure, WIDTH, height)
        for number, row in enumerate(rows):
            top = each * number
            _ends(base, top + 12, row.label, row.value, WIDTH)
            axes = _axes(figure, (1, top + 18, WIDTH - 1, top + each - 12), height)
            axes.set_axis_off()
            axes.set_xlim(0, len(row.counts))
            axes.set_ylim(0, max(1, *row.counts))
            axes.stairs(row.counts, fill=True, color=row.colour, linewidth=0)
            axes.axhline(0, color=MUTED, linewidth=1)
            if row.mark is not None:
                axes.axvline(_place(row.mark, edges), color=INK, linewidth=1.6)
        end = -math.inf
        for value, label in ticks:
            at = 1 + _place(value, edges) / (len(edges) - 1) * (WIDTH - 2)
            wide = len(label) * SMALL * ADVANCE
            left = min(max(at - wide / 2, 0), WIDTH - wide)
            if left > end + SMALL:
                _text(base, left + wide / 2, height - 5, label, MUTED, SMALL, "center")
                end = left + wide
    return _svg(figure, words)


def intervals(
    rows: Sequence[Estimate],
    words: Words,
    bounds: tuple[float, float] | None = None,
    percent: bool = False,
    reference: float | None = None,
    numbered: bool = True,
) -> str:
    """A dot and its 95% whisker a row, over one axis; `reference` is marked on each, or the row's own mark.

    Not `numbered`, the axis has no numbers: rows are measured in different things.
    """
    each, foot = 38.0, 22.0 if numbered else 2.0
    height = each * len(rows) + foot
    with _figure(WIDTH, height) as figure:
        axes = _axes(figure, (7, 0, WIDTH - 7, height - foot), height)
        axes.set_xlim(*(bounds or _bounds(rows)))
        axes.set_ylim(each * len(rows), 0)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(_locator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if percent else f"{value:g}")
        if not numbered:
            axes.set_axis_off()
        base = _plain(figure, WIDTH, height)
        for number, row in enumerate(rows):
            top = each * number
            line = top + 26
            _ends(base, top + 14, row.label, row.value, WIDTH)
            axes.axhline(line, color=LINE, linewidth=1)
            if (mark := reference if row.mark is None else row.mark) is not None:
                axes.plot([mark, mark], [line - 7, line + 7], color=MUTED, linewidth=1.2)
            if row.interval is not None:
                axes.plot(row.interval, [line, line], color=row.colour, linewidth=2.4, solid_capstyle="butt")
            _dot(axes, row.middle, line, row)
    return _svg(figure, words)


def before_and_after(rows: Sequence[tuple[str, int, int]], words: Words) -> str:
    """Two counts a row: pale what there was, full what is left of it."""
    each, most = 38.0, max((before for _, before, _ in rows), default=0) or 1
    height = each * len(rows)
    with _figure(WIDTH, height) as figure:
        axes = _plain(figure, WIDTH, height)
        for number, (label, before, after) in enumerate(rows):
            top = each * number
            _ends(axes, top + 12, label, f"{after:,} of {before:,}", WIDTH)
            _bar(axes, top + 18, 12, after / most, before / most, FAINT)
            _bar(axes, top + 18, 12, 0, after / most, FIRST)
    return _svg(figure, words)


def curve(found: Curve, last_step: float, marks: Sequence[float], words: Words, wide: bool) -> str:
    """What a training logged, by step, under its title; logarithmic where `bounds` span more than a factor of 20.

    Where there is a `smooth` line, the values themselves stand pale behind it. `marks` are the steps at which the
    training was resumed.
    """
    width, height = (332.0, 150.0) if wide else (158.0, 150.0)
    low, high = found.bounds
    left, top = 34.0, 34.0 if marks else 22.0
    with _figure(width, height) as figure:
        axes = _axes(figure, (left, top, width - 6, height - 22), height)
        if is_logarithmic(found.bounds):
            axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_xlim(0, max(last_step, 1))
        axes.set_yticks(_ticks_within(low, high), minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.xaxis.set_major_locator(_locator(3 if wide else 2, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        for mark in marks:
            axes.axvline(mark, color=MUTED, linewidth=1, dashes=(2, 2))
        alone = "o" if len(found.steps) == 1 else None
        if found.smooth:
            axes.plot(found.steps, found.values, color=MUTED, linewidth=0.8, alpha=0.6)
        line = found.smooth or found.values
        axes.plot(found.steps, line, color=FIRST, linewidth=2, marker=alone, markersize=6, clip_on=False)
        plain = _plain(figure, width, height)
        _text(plain, 0, 11, found.title, INK, SMALL)
        if wide and marks:
            # Once, for two marks may stand close together.
            share = marks[0] / max(last_step, 1)
            side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
            _text(plain, left + share * (width - 6 - left), 29, "resumed", MUTED, SMALL, side)
    return _svg(figure, words)


def by_epoch(points: Sequence[Estimate], words: Words, percent: bool = False) -> str:
    """Figures in the order of epochs, each with its 95% whisker, joined by a line; labels stand below."""
    height = 190.0
    low, high = _bounds(points)
    if percent:
        low, high = max(low, 0.0), min(high, 1.0)
    with _figure(WIDTH, height) as figure:
        axes = _axes(figure, (42, 6, WIDTH - 6, height - 22), height)
        axes.set_xlim(-0.5, len(points) - 0.5)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(_locator(4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if percent else f"{value:g}")
        # As many labels as have room, counted from the last.
        every = math.ceil(len(points) * max(len(point.label) for point in points) * SMALL * ADVANCE / (WIDTH - 80))
        shown = range(len(points) - 1, -1, -every)[::-1]
        axes.set_xticks(list(shown), [points[at].label for at in shown])
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.plot(range(len(points)), [point.middle for point in points], color=MUTED, linewidth=1)
        for at, point in enumerate(points):
            if point.interval is not None:
                axes.plot([at, at], point.interval, color=point.colour, linewidth=2, solid_capstyle="butt")
            _dot(axes, at, point.middle, point)
    return _svg(figure, words)


def reliability(points: Sequence[tuple[float, float]], scale: Scale, diagonal: bool, words: Words) -> str:
    """Shares of good pairs by verdict, with the line on which a probability keeps its word where there is a
    `diagonal`."""
    height = 220.0
    with _figure(WIDTH, height) as figure:
        axes, plain = _shares(figure, scale, height)
        _text(plain, 0, 12, "good pairs", MUTED, SMALL)
        if diagonal:
            axes.plot([scale.low, scale.high], [0, 1], color=MUTED, linewidth=1.2, dashes=(4, 2))
        axes.plot([x for x, _ in points], [y for _, y in points], color=FIRST, linewidth=1.4)
        for x, y in points:
            _dot(axes, x, y, Estimate("", "", x, None))
    return _svg(figure, words)


def by_threshold(
    lines: Sequence[tuple[str, Sequence[float]]],
    thresholds: Sequence[float],
    scale: Scale,
    threshold: float | None,
    words: Words,
) -> str:
    """Named shares of what is kept from each of `thresholds` on, and the threshold that was chosen."""
    height, left = 240.0, 0.0
    with _figure(WIDTH, height) as figure:
        axes, plain = _shares(figure, scale, height, top=40)
        for colour, (name, values) in zip((FIRST, SECOND, THIRD), lines, strict=False):
            # A share holds down to the next lower threshold.
            axes.plot(thresholds, values, color=colour, linewidth=2, drawstyle="steps-pre")
            _text(plain, left, 12, name, colour, SMALL)
            left += (len(name) + 3) * SMALL * ADVANCE
        if threshold is not None:
            _mark_threshold(axes, plain, threshold, 42, 32)
    return _svg(figure, words)


def scatter(
    points: Sequence[tuple[float, float]],
    scales: tuple[Scale, Scale],
    thresholds: tuple[float, float],
    names: tuple[str, str],
    words: Words,
) -> str:
    """Verdicts of two raters on the same pairs, told apart by who keeps them: both, one of them, neither."""
    height = 300.0
    with _figure(WIDTH, height) as figure:
        axes = _axes(figure, (42, 20, WIDTH - 6, height - 38), height)
        (across, up), (first, second) = scales, thresholds
        _span(axes, across)
        axes.set_ylim(up.edges[0], up.edges[-1])
        axes.set_yticks(up.ticks, [f"{tick:g}" for tick in up.ticks])
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.axvline(first, color=INK, linewidth=1.3, dashes=(4, 2))
        axes.axhline(second, color=INK, linewidth=1.3, dashes=(4, 2))
        for colour, keepers in ((MUTED, 0), (SECOND, 1), (FIRST, 2)):
            found = [(x, y) for x, y in points if (x >= first) + (y >= second) == keepers]
            x, y = [x for x, _ in found], [y for _, y in found]
            axes.plot(x, y, linestyle="", marker="o", markersize=5, color=colour, alpha=0.7, markeredgewidth=0)
        plain = _plain(figure, WIDTH, height)
        _text(plain, 0, 12, names[1], MUTED, SMALL)
        _text(plain, WIDTH - 6, height - 6, names[0], MUTED, SMALL, "right")
    return _svg(figure, words)


def is_logarithmic(bounds: tuple[float, float]) -> bool:
    """Whether a curve's axis over `bounds` is."""
    low, high = bounds
    return low > 0 and high / low > 20


# Parts


@contextmanager
def _figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure in which one unit is one point, so that sizes below are sizes in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": SMALL, "text.parse_math": False}):
        yield Figure(figsize=(width / 72, max(height, 1) / 72), dpi=72, facecolor="none")


def _axes(figure: "Figure", box: tuple[float, float, float, float], height: float) -> "Axes":
    """Axes in a box (left, top, right, bottom) in units from the upper left."""
    left, top, right, bottom = box
    width = figure.get_figwidth() * 72
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=MUTED, linewidth=1)
    axes.tick_params(length=0, pad=5, labelcolor=MUTED, labelsize=SMALL)
    return axes


def _plain(figure: "Figure", width: float, height: float) -> "Axes":
    """Axes over the whole figure, in units from the upper left, without lines."""
    axes = _axes(figure, (0, 0, width, height), height)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return axes


def _span(axes: "Axes", scale: Scale) -> None:
    """A scale as the axis across."""
    axes.set_xlim(scale.edges[0], scale.edges[-1])
    axes.set_xticks(scale.ticks, [f"{tick:g}" for tick in scale.ticks])


def _shares(figure: "Figure", scale: Scale, height: float, top: float = 20) -> tuple["Axes", "Axes"]:
    """Axes for shares, 0 to 100%, by a verdict, and the plain ones over the whole figure."""
    axes = _axes(figure, (42, top, WIDTH - 4, height - 22), height)
    _span(axes, scale)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return axes, _plain(figure, WIDTH, height)


def _mark_threshold(axes: "Axes", plain: "Axes", threshold: float, left: float, y: float = 12) -> None:
    """A line at the threshold, named above axes that begin at `left`."""
    low, high = axes.get_xlim()
    share = (threshold - low) / (high - low)
    axes.axvline(threshold, color=INK, linewidth=1.3, dashes=(4, 2))
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    _text(plain, left + share * (WIDTH - 4 - left), y, f"threshold {threshold:.4g}", INK, SMALL, side)


def _bar(axes: "Axes", top: float, height: float, start: float, end: float, colour: str) -> None:
    """A bar between two shares of the width. What is more than nothing is seen."""
    if end > start:
        width = max((end - start) * WIDTH, 1.0)
        axes.barh(top + height / 2, width, height, left=min(start * WIDTH, WIDTH - 1), color=colour, linewidth=0)


def _dot(axes: "Axes", x: float, y: float, of: Estimate) -> None:
    (dot,) = axes.plot([x], [y], marker="o", markersize=8.5, color=of.colour, markeredgewidth=2, clip_on=False)
    if not of.filled:
        dot.set_markerfacecolor(CARD)


def _text(axes: "Axes", x: float, y: float, text: str, colour: str, size: float, side: str = "left") -> None:
    axes.text(x, y, _clean(text), color=colour, fontsize=size, ha=side, va="baseline")


def _ends(axes: "Axes", y: float, label: str, value: str, width: float) -> None:
    """A label at the left and a value at the right, the label cut where they would meet."""
    room = int((width / TEXT / ADVANCE) - len(value) - 2)
    label = label if len(label) <= room else f"{label[: max(room - 1, 1)]}…"
    _text(axes, 0, y, label, INK, TEXT)
    _text(axes, width, y, value, INK, TEXT, "right")


def _told(level: Level) -> str:
    parts = " + ".join(f"{n:,} {kind}" for kind, n in level.parts)
    parts = f"from the left: {parts}" if len(level.parts) > 1 else parts
    dropped = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in level.dropped)
    return "; ".join(filter(None, [parts, dropped and f"dropped: {dropped}", level.aside]))


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, int(WIDTH / SMALL / ADVANCE))


def _locator(ticks: int, integer: bool = False) -> "Locator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=integer)


def _ticks_within(low: float, high: float) -> list[float]:
    """Round numbers that fit: on a logarithmic axis powers of ten, and twos and fives where those are few."""
    if not is_logarithmic((low, high)):
        return [float(value) for value in _locator(4).tick_values(low, high) if low <= value <= high]
    steps = (1, 2, 5) if high / low < 100 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**n for n in decades for step in steps if low <= step * 10.0**n <= high]


def _bounds(rows: Sequence[Estimate]) -> tuple[float, float]:
    """An axis over all whiskers, with some room."""
    ends = [end for row in rows for end in (*(row.interval or ()), row.middle)]
    room = (max(ends) - min(ends)) * 0.06 or abs(max(ends)) * 0.1 or 1.0
    return min(ends) - room, max(ends) + room


def _place(value: float, edges: Sequence[float]) -> float:
    """Where a value stands among bins that are drawn equally wide, 0 at the left of the first."""
    import numpy as np

    return float(np.interp(value, edges, range(len(edges))))


# SVG

_NOT_IN_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#(\w+)")
_COORDINATES = ("d", "x", "y", "width", "height", "transform")


def _clean(text: str) -> str:
    """One line that XML can hold."""
    return _NOT_IN_XML.sub("�", re.sub(r"\s+", " ", text))


def _svg(figure: "Figure", words: Words) -> str:
    """The figure as an element for an HTML page: the page's font and colours, ids of its own, a title."""
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": words.name}), warnings.catch_warnings():
        # It lays out with its own font, and the page writes with another, which may well have the letter.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    used = {id for element in root.iter() for value in element.attrib.values() for id in _REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text if element.tag == "text" else None), None
        element.attrib = {
            key: value
            for name, value in element.attrib.items()
            if ((key := name.rpartition("}")[2]) != "id" or value in used) and not value.startswith("rotate(-0 ")
        }
        for key, value in element.attrib.items():
            element.set(key, _attribute(key, value, words.name))
    for element in root.iter():
        for child in [*element]:
            # Its style would reach the whole page.
            if child.tag in ("style", "metadata") or (child.tag in ("g", "defs") and not _shows(child)):
                element.remove(child)
    told = [ElementTree.Element(tag, id=f"{words.name}-{tag}") for tag in ("title", "desc")]
    told[0].text, told[1].text = _clean(words.title), _clean(words.text)
    root[:0] = told
    labelled = f"{words.name}-title {words.name}-desc"
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-labelledby": labelled}
    return ElementTree.tostring(root, encoding="unicode")


def _shows(element: ElementTree.Element) -> bool:
    return any(child.tag not in ("g", "defs", "style") for child in element.iter())


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name in _COORDINATES:
        return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", value.replace("\n", ""))
    if name == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for colour, variable in VARIABLES.items():
            value = value.replace(colour, f"var({variable})")
    return _REFERENCE.sub(rf"#{prefix}-\1", value) if "#" in value else value
