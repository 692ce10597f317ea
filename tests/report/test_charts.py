"""Charts as SVG elements of a page."""

import re
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.report.charts import (
    VARIABLES,
    Curve,
    Estimate,
    Level,
    Ridge,
    Words,
    before_and_after,
    by_epoch,
    by_threshold,
    curve,
    histogram,
    intervals,
    is_logarithmic,
    reliability,
    ridges,
    scatter,
    waterfall,
)
from selfalign.report.facts import PROBABILITIES, RATINGS

WORDS = Words("c1", "Title", "What it says")
EDGES = [1.0, 2.0, 3.0, 4.0, 5.0]
BINS = range(41)

CHARTS: dict[str, Callable[[Words], str]] = {
    "waterfall": lambda words: waterfall(
        [Level("Read", 9), Level("Kept", 3, (("a", 1), ("b", 2)), (("c", 6),))], words
    ),
    "histogram": lambda words: histogram([*BINS], [*reversed(BINS)], RATINGS, 2.5, words),
    "ridges": lambda words: ridges(
        [Ridge("a", "n = 6", [1, 2, 3, 0], mark=3.0)], EDGES, [(1.0, "1"), (5.0, "5")], words
    ),
    "intervals": lambda words: intervals([Estimate("a", ".5", 0.5, (0.4, 0.6)), Estimate("b", ".7", 0.7, None)], words),
    "intervals in several units": lambda words: intervals(
        [Estimate("a", ".5", 0.5, (0.4, 0.6), mark=0.7), Estimate("b", "", 0, None)], words, (-1, 1), numbered=False
    ),
    "reliability": lambda words: reliability([(0.1, 0.0), (0.5, 0.75), (0.9, 1.0)], PROBABILITIES, True, words),
    "by_threshold": lambda words: by_threshold(
        [("precision", [0.5, 0.75, 1.0]), ("recall", [1.0, 1.0, 0.5])], [0.1, 0.5, 0.9], PROBABILITIES, 0.5, words
    ),
    "scatter": lambda words: scatter(
        [(0.1, 1.0), (0.9, 5.0), (0.2, 5.0)], (PROBABILITIES, RATINGS), (0.5, 4.0), ("a", "b"), words
    ),
    "before_and_after": lambda words: before_and_after([("a", 9, 3), ("b", 1, 0)], words),
    "curve": lambda words: curve(Curve("a", [10, 20], [3.0, 1.0], (0.0, 3.2)), 40, [], words, wide=True),
    "resumed curve": lambda words: curve(
        Curve("a", [10, 20], [3.0, 1.0], (0.5, 3.2), [2.5, 1.5]), 40, [15, 16], words, wide=False
    ),
    "by_epoch": lambda words: by_epoch(
        [Estimate("1", ".5", 0.5, (0.4, 0.6), filled=False), Estimate("last", ".7", 0.7, None)], words, percent=True
    ),
}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_a_chart_is_an_image_with_a_title_in_the_colours_of_the_page(chart: Callable[[Words], str]) -> None:
    svg = chart(WORDS)
    root = ElementTree.fromstring(svg)
    assert (root.tag, root.get("role"), root.get("aria-labelledby")) == ("svg", "img", "c1-title c1-desc")
    assert [(child.tag, child.text) for child in root[:2]] == [("title", "Title"), ("desc", "What it says")]
    # Any other colour would not follow the theme.
    assert not re.search(r"(fill|stroke): (#|rgb)", svg)
    assert set(re.findall(r"var\((.*?)\)", svg)) <= set(VARIABLES.values())
    assert not re.search(r"font-family|<style|http|xmlns", svg)


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_ids_are_the_charts_own_and_what_they_name_is_there(chart: Callable[[Words], str]) -> None:
    one, other = chart(WORDS), chart(Words("c2", "", ""))
    ids = re.findall(r' id="(.*?)"', one)
    assert all(id.startswith("c1-") for id in ids)
    assert not set(ids) & set(re.findall(r' id="(.*?)"', other))
    assert set(re.findall(r'url\(#(.*?)\)|href="#(.*?)"', one)) <= {pair for id in ids for pair in ((id, ""), ("", id))}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_the_same_numbers_give_the_same_bytes_and_leave_matplotlib_as_it_was(chart: Callable[[Words], str]) -> None:
    before = dict(matplotlib.rcParams)
    assert chart(WORDS) == chart(WORDS)
    assert dict(matplotlib.rcParams) == before


