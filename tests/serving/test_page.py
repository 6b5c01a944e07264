"""The page in a browser: search, add, reorder, explain, share; titles of items are text, whatever they contain."""

from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from llmgr_rec import Recommender
from llmgr_rec.serving.app import Service, ServiceSettings
from tests.browser import needs_browser, opened
from tests.serving.running import running
from tests.small_run import small_run

WAIT_S = 30

pytestmark = [pytest.mark.browser, needs_browser]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    run = small_run().run / "export" / "sbr"
    with running(Service(ServiceSettings(run, reload_s=0), Recommender.load)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with opened(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


class Page:
    """What a user sees and does."""

    def __init__(self, browser: webdriver.Chrome, address: str, *session: str) -> None:
        self.browser = browser
        browser.get(f"{address}/?{urlencode([('s', item) for item in session])}")
        self.wait_for(lambda: self.all(".list li"))

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        texts: list[str] = self.browser.execute_script(script, selector)
        return texts

    def wait_for(self, condition: Callable[[], object]) -> None:
        # Lists are drawn again when their answer arrives.
        wait = WebDriverWait(self.browser, WAIT_S, 0.05, [StaleElementReferenceException])
        wait.until(lambda _: condition())

    def click(self, selector: str, number: int = 0) -> None:
        self.wait_for(lambda: self.all(selector)[number].click() or True)

    def session(self) -> list[str]:
        return self.texts("#session .name")


def title(item: str) -> str:
    return f"<b>Thing</b> & {item}"


def test_a_session_is_searched_built_reordered_and_explained(browser: webdriver.Chrome, address: str) -> None:
    page = Page(browser, address)
    assert page.texts(".list h3") == ["Popularity"]
    page.all("#query")[0].send_keys("thing i41")
    page.wait_for(lambda: page.texts("#found .item") == [title("i41")])
    page.all("#query")[0].send_keys(Keys.ENTER)
    page.wait_for(lambda: page.session() == [title("i41")] and len(page.texts(".list h3")) == 2)
    first = page.texts(".list .item")[0]
    browser.execute_script("document.querySelector('.list .item').dataset.before = 1")
    page.click(".list .item")
    page.wait_for(lambda: page.session() == [title("i41"), first])
    # The lists are new, and the focus is at its place in them.
    focused = "return document.activeElement === document.querySelector('.list .item:not([data-before])')"
    page.wait_for(lambda: browser.execute_script(focused))

    handle = page.all("#session .handle")[1]
    handle.send_keys(Keys.ARROW_UP)
    assert page.session() == [first, title("i41")]
    assert browser.switch_to.active_element.get_attribute("aria-label") == f"Reorder {first}, position 1 of 2"
    assert page.texts("#status") == [f"Moved {first} to position 1 of 2"]
    page.wait_for(lambda: page.all(".list .why"))

    page.click(".list .why")
    page.wait_for(lambda: page.texts("#why-body h3")[:2] == ["Parts of the score", "What each click means"])
    assert [text.split(". ", 1)[1] for text in page.texts("#why-body th")] == [first, title("i41")]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not page.all("#why[open]")


def test_a_click_is_dragged_to_another_place(browser: webdriver.Chrome, address: str) -> None:
    page = Page(browser, address, "i1", "i2", "i3")
    handles, rows = page.all("#session .handle"), page.all("#session li")
    by = rows[2].location["y"] - rows[0].location["y"] + 4
    ActionChains(browser, duration=20).click_and_hold(handles[0]).move_by_offset(0, by).release().perform()
    assert page.session() == [title("i2"), title("i3"), title("i1")]
    assert browser.current_url.endswith("/?s=i2&s=i3&s=i1")
    page.click("#session .remove", 1)
    assert page.session() == [title("i2"), title("i1")]


def test_the_graph_has_a_node_for_each_item_and_an_edge_for_each_step(browser: webdriver.Chrome, address: str) -> None:
    page = Page(browser, address, "i1", "i2", "i1", "i2", "i2")
    assert len(page.all(".graph .node")) == 2
    assert len(page.all(".graph .edge")) == 3
    assert page.texts(".graph .count") == ["\N{MULTIPLICATION SIGN}2"]
    said = page.texts(".graph > title")[0]
    assert said.startswith("Session graph with 2 items. Steps: ")
    assert f"{title('i1')} to {title('i2')} 2 times" in said


def test_titles_and_addresses_run_no_script(browser: webdriver.Chrome, address: str) -> None:
    attack = "<img src=x onerror=window.attacked=1>"
    page = Page(browser, address, attack, "i1")
    page.wait_for(lambda: page.all("#session .unknown"))
    assert page.session() == [attack, title("i1")]
    assert page.texts("#lists-note") == ["Click an item to add it to the session. Unknown items are ignored: 1."]
    assert not page.all("main img, main b")
    assert browser.execute_script("return window.attacked") is None


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_the_page_fits_the_screen(browser: webdriver.Chrome, address: str, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(browser, address, *(f"i{number}" for number in range(9)))
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    named = (
        "return [...document.querySelectorAll('button, input')].every((one) => one.textContent || one.labels.length)"
    )
    assert browser.execute_script(named)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.all("#graph-section")[0].is_displayed()
