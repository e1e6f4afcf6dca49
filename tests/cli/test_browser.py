"""The pages in a real browser: nothing fetched, nothing complained of, nothing wider than the screen, on a phone and on a desk, light and dark.

pytest -m browser        needs Chromium with its driver (Debian: apt-get install chromium chromium-driver) and selenium (llmprune[browser])
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.runner import Cli

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LONG = "a_result_folder_whose_name_has_no_place_where_a_browser_would_break_it_and_is_longer_than_a_card"
pytestmark = [
    pytest.mark.usefixtures("pictures"),
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason="selenium is not installed: pip install llmprune[browser]"),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here: apt-get install chromium chromium-driver"),
]
WIDEST = """return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.tagName + ' ' + e.className)"""

BROKEN = "return [...document.querySelectorAll('data')].filter(e => e.getClientRects().length > 1).map(e => e.textContent)"  # over two lines
LEFT = """return [...document.querySelectorAll('section, .tile')].flatMap(card => [...card.querySelectorAll('h2, h3, p, li, svg text, .tile > *')]
    .filter(e => e.getBoundingClientRect().right > card.getBoundingClientRect().right).map(e => e.textContent))"""


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get("about:blank")
    driver.get_log("performance")  # the browser's own first page fetches its parts
    yield driver
    driver.quit()


def show(driver: Any, page: Path, width: int, scheme: str) -> None:
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.get(page.resolve().as_uri())


def requests(driver: Any) -> list[str]:
    """Addresses of all that was fetched since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def luminance(driver: Any, element: str, what: str) -> float:
    """0 to 255, of a computed colour."""
    colour = driver.execute_script(f"return getComputedStyle(document.querySelector('{element}')).{what}")
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3


def test_the_report_opens_clean_on_every_screen(cli: Cli, small: tuple[object, ...], chromium: Any) -> None:
    assert cli("--model", "llama", "--sparsity", 0.5, "--output", "out", *small).code == 0
    assert cli("--model", "llama", "--pattern", "2:4", "--method", "wanda", "--output", LONG, *small).code == 0
    assert cli("compare", "out", LONG, "--html", "both.html").code == 0
    for page, picture in ((Path("out/report.html"), "#sparsity"), (Path("both.html"), "#sparsities")):
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                show(chromium, page, width, scheme)
                assert [url for url in requests(chromium) if not url.startswith("data:")] == [page.resolve().as_uri()]
                assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
                assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
                assert chromium.execute_script(WIDEST) == []
                assert chromium.execute_script(BROKEN) == []
                assert chromium.execute_script(LEFT) == []
                assert chromium.execute_script(f"return document.querySelector('{picture} svg').getBoundingClientRect().height") > 100
                ink, paper = luminance(chromium, f"{picture} svg text", "fill"), luminance(chromium, "section", "backgroundColor")
                assert (ink < 90 and paper > 200) if scheme == "light" else (ink > 180 and paper < 60)


def test_the_heat_map_and_its_numbers_are_there(cli: Cli, small: tuple[object, ...], chromium: Any) -> None:
    assert cli("--model", "llama", "--sparsity", 0.5, "--output", "out", *small).code == 0
    report = json.loads(Path("out/llmprune.json").read_text())
    show(chromium, Path("out/report.html"), 390, "light")
    matrices = [row["matrix"] for block in report["blocks"] for row in block["rows"]]
    cells = chromium.execute_script("return [...document.querySelectorAll('#sparsity svg text')].map(e => e.textContent)")
    assert len([cell for cell in cells if "." in cell]) == len(matrices)
    assert "q_proj" in cells
    assert chromium.execute_script("return document.querySelectorAll('#sparsity tbody tr').length") == len(matrices)
    assert not chromium.execute_script("return document.querySelector('#sparsity details').open")
    chromium.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert chromium.execute_script("return document.querySelector('#sparsity table').getBoundingClientRect().height") > 100
    assert chromium.execute_script(WIDEST) == []
    values = chromium.execute_script("return [...document.querySelectorAll('#quality data')].map(e => Number(e.value))")
    assert report["perplexity"][0]["pruned"]["value"] in values
