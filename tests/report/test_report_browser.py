"""The page in a real browser: sorting, filters, charts, and the screen of a phone.

Needs Playwright for Python and a Chromium of the system; nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import studies
from tinyllama_lab.report.analysis.analysis import Analysis
from tinyllama_lab.report.analysis.trial_rows import read_study
from tinyllama_lab.report.page.page import write_report
from tinyllama_lab.report.table import write_table
from tinyllama_lab.study.trial import State

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; CHROMIUM names one"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a study with every section, and with markup in its texts."""
    prompts = [*studies.PROMPTS, (EVIL, "none", EVIL)]
    study = studies.simulated_study(
        tmp_path_factory.mktemp("studies"),
        {"lora.r": [4, 16], "data.n": [250, 1000], "quant.kind": ["none", "nf4"]},
        states=lambda v: State.OOM if v["seed"] == 2 and v["lora.r"] == 16 else State.DONE,
        prompts=prompts,
    )
    rows = read_study(study)
    write_table(study, rows)
    return write_report(study, Analysis(rows))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """Open the page with all charts drawn; any error in the browser fails the test."""
    yield from _opened(browser, report, 1280)


@pytest.fixture
def phone(browser: Any, report: Path) -> Iterator[Any]:
    """Open the page on a screen 390 points wide."""
    yield from _opened(browser, report, 390)


def _opened(browser: Any, report: Path, width: int) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme="light")
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    _wait(page, "light")
    yield page
    context.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {report.as_uri()}


def _wait(page: Any, theme: str) -> None:
    every = "[...document.querySelectorAll('[data-chart]')].every(n => n.dataset.drawn === '%s')"
    page.wait_for_function(every % theme, timeout=60_000)


def column(page: Any, head: str) -> list[str]:
    """Return the visible cells of a column, from the top."""
    script = """head => {
        const table = document.getElementById("trial-table");
        const at = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === head);
        const shown = [...table.tBodies[0].rows].filter((row) => !row.hidden);
        return shown.map((row) => row.cells[at].textContent);
    }"""
    found: list[str] = page.evaluate(script, head)
    return found


def head(page: Any, name: str) -> Any:
    return page.locator("#trial-table th", has=page.get_by_role("button", name=name, exact=True))


def test_every_chart_is_drawn(page: Any) -> None:
    charts = page.locator("[data-chart]")
    assert charts.count() == 7
    for number in range(charts.count()):
        assert charts.nth(number).locator("svg").count() > 0
        assert "cannot be drawn" not in charts.nth(number).inner_text()


def test_a_head_sorts_by_click_and_by_key(page: Any) -> None:
    head(page, "eval loss").get_by_role("button").click()
    assert head(page, "eval loss").get_attribute("aria-sort") == "ascending"
    cells = column(page, "eval loss")
    numbers = [float(cell) for cell in cells if cell != "-"]
    assert numbers == sorted(numbers) and len(numbers) == 20 + 2
    assert cells[-4:] == ["-"] * 4  # what failed is last, up as down
    head(page, "eval loss").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head(page, "eval loss").get_attribute("aria-sort") == "descending"
    cells = column(page, "eval loss")
    assert [float(cell) for cell in cells[:-4]] == numbers[::-1] and cells[-4:] == ["-"] * 4
    head(page, "quant").get_by_role("button").click()
    assert head(page, "eval loss").get_attribute("aria-sort") == "none"
    assert column(page, "quant") == sorted(column(page, "quant"))


def test_the_filter_keeps_rows_with_all_words(page: Any) -> None:
    page.get_by_label("Show only rows with").fill("nf4 DONE")
    assert set(column(page, "quant")) == {"nf4"}
    assert page.locator("#filtered").inner_text() == "10 of 26 rows"
    page.get_by_label("Show only rows with").fill("no such row")
    assert column(page, "quant") == []
    page.get_by_label("Show only rows with").fill("")
    assert page.locator("#filtered").inner_text() == "26 rows"


def test_answers_are_picked_and_shown_as_text(page: Any) -> None:
    cards = page.locator(".completion")
    assert cards.count() == 4
    assert cards.nth(0).locator("p").first.inner_text() == "The base says: I do not know."
    page.locator("#prompt").select_option(index=4)
    assert page.locator("#asked").inner_text() == EVIL
    assert EVIL in page.locator("#expected").inner_text()
    assert page.evaluate("window.hacked") is None
    cards.nth(3).locator("select").select_option("")
    assert cards.nth(3).locator("p").first.inner_text() == ""
    cards.nth(0).locator("select").select_option(index=5)
    chosen = cards.nth(0).locator("select").evaluate("s => s.selectedOptions[0].textContent")
    assert "loss" in chosen
    assert cards.nth(0).locator("p").first.inner_text().endswith("says: take the bus.")


def test_the_theme_is_toggled_and_charts_follow(page: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    text = "document.querySelector('#chart-curves .xtick text').style.fill"
    before = page.evaluate(f"[{paper}, {text}]")
    button = page.locator("#theme")
    assert button.inner_text() == "Dark colours"
    button.focus()
    page.keyboard.press("Space")
    _wait(page, "dark")
    assert button.inner_text() == "Light colours"
    after = page.evaluate(f"[{paper}, {text}]")
    assert before[0] != after[0] and before[1] != after[1]


def test_the_cost_is_chosen(page: Any) -> None:
    page.get_by_label("Cost", exact=True).select_option("size")
    page.wait_for_function(
        "document.querySelector('#costs .xtitle').textContent.startsWith('adapter size')"
    )
    label = page.locator("#costs [role=img]").get_attribute("aria-label")
    assert "adapter size" in label
    assert page.locator("#costs .finding").inner_text() == label


def test_links_reach_files_that_are_there(page: Any, report: Path) -> None:
    hrefs = page.evaluate("[...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
    for href in hrefs:
        if href.startswith("#"):
            assert page.locator(href).count() == 1
        else:
            assert (report.parent / href).exists()


def test_a_phone_scrolls_tables_and_not_the_page(phone: Any) -> None:
    phone.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    widths = phone.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    table = phone.locator("#trials .scroll")
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")
