"""The report in a real browser: Debian's `chromium` and `chromium-driver`, driven by selenium, where they exist."""

import csv
import json
import os
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from reports import CURVES, EVIL, make_evidence, make_table

from hnml_hf import render_report
from hnml_hf.audit.report import Evidence


selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile, downloads = tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


@pytest.fixture
def report(tmp_path, browser):
    """60 rows in three classes, 52 of them with evidence; the second suspect has no picture."""
    table = make_table(60)
    evidence = make_evidence(52)
    evidence[1] = Evidence(reason=f"UnidentifiedImageError: {EVIL}")
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()  # nothing is kept from another test
    path = render_report(table, table.attrs, tmp_path / "report.html", evidence=evidence, curves=CURVES)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    yield table
    assert browser.get_log("browser") == []  # neither an error nor a violated policy
    requests = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if json.loads(entry["message"])["message"]["method"] == "Network.requestWillBeSent"
    ]
    requests = [url for url in requests if not url.startswith("chrome:")]  # the empty first tab
    assert requests and {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}


def cards(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".card")


def shown_ids(browser):
    return browser.execute_script("return [...document.querySelectorAll('.card')].map(c => c.dataset.id)")


def choose(browser, name, value):
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event(s.type === 'range' ? 'input' : 'change'))",
        name,
        str(value),
    )


def text(browser, name):
    return browser.find_element(By.ID, name).text


def test_renders_pictures_maps_and_placeholders(browser, report):
    assert len(cards(browser)) == 24
    assert shown_ids(browser) == [str(i) for i in report["index"][:24]]
    first, second = cards(browser)[:2]
    assert len(first.find_elements(By.TAG_NAME, "img")) == 3 and len(first.find_elements(By.TAG_NAME, "canvas")) == 2
    widths = browser.execute_script("return [...document.querySelectorAll('.card img')].map(i => i.naturalWidth)")
    assert set(widths) == {32}
    painted = browser.execute_script(
        "const c = arguments[0].querySelector('canvas');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)",
        first,
    )
    assert painted
    assert "No picture: UnidentifiedImageError" in second.text and EVIL in second.text
    assert browser.execute_script("return typeof window.alerted") == "undefined"


def test_filters_sorts_and_pages(browser, report):
    suspects = report.head(52)
    given = suspects[suspects["label"] == 1]
    choose(browser, "given", 1)
    assert shown_ids(browser) == [str(i) for i in given["index"][:24]]
    assert f"{len(given)} of 52 suspects" in text(browser, "count")
    choose(browser, "suggested", 0)
    both = given[given["suggested_label"] == 0]
    assert shown_ids(browser) == [str(i) for i in both["index"]]
    choose(browser, "given", "")
    choose(browser, "suggested", "")
    choose(browser, "least", 0.8)
    assert f"{(suspects['noise_score'] >= 0.8).sum()} of 52" in text(browser, "count")
    choose(browser, "least", 0)
    choose(browser, "sort", "index")
    assert shown_ids(browser) == [str(i) for i in sorted(suspects["index"])[:24]]
    choose(browser, "sort", "score")
    assert text(browser, "pages") == "3"
    for _ in range(2):
        browser.find_element(By.ID, "next").click()
    assert shown_ids(browser) == [str(i) for i in report["index"][48:52]]
    assert not browser.find_element(By.ID, "next").is_enabled()
    choose(browser, "least", 1)
    assert browser.find_element(By.ID, "empty").is_displayed() and cards(browser) == []


def test_all_rows_are_there_as_a_table(browser, report):
    browser.find_element(By.ID, "as-rows").click()
    rows = browser.find_elements(By.CSS_SELECTOR, "#rows tbody tr")
    assert len(rows) == 60 and rows[59].find_elements(By.TAG_NAME, "td")[1].text == str(report["index"][59])
    assert not browser.find_element(By.ID, "gallery").is_displayed()


