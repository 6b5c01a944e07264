"""The report in a browser: sessions are filtered, nothing is wider than a phone, and no injected script runs."""

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from llmgr_rec.evaluation.examples import Example
from llmgr_rec.evaluation.html import ReportContent, render_page
from tests.browser import needs_browser, opened
from tests.evaluation.test_html import metrics as metrics_of
from tests.evaluation.test_html import plots_of, rows

pytestmark = [pytest.mark.browser, needs_browser]


def shows(browser: webdriver.Chrome, *targets: str) -> None:
    """Waits until the sessions of these targets are shown, and no others."""
    script = """
        const shown = document.querySelectorAll(".session:not([hidden]) .target");
        return [document.querySelector("#shown").textContent, ...[...shown].map((target) => target.textContent)];
    """
    expected = [f"{len(targets)} of 3 sessions", *targets]
    WebDriverWait(browser, 30, 0.05).until(lambda _: browser.execute_script(script) == expected)


def test_sessions_are_filtered_and_the_page_fits_a_phone(tmp_path: Path) -> None:
    examples = [
        Example("a", ["Pen"], "Ink", ["Ink", "Paper"], 1),
        Example("b", ["Paper"] * 12, "Glue", ["Ink"], 0),
        Example("c", ["Blue pen", "Red pen"], "Paper", ["Glue"], 0),
    ]
    content = ReportContent(
        "run",
        "Conclusion",
        facts={"Recipe": ["x" * 200]},
        runs=["run"],
        rows=rows({"item_knn": metrics_of(0.1), "sbr": metrics_of(0.2)}),
        quality=plots_of("sbr")[2:],
        training={"run": plots_of("sbr")[:2]},
        examples=examples,
    )
    page = tmp_path / "index.html"
    # As if a title had not been escaped.
    page.write_text(render_page(content).replace("Glue", "Glue<img src=x onerror=\"document.title='ran'\">"))
    with opened(tmp_path / "browser", "--window-size=500,900") as browser:
        browser.get(page.as_uri())
        shows(browser, "Ink", "Glue", "Paper")
        assert browser.title == "run"
        words = browser.find_element(By.NAME, "words")
        words.send_keys("pen paper")
        shows(browser, "Ink", "Paper")
        Select(browser.find_element(By.NAME, "outcome")).select_by_visible_text("not in the list")
        shows(browser, "Paper")
        words.clear()
        Select(browser.find_element(By.NAME, "clicks")).select_by_visible_text("10-19")
        shows(browser, "Glue")
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('.chart text')].map((text) => text.getBoundingClientRect().height)"
        )
        assert min(sizes) > 10.5
