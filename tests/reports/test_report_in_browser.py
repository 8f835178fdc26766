"""The page of a report in a real browser: opened, sorted, filtered, toggled, saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_data import HOSTILE, make_runs

import ckdiff
from ckdiff.errors import printable
from ckdiff.reports.report import report

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    runs = make_runs(folder, 3)
    report(runs.stores, folder / "r.html", base=runs.base)
    return folder / "r.html"


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The page, open; whatever it says on the console, or asks for, fails the test."""
    said: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("#every-tensor[data-ready]")
    tab.wait_for_selector("#heatmap-1-1 .plot svg")
    yield tab
    tab.close()
    wanted = [path.as_uri()]
    assert [text for text in said if not text.startswith(("blob:", "data:"))] == wanted


def names(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        "#every-tensor .rows .line", "lines => lines.map(line => line.children[0].textContent)"
    )
    return found


def column(page: Any, position: int) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        "#every-tensor .rows .line",
        f"lines => lines.map(line => line.children[{position}].textContent)",
    )
    return found


def test_it_is_drawn_as_it_is_scrolled_to(page: Any) -> None:
    figures = page.locator("figure[data-figure]:visible")
    for i in range(figures.count()):
        figure = figures.nth(i)
        figure.scroll_into_view_if_needed()
        figure.locator(".plot svg, .plot canvas").first.wait_for()
    assert page.title() == "What changed in run0, run1, run2"


def test_names_are_text(page: Any) -> None:
    page.fill("#filter", "onerror")
    (name,) = names(page)
    assert name == printable(HOSTILE) != HOSTILE  # a text's direction is not turned either
    assert page.title() != "owned"
    assert page.locator("img").count() == 0


def test_sorted_and_filtered(page: Any, path: Path) -> None:
    store = ckdiff.open_store(path.parent / "run0.zarr")
    assert names(page)[:3] == [printable(record.name) for record in store.tensors][:3]
    page.fill("#filter", "ATTN layers.1")
    wanted = [r.name for r in store.tensors if "attn" in r.name and "layers.1" in r.name]
    assert names(page) == wanted
    assert page.text_content("#count") == f"{len(wanted)} of {len(store.tensors)} tensors"
    heads = page.locator("#every-tensor .heads button")
    assert heads.nth(4).text_content() == "run0: changed"
    heads.nth(4).click()
    counts = [int(text.replace(",", "")) for text in column(page, 4)]
    assert counts == sorted(counts, reverse=True)
    known = {record.name: record.changed["exact"] for record in store.tensors}
    assert counts == sorted((known[name] for name in wanted), reverse=True)
    heads.nth(4).click()
    assert [int(text.replace(",", "")) for text in column(page, 4)] == counts[::-1]
    heads.nth(4).click()
    assert names(page) == wanted
    page.fill("#filter", "nothing of this name")
    assert names(page) == []


def test_a_narrow_page_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    figures = page.locator("figure[data-figure]:visible")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        figures.nth(i).locator(".plot svg, .plot canvas").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    lines = "rows => rows.map(row => row.cells[0].getClientRects().length)"
    assert set(page.eval_on_selector_all("#pairs tbody tr", lines)) == {1}
    height = "rows => Math.max(...rows.map(row => row.getBoundingClientRect().height))"
    assert page.eval_on_selector_all("#pairs tbody tr", height) < 80  # words are not cut


def test_heads_are_seen_whole(page: Any) -> None:
    cut = "heads => heads.filter(head => head.scrollWidth > head.clientWidth).length"
    page.eval_on_selector_all(
        ".heads button", "heads => { heads[5].textContent += ' long-' + 'x'.repeat(60); }"
    )
    assert page.eval_on_selector_all("#every-tensor .heads > *", cut) == 0


def test_dark_and_light(page: Any) -> None:
    ink = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ink)
    page.click("#theme")
    assert page.evaluate(ink) != light
    assert page.get_attribute("html", "data-theme") == "dark"
    page.wait_for_selector("#heatmap-1-1 .plot svg")
    page.click("#theme")
    assert page.evaluate(ink) == light


def test_one_run_at_a_time(page: Any) -> None:
    assert page.is_visible("#heatmap-1-1")
    assert not page.is_visible("#heatmap-3-1")
    page.click(".tabs button:has-text('run2')")
    assert page.is_visible("#heatmap-3-1")
    assert not page.is_visible("#heatmap-1-1")
    page.wait_for_selector("#heatmap-3-1 .plot svg")


def test_figures_and_tables_are_saved(page: Any, path: Path, tmp_path: Path) -> None:
    with page.expect_download() as saved:
        page.click("#heatmap-1-1 .svg")
    assert saved.value.suggested_filename == "heatmap-1-1.svg"
    saved.value.save_as(tmp_path / "h.svg")
    assert (tmp_path / "h.svg").read_text().startswith("<svg")
    with page.expect_download() as saved:
        page.click("#csv")
    saved.value.save_as(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text("utf-8").splitlines()
    store = ckdiff.open_store(path.parent / "run0.zarr")
    assert len(lines) == 1 + len(store.tensors)
    with page.expect_download() as saved:
        page.click('[data-csv="pairs"]')
    saved.value.save_as(tmp_path / "p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4


def test_small_tables_are_sorted(page: Any) -> None:
    head = page.locator("#pairs th.number button").first
    shared = "rows => rows.map(row => row.cells[2].textContent)"
    head.click()
    found = page.eval_on_selector_all("#pairs tbody tr", shared)
    counts = [int(text.replace(",", "")) for text in found]
    assert counts == sorted(counts, reverse=True)


def test_it_prints(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert page.is_visible("table.paper")
    assert not page.is_visible("#every-tensor")
    assert page.pdf()[:4] == b"%PDF"


def test_paper_is_light_and_nothing_is_cut_off(page: Any) -> None:
    page.click("#theme")
    count = "document.querySelectorAll('.plot svg, .plot canvas').length"
    page.evaluate(f"addEventListener('afterprint', () => {{ window.printed = {count}; }})")
    page.pdf()
    figures = page.locator("figure[data-figure]").count()
    assert page.evaluate("window.printed") == figures, "also those that nobody scrolled to"
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 1000})
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == "rgb(31, 35, 40)"
    fills = "texts => texts.map(text => getComputedStyle(text).fill)"
    words = '[class*="role-axis"] text, [class*="role-legend"] text'
    assert set(page.eval_on_selector_all(words, fills)) == {ink}
    wide = "plots => plots.filter(plot => plot.getBoundingClientRect().right > innerWidth).length"
    assert page.eval_on_selector_all(".plot svg, .plot canvas, table", wide) == 0