def test_marks_by_keyboard_survive_a_reload_and_download(browser, report):
    browser.execute_script("document.querySelector('.card').focus()")
    keys = browser.switch_to.active_element
    keys.send_keys("w")  # marks, then goes on to the next card
    browser.switch_to.active_element.send_keys("r")
    browser.switch_to.active_element.send_keys("u")
    browser.switch_to.active_element.send_keys("w")
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert browser.switch_to.active_element.get_attribute("data-id") == str(report["index"][3])
    browser.switch_to.active_element.send_keys("x")  # takes the fourth mark back
    assert "marked: 1 wrong, 1 right, 1 unsure" in text(browser, "count")
    browser.refresh()
    assert [c.get_attribute("data-mark") for c in cards(browser)[:4]] == ["wrong", "right", "unsure", ""]
    cards(browser)[4].find_element(By.CSS_SELECTOR, "[data-set=wrong]").click()
    fix = cards(browser)[4].find_element(By.CSS_SELECTOR, ".fix input")
    fix.clear()
    fix.send_keys(EVIL, Keys.TAB)
    for old in browser.downloads.iterdir():
        old.unlink()
    browser.find_element(By.ID, "download").click()
    path = browser.downloads / "marks.csv"
    for _ in range(100):
        if path.exists():
            break
        time.sleep(0.1)
    with open(path, newline="", encoding="utf-8") as file:
        rows = {row["index"]: row for row in csv.DictReader(file)}
    ids, suggested, labels = (report[name].tolist() for name in ("index", "suggested_label", "label"))
    assert [rows[str(i)]["mark"] for i in (*ids[:3], ids[4])] == ["wrong", "right", "unsure", "wrong"]
    assert len(rows) == 4
    assert [int(rows[str(i)]["new_label"]) for i in (*ids[:3], ids[4])] == [suggested[0], labels[1], labels[2], 2]
    assert rows[str(ids[4])]["new_label_name"] == EVIL
    choose(browser, "marked", "none")
    assert f"{52 - 4} of 52" in text(browser, "count")


def test_a_keyboard_reaches_everything_and_a_reader_hears_it(browser, report):
    order = browser.execute_script(
        "return [...document.querySelectorAll('a[href],button,select,input,[tabindex]')]"
        ".filter(e => e.tabIndex >= 0 && e.offsetParent !== null).map(e => e.id || e.className)"
    )
    assert {"as-rows", "given", "least", "sort", "download", "card"} <= set(order)
    assert order.count("card") == 1  # one stop for the gallery; arrows move inside
    names = browser.execute_script(
        "return [...document.querySelectorAll('.card, select, section, nav')].map(e => e.getAttribute('aria-label')"
        " || e.closest('label')?.textContent)"
    )
    assert all(names)
    browser.execute_script("document.querySelector('.card').focus()")
    browser.switch_to.active_element.send_keys("n")
    assert text(browser, "page") == "2"
    browser.switch_to.active_element.send_keys("w")
    assert browser.execute_script("return document.getElementById('live').textContent").endswith("marked wrong")
    cell = browser.execute_script(
        "return getComputedStyle(document.querySelector('.card:focus-visible')).outlineStyle"
    )
    assert cell == "solid"


def luminance(colour):
    parts = [float(v) / 255 for v in colour.split("(")[1].rstrip(")").replace(",", " ").split()[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme, browser, report):
    """WCAG AA: 4.5 to 1 between text and what is behind it."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    cards(browser)[0].find_element(By.CSS_SELECTOR, "[data-set=wrong]").click()
    pairs = browser.execute_script(
        "const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        " if (!/, 0\\)$|transparent/.test(c)) return c; } };"
        "return ['h1', '.soft', '.tile.main b', '.bars .name', 'select', '#download', '.says .g', '.says .s',"
        " '.facts', '.path', '[data-set=wrong]', '[data-set=right]', '#count', 'kbd', 'td.same'].map(s => {"
        " const e = document.querySelector(s); return [s, getComputedStyle(e).color, behind(e)]; })"
    )
    for where, ink, paper in pairs:
        high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (where, ink, paper)
    page = luminance(pairs[0][2])
    assert page < 0.05 if scheme == "dark" else page > 0.8


def test_a_million_rows_and_two_thousand_suspects_stay_fluid(browser, tmp_path):
    n = 1_000_000
    one = make_table(1, ("a", "b"))
    table = pd.DataFrame({name: np.repeat(one[name].to_numpy(), n) for name in one})
    generator = np.random.default_rng(0)
    table["index"], table["rank"] = generator.permutation(n), np.arange(1, n + 1)
    table["label"], table["noise_score"] = generator.integers(0, 2, n), np.linspace(1, 0, n)
    path = render_report(table, one.attrs, tmp_path / "r.html", evidence=make_evidence(4) * 500)
    browser.get(path.as_uri())
    assert len(cards(browser)) == 24 and "2,000 of 2,000" in text(browser, "count")
    browser.find_element(By.ID, "as-rows").click()
    assert "1,000,000 of 1,000,000 rows" in text(browser, "count") and text(browser, "pages") == "10,000"
    took = browser.execute_script(
        "const out = {}; for (const [id, value] of [['given', '1'], ['sort', 'given'], ['sort', 'score']]) {"
        " const s = document.getElementById(id), t = performance.now(); s.value = value;"
        " s.dispatchEvent(new Event('change')); out[id + value] = performance.now() - t; }"
        " const t = performance.now(); document.getElementById('next').click();"
        " out.page = performance.now() - t; return out"
    )
    assert took["page"] < 300 and took["given1"] < 2000, took
    assert len(browser.find_elements(By.CSS_SELECTOR, "#rows tbody tr")) == 100
    assert browser.get_log("browser") == []
