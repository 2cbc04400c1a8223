"""Pages in a real headless browser: no error, no request, sorting, themes, images, narrow screens and paper."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from knowiso_train.pages import (
    Bar,
    Cell,
    Column,
    Section,
    Segment,
    Tile,
    folded,
    heat_image,
    image_grid,
    matrix,
    paragraph,
    render_page,
    stacked_bars,
    table,
    thumbnail,
)
from tests.helpers.browser import Browser, find_browser, headless_browser
from tests.helpers.diagnoses import diagnosis, stability_report
from tests.helpers.reports import functional_pair, report

COLUMN = (
    "[...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[{}].textContent.replace('\\xa0', ' '))"
)
SORTS = "[...document.querySelectorAll('.sortable thead th')].map(head => head.getAttribute('aria-sort'))"


# For every column: click its head twice, and compare the values with those sorted by Python
SORTED_COLUMNS = """
[...document.querySelectorAll('table.sortable')].map(table => [...table.tHead.rows[0].cells].map((head, column) => {
  const orders = [0, 1].map(() => {
    head.querySelector('button').click();
    const cells = [...table.tBodies[0].rows].map(row => row.cells[column]);
    return [head.getAttribute('aria-sort'), cells.map(cell => cell.dataset.value ?? null),
            cells.map(cell => cell.textContent)];
  });
  return [head.dataset.sort, ...orders];
}))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    command = find_browser()
    if command is None:
        reason = "no Chromium or Chrome is installed; name one in the variable KNOWISO_BROWSER"
        if os.environ.get("KNOWISO_BROWSER"):
            pytest.fail(f"KNOWISO_BROWSER={os.environ['KNOWISO_BROWSER']} is not a command")
        pytest.skip(reason)
    with headless_browser(command) as opened:
        yield opened


@pytest.fixture
def page(tmp_path: Path, browser: Browser) -> Browser:
    """A page with every element, opened from disk; no problem may come up before or in the test."""
    rng = np.random.default_rng(0)
    tiles = [Tile(thumbnail(rng.random((3, 32, 32))), "cat", heat=heat_image(rng.random((4, 4)), 1.0))]
    rows = [
        [Cell(name), Cell(text, value)]
        for name, text, value in [
            ("layer10", "9.0 %", 0.09),
            ("layer2", "10.0 %", 0.1),
            ("layer1", "–", float("nan")),
            ("<script>document.title='changed'</script>", "-1.0 %", -0.01),
        ]
    ]
    long_name = "encoder.stages.3.blocks.12.mlp.fc2"
    bars = [Bar(long_name, (Segment(0, 0.6, "order 0", "#16325b", "60.0"), Segment(0.6, 1, "rest")), "40.0 %")]
    sections = [
        Section("Table", table("Layers", [Column("layer", numeric=False), Column("share")], rows)),
        Section("Bars", stacked_bars(bars, [], text_title="unexplained")),
        Section("Images", image_grid(tiles)),
        Section("Matrix", matrix("m", ["network " * 4] * 9, [[0.5] * 9] * 9, [["50.0 %"] * 9] * 9)),
    ]
    file = tmp_path / "page.html"
    file.write_text(render_page("Page", sections, appendix=folded("Settings", paragraph("seed 0"))), encoding="utf-8")
    browser.problems.clear()
    browser.show()
    browser.open(file)
    return browser


def test_clicks_sort_numbers_as_numbers_and_names_as_names(page: Browser) -> None:
    page.click(".sortable th:nth-child(2) button")
    assert page.evaluate(COLUMN.format(1)) == ["10.0 %", "9.0 %", "-1.0 %", "–"]
    assert page.evaluate(SORTS) == [None, "descending"]
    page.click(".sortable th:nth-child(2) button")
    assert page.evaluate(COLUMN.format(1)) == ["-1.0 %", "9.0 %", "10.0 %", "–"]
    assert page.evaluate(SORTS) == [None, "ascending"]
    page.click(".sortable th:nth-child(1) button")
    names = page.evaluate(COLUMN.format(0))
    assert names[1:] == ["layer1", "layer2", "layer10"]
    assert page.evaluate(SORTS) == ["ascending", None]
    assert page.evaluate("document.title") == "Page"
    assert page.problems == []


def test_images_show_and_nothing_is_requested(page: Browser) -> None:
    widths = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert widths == [32, 4]
    assert page.evaluate("fetch('https://example.com').then(() => 'loaded', () => 'refused')") == "refused"
    assert page.problems  # the refused request
    assert all("Content Security Policy" in problem or "Refused" in problem for problem in page.problems)


def test_themes_of_the_system_and_of_the_button(page: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.show(theme="dark")
    dark = page.evaluate(background)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    page.click("#theme")
    assert page.evaluate(background) == light
    assert page.evaluate("document.getElementById('theme').textContent") == "Dark theme"
    page.click("#theme")
    page.show(theme="light")
    assert page.evaluate(background) == dark
    assert page.problems == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_is_not_wider_than_the_screen(page: Browser, width: int) -> None:
    page.show(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bar = page.evaluate("document.querySelector('.bar:not(.axis) svg').getBoundingClientRect().width")
    assert bar > 0.4 * width


def test_paper_is_light_and_shows_folded_details(page: Browser) -> None:
    page.show(theme="dark", media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelector('details').open") is True
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelector('details').open") is False
    assert page.problems == []


def check_page(browser: Browser, text: str, file: Path) -> None:
    """Open a page in both themes and on a narrow screen; sort every table, and look for problems."""
    file.write_text(text, encoding="utf-8")
    browser.problems.clear()
    for theme, width in (("light", 1200), ("dark", 1200), ("light", 390)):
        browser.show(theme=theme, width=width)
        browser.open(file)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        images = browser.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        assert 0 not in images
        assert False not in images
    for kind, *orders in itertools.chain.from_iterable(browser.evaluate(SORTED_COLUMNS)):
        assert {order for order, _, _ in orders} == {"ascending", "descending"}
        if kind == "number":
            for order, values, _ in orders:
                numbers = [float(value) for value in values if value is not None]
                assert numbers == sorted(numbers, reverse=order == "descending")
                assert None not in values[: len(numbers)]
    assert browser.problems == []


def test_page_of_a_report(browser: Browser, tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    pairs = [
        functional_pair(f"layer{i}.{script}", "b", direction, shares=(i / 20, 0.1), warnings=(script,))
        for i in range(1, 12)
        for direction in ("forward", "backward")
    ]
    check_page(browser, report(*pairs).to_html(), tmp_path / "report.html")


def test_page_of_a_diagnosis(browser: Browser, tmp_path: Path) -> None:
    check_page(browser, diagnosis(strong=("large", "other <i>")).to_html(), tmp_path / "diagnosis.html")


def test_page_of_a_stability_report(browser: Browser, tmp_path: Path) -> None:
    check_page(browser, stability_report().to_html(), tmp_path / "stability.html")
