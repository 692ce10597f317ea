"""The report as a real browser takes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.browser import Page, find, page
from report.conftest import Run
from report.whole import HOSTILE, change, whole
from selfalign.report.html import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if find() is None:
        pytest.skip("needs Chromium")
    with page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    run = whole(Run(folder / "run"), HOSTILE, arm=HOSTILE, rater="calibrated")
    change(run, "forward.train@0", state="failed", message=HOSTILE)
    return write_report(run.view(), folder / "report.html")


def told(browser: Page) -> list[dict[str, Any]]:
    """What the page complained of."""
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded")
    return [event["params"] for event in browser.events if event["method"] in kinds]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_loads_nothing_complains_of_nothing_and_fits_the_window(
    browser: Page, report: Path, scheme: str, width: int
) -> None:
    browser.open(report, width, scheme)
    assert browser.value("document.documentElement.scrollWidth") == width
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [report.resolve().as_uri()]
    assert told(browser) == []


def test_hostile_text_is_shown_as_text(browser: Page, report: Path) -> None:
    browser.open(report)
    shown = browser.value("document.body.innerText")
    assert shown.count("<script>document.title='taken'</script>") > 20
    assert "{{ 7*7 }}" in shown
    assert "taken" not in browser.value("document.title").split("'")[0]
    assert browser.value("document.querySelectorAll('script, img, iframe, object, embed, link, form').length") == 0


def test_every_chart_has_a_size_and_its_letters_stand_inside(browser: Page, report: Path) -> None:
    browser.open(report, 400)
    boxes = browser.value(
        "[...document.querySelectorAll('svg')].map(e => { const b = e.getBoundingClientRect(); "
        "const small = e.matches('.charts > :not(:first-child)'); "
        "return [b.width, b.height, e.closest('figure').getBoundingClientRect().width, small] })"
    )
    assert len(boxes) > 20
    assert all((140 if small else 250) < width < figure and height > 30 for width, height, figure, small in boxes)
    outside = browser.value(
        "[...document.querySelectorAll('svg text')].filter(e => { const a = e.getBoundingClientRect(), "
        "b = e.closest('figure').getBoundingClientRect(); return a.left < b.left || a.right > b.right })"
        ".map(e => e.textContent)"
    )
    assert outside == []


@pytest.mark.parametrize(("width", "across"), [(1280, 5), (400, 2)])
def test_the_curves_of_a_training_stand_in_a_row_as_long_as_there_is_room(
    browser: Page, report: Path, width: int, across: int
) -> None:
    browser.open(report, width)
    rows = browser.value(
        "[...document.querySelectorAll('#training .charts')].map(row => [...row.children].map("
        "e => e.getBoundingClientRect()).map(b => [b.top, b.left, b.right]))"
    )
    assert len(rows) == 4
    for boxes in rows:
        for _, left, right in boxes:
            assert 0 < left < right < width
        tops = [top for top, _, _ in boxes]
        assert max(tops.count(top) for top in tops) <= across
        if len(boxes) == 5:
            assert max(tops.count(top) for top in tops) == across
    # Letters of one chart do not run into the next one.
    overlaps = browser.value(
        "[...document.querySelectorAll('#training .charts')].flatMap(row => { "
        "const b = [...row.querySelectorAll('text')].map(e => [e.getBoundingClientRect(), e.closest('svg')]); "
        "return b.flatMap(([a, x]) => b.filter(([c, y]) => x !== y && a.left < c.right && c.left < a.right && "
        "a.top < c.bottom && c.top < a.bottom)) }).length"
    )
    assert overlaps == 0


def test_the_charts_follow_the_theme_and_paper_is_light(browser: Page, report: Path) -> None:
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    found = []
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        browser.open(report, scheme=scheme, media=media)
        found.append((browser.value(ink), browser.value("getComputedStyle(document.body).color")))
    assert [chart == page for chart, page in found] == [True] * 3
    assert found[0] == found[2] != found[1]


def test_a_folded_text_opens_without_a_script(browser: Page, report: Path) -> None:
    browser.open(report)
    browser.value("document.querySelector('figure details summary').click()")
    assert browser.value("document.querySelector('figure details table').getBoundingClientRect().height") > 20