@given(st.text(max_size=30), st.integers(0, 10**12))
@settings(max_examples=30, deadline=None)
def test_any_label_is_text_and_any_count_is_drawn(label: str, n: int) -> None:
    svg = waterfall([Level(label, n, dropped=((label, n),))], Words("c", label, label))
    root = ElementTree.fromstring(svg)
    assert f"{n:,}" in texts(svg)
    assert {element.tag for element in root.iter()} <= {
        "svg", "title", "desc", "g", "path", "text", "defs", "clipPath", "rect"
    }  # fmt: skip


def test_a_label_is_never_taken_for_a_formula_or_for_markup() -> None:
    label = "$x^2$ <script> & --> 語"
    assert label in texts(before_and_after([(label, 2, 1)], WORDS))


def test_a_label_that_would_run_into_its_value_is_cut() -> None:
    label, value = texts(before_and_after([("n" * 200, 2_000_000, 1)], WORDS))
    assert label.endswith("…")
    assert len(label) + len(value) < 60


def test_bars_are_as_long_as_their_counts_and_none_that_counts_is_invisible() -> None:
    svg = waterfall([Level("a", 1_000_000), Level("b", 250_000, dropped=(("c", 750_000),)), Level("d", 1)], WORDS)
    spans = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in re.findall(r' d="(.*?)"', svg)[1:]]
    assert [round(max(xs) - min(xs)) for xs in spans] == [400, 300, 100, 1]


def test_an_axis_over_more_than_a_factor_of_twenty_is_logarithmic() -> None:
    assert is_logarithmic((0.001, 3.0))
    assert not is_logarithmic((0.2, 3.0))
    assert not is_logarithmic((0.0, 3.0))
    drawn = curve(Curve("loss", [1, 2], [3.0, 0.002], (0.001, 4.0)), 2, [], WORDS, wide=True)
    assert texts(drawn)[-5:] == ["0.001", "0.01", "0.1", "1", "loss"]


@pytest.mark.parametrize(("wide", "words"), [(True, 1), (False, 0)])
def test_every_resume_is_marked_and_the_wide_chart_says_what_the_marks_are(wide: bool, words: int) -> None:
    found = Curve("loss", [1, 9], [3.0, 2.0], (0.0, 4.0))
    plain, marked = (curve(found, 9, marks, WORDS, wide) for marks in ([], [3, 5]))
    assert texts(marked).count("resumed") == words
    assert marked.count("stroke-dasharray") == plain.count("stroke-dasharray") + 2


def test_of_many_epochs_as_many_are_labelled_as_have_room_and_always_the_last() -> None:
    points = [Estimate(f"epoch {n}", "", 1 / n, None) for n in range(1, 31)]
    labels = [text for text in texts(by_epoch(points, WORDS)) if text.startswith("epoch")]
    assert labels[-1] == "epoch 30"
    assert 3 < len(labels) < 10


def test_what_has_only_one_value_or_none_is_drawn_too() -> None:
    assert curve(Curve("", [5], [1.0], (0.0, 1.1)), 5, [5], WORDS, wide=True)
    assert by_epoch([Estimate("last", "0", 0.0, None)], WORDS)
    assert intervals([Estimate("a", "0", 0.0, None)], WORDS)
    assert histogram([0] * 41, [0] * 41, PROBABILITIES, 1.0, WORDS)
    assert before_and_after([("a", 0, 0)], WORDS)
    assert reliability([(0.5, 1.0)], PROBABILITIES, True, WORDS)
    assert by_threshold([("precision", [1.0])], [1.0], PROBABILITIES, None, WORDS)
    assert scatter([], (RATINGS, RATINGS), (4.0, 4.0), ("", ""), WORDS)


def test_whole_ratings_and_fortieths_of_a_probability_stand_in_the_middle_of_their_bins() -> None:
    for scale, marks in ((RATINGS, (1, 2, 3, 4, 5)), (PROBABILITIES, (0, 0.025, 0.5, 1))):
        middles = [round((low + high) / 2, 4) for low, high in pairwise(scale.edges)]
        assert len(middles) == 41
        assert set(marks) <= set(middles)


def test_only_a_probability_has_the_line_on_which_it_keeps_its_word() -> None:
    with_line, without = (reliability([(2.0, 0.5)], RATINGS, diagonal, WORDS) for diagonal in (True, False))
    assert with_line.count("stroke-dasharray") == without.count("stroke-dasharray") + 1


def test_pairs_of_two_raters_have_a_colour_by_who_keeps_them() -> None:
    def drawn(*points: tuple[float, float]) -> set[str]:
        svg = scatter(points, (RATINGS, RATINGS), (4.0, 3.0), ("", ""), WORDS)
        return set(re.findall(r"var\((--(?:first|second))\)", svg))

    assert drawn((4.0, 3.0)) == {"--first"}
    assert drawn((3.9, 3.0)) == drawn((4.0, 2.9)) == {"--second"}
    assert drawn((3.9, 2.9)) == set()
