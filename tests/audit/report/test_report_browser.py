"""The report in a real browser, as a file and from the server of `hnml review`."""

import csv
import json
import os
import time

import pandas as pd
import pytest
from browsers import CHROMIUM, DRIVER, requested, start_browser
from commands import free_port
from reports import CURVES, EVIL, make_evidence, make_table
from reviews import make_run, serving, start_review

from hnml_hf.audit.report import Evidence, render_report
from hnml_hf.audit.review import read_annotations


selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads"))
    yield driver
    driver.quit()


@pytest.fixture
def report(tmp_path, browser):
    """60 rows in three classes, 52 of them issues with a picture; the second has none."""
    table = make_table(60)
    table["noise_score"] = 0.5 + 0.5 * table["noise_score"]
    table.loc[52:, "noise_score"] = 0.3
    evidence = make_evidence(52)
    evidence[1] = Evidence(reason=f"UnidentifiedImageError: {EVIL}")
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()  # nothing is kept from another test
    path = render_report(table, table.attrs, tmp_path / "report.html", evidence=evidence, curves=CURVES)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    yield table
    assert browser.get_log("browser") == []  # neither an error nor a violated policy
    urls = requested(browser)
    assert urls and {url.split(":")[0] for url in urls} <= {"file", "data", "blob"}


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def chord(browser, modifier, *keys):
    ActionChains(browser).key_down(modifier).send_keys(*keys).key_up(modifier).perform()


def undo(browser):
    chord(browser, Keys.CONTROL, "z")


def shown_ids(browser):
    return browser.execute_script("return [...document.querySelectorAll('.card')].map(c => c.dataset.id)")


def current(browser):
    return browser.execute_script("return document.querySelector('.card.now').dataset.id")


def ids(frame):
    return [str(index) for index in frame["index"]]


def choose(browser, name, value):
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event(['range', 'search'].includes(s.type) ? 'input' : 'change'))",
        name,
        str(value),
    )
    time.sleep(0.05)


def text(browser, name):
    return browser.find_element(By.ID, name).text


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen"
        time.sleep(0.02)


def downloaded(browser):
    for old in browser.downloads.iterdir():
        old.unlink()
    browser.find_element(By.ID, "download").click()
    path = browser.downloads / "annotations.csv"
    wait_for(path.exists)
    with open(path, newline="", encoding="utf-8") as file:
        return path, {row["index"]: row for row in csv.DictReader(file)}


def test_issues_come_first_and_pictures_are_large(browser, report):
    assert shown_ids(browser) == ids(report.head(24))
    frame = browser.find_element(By.CSS_SELECTOR, ".card .frame")
    assert frame.size["width"] >= 310 and frame.location["y"] < 330
    assert not browser.find_element(By.ID, "charts").is_displayed()
    second = browser.find_elements(By.CSS_SELECTOR, ".card")[1]
    assert "No picture: UnidentifiedImageError" in second.text and EVIL in second.text
    assert "0 of 52 decided, about" in text(browser, "count") and "of the remaining are wrong" in text(
        browser, "count"
    )


def test_keys_work_without_a_click_and_decided_cards_leave_at_once(browser, report):
    order = ids(report)
    press(browser, "w")
    wait_for(lambda: shown_ids(browser) == order[1:25])
    assert current(browser) == order[1]
    press(browser, "r", "u")
    assert shown_ids(browser) == order[3:27] and "1 wrong, 1 right, 1 unsure" in text(browser, "count")
    assert "3 of 52 decided" in text(browser, "count")
    undo(browser)
    wait_for(lambda: shown_ids(browser)[0] == order[2])
    press(browser, Keys.ARROW_RIGHT, "r")
    assert order[3] not in shown_ids(browser) and order[2] in shown_ids(browser)
    browser.refresh()
    assert "3 of 52 decided" in text(browser, "count") and shown_ids(browser)[0] == order[2]
    choose(browser, "status", "any")
    verdicts = browser.execute_script("return [...document.querySelectorAll('.card')].map(c => c.dataset.verdict)")
    assert verdicts[:4] == ["wrong", "right", "", "right"]
    press(browser, Keys.HOME, "x")
    choose(browser, "status", "open")
    assert shown_ids(browser)[0] == order[0]


def test_digits_typing_and_a_new_class(browser, report):
    table = report
    given = table["label"].tolist()
    press(browser, str((given[0] + 1) % 3 + 1))  # another class by its digit
    press(browser, str(given[1] + 1))  # the given one: the label is right
    press(browser, Keys.ENTER, "zebra", Keys.ENTER)
    hint = browser.find_element(By.CSS_SELECTOR, ".card .new")
    assert "is no class yet" in hint.text
    press(browser, Keys.ENTER)
    other = next(name for label, name in enumerate(("cat", "dog")) if label != given[3])
    press(browser, Keys.ENTER, other[:2], Keys.ENTER)  # the beginning of a name is enough
    path, rows = downloaded(browser)
    order = ids(table)
    assert [rows[i]["annotation"] for i in order[:4]] == ["wrong", "right", "wrong", "wrong"]
    assert int(rows[order[0]]["new_label"]) == (given[0] + 1) % 3
    assert (rows[order[2]]["new_label"], rows[order[2]]["new_label_name"]) == ("-1", "zebra")
    assert rows[order[3]]["new_label_name"] == other
    found = read_annotations(path, table)
    assert found["new_label_name"].tolist()[2:] == ["zebra", other] or len(found) == 4


def stroke(browser, key, code, **more):
    browser.execute_script(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {bubbles: true, ...arguments[0]}))",
        {"key": key, "code": code, **more},
    )


def test_keys_of_other_layouts_and_one_that_is_held(browser, report):
    """Russian W and Z, an input method, French 2 without Shift; a held key decides one card."""
    order, given = ids(report), report["label"].tolist()
    stroke(browser, "\u0446", "KeyW")
    stroke(browser, "Process", "KeyR")
    stroke(browser, "\u00e9", "Digit2")
    stroke(browser, "z", "KeyW")  # Z of a French layout: no key of this page
    stroke(browser, "u", "KeyU")
    for _ in range(5):
        stroke(browser, "u", "KeyU", repeat=True)
        stroke(browser, "2", "Digit2", repeat=True)
    assert "4 of 52 decided" in text(browser, "count")
    stroke(browser, "\u044f", "KeyZ", ctrlKey=True)
    wait_for(lambda: "3 of 52 decided" in text(browser, "count"))
    rows = downloaded(browser)[1]
    assert [rows[i]["annotation"] for i in order[:3]] == ["wrong", "right", "right" if given[2] == 1 else "wrong"]
    assert rows[order[2]]["new_label"] == "1"


def test_undo_reaches_what_was_decided_on_another_page(browser, report):
    order = ids(report)
    press(browser, "n", "w")
    assert order[24] not in shown_ids(browser)
    press(browser, "p", "p", "r", "n")
    undo(browser)
    undo(browser)
    wait_for(lambda: "0 of 52 decided" in text(browser, "count"))
    assert shown_ids(browser) == order[24:48]


def test_a_reload_can_undo_what_was_decided_before(browser, report):
    order = ids(report)
    press(browser, "w", "r", "w")
    undo(browser)
    chord(browser, Keys.SHIFT, Keys.ARROW_RIGHT)
    press(browser, "u")
    wait_for(lambda: "2 unsure" in text(browser, "count"))
    for left in ((order[2], "2 of 52"), (order[1], "1 of 52"), (order[0], "0 of 52")):
        browser.refresh()
        undo(browser)
        wait_for(lambda left=left: shown_ids(browser)[0] == left[0] and left[1] in text(browser, "count"))
    browser.refresh()
    assert not browser.find_element(By.ID, "undo").is_enabled() and "0 wrong, 0 right, 0 unsure" in text(
        browser, "count"
    )


def test_an_ambiguous_beginning_of_a_class_makes_no_class(browser, tmp_path):
    table = make_table(9, ("cat", "Cow", "crab"))
    table["noise_score"] = 0.9
    table["label"], table["label_name"] = 0, "cat"
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()
    evidence = [Evidence(shown.image) for shown in make_evidence(9)]
    browser.get(render_report(table, table.attrs, tmp_path / "report.html", evidence=evidence).as_uri())
    press(browser, Keys.ENTER, "c", Keys.ENTER, Keys.ENTER)
    hint = browser.find_element(By.CSS_SELECTOR, ".card .new")
    assert hint.text == "3 classes begin with “c”: cat, Cow, crab"
    assert "0 of 9 decided" in text(browser, "count")
    press(browser, "o", Keys.ENTER)
    wait_for(lambda: "1 of 9 decided" in text(browser, "count"))
    (row,) = downloaded(browser)[1].values()
    assert (row["annotation"], row["new_label_name"]) == ("wrong", "Cow")


def test_a_label_without_a_suggestion_is_wrong_without_a_class(browser, tmp_path):
    """Nothing is suggested for what no model saw. `W` says no class there; a typed one is kept."""
    table = make_table(9, ("cat", "dog", "crab"))
    table["noise_score"], table["label"], table["label_name"] = 0.9, 0, "cat"
    table.loc[:1, "suggested_label"], table.loc[:1, "suggested_name"] = 0, "cat"
    table.loc[2:, "suggested_label"], table.loc[2:, "suggested_name"] = 1, "dog"
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()
    evidence = [Evidence(shown.image) for shown in make_evidence(9)]
    browser.get(render_report(table, table.attrs, tmp_path / "report.html", evidence=evidence).as_uri())
    card, *_, last = browser.find_elements(By.CSS_SELECTOR, ".card")
    assert card.find_element(By.CSS_SELECTOR, ".says").text == "cat→?" and "No other class is suggested" in card.text
    assert last.find_element(By.CSS_SELECTOR, ".says").text == "cat→dog" and "suggested" not in last.text
    press(browser, "w")
    assert text(browser, "toast").endswith(": wrong, class unknown")
    press(browser, Keys.ENTER, "crab", Keys.ENTER)
    chord(browser, Keys.SHIFT, Keys.ARROW_RIGHT)
    press(browser, "w")
    assert text(browser, "toast") == "2 samples: wrong, dog"
    path, rows = downloaded(browser)
    assert [rows[i]["new_label_name"] for i in ids(table)[:4]] == ["", "crab", "dog", "dog"]
    found = read_annotations(path, table).set_index("index").loc[table["index"][:4]]
    assert found["annotation"].tolist() == ["wrong"] * 4 and found["new_label"].tolist() == [-1, 2, 1, 1]
    for _ in range(3):
        undo(browser)
    browser.find_element(By.ID, "file").send_keys(str(path))
    wait_for(lambda: "4 of 9 decided" in text(browser, "count"))
    assert downloaded(browser)[1] == rows


def test_a_report_without_maps_offers_none(browser, tmp_path):
    table = make_table(9)
    table["noise_score"] = 0.9
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()
    evidence = [Evidence(shown.image) for shown in make_evidence(9)]
    browser.get(render_report(table, table.attrs, tmp_path / "report.html", evidence=evidence).as_uri())
    assert "zoom" in browser.find_element(By.CSS_SELECTOR, ".tools").text
    assert " maps" not in browser.find_element(By.CSS_SELECTOR, ".tools").text
    press(browser, " ", "m")
    assert browser.find_element(By.ID, "zoom").is_displayed()
    assert browser.find_elements(By.CSS_SELECTOR, "[data-map]") == []
    assert not browser.find_element(By.ID, "toast").is_displayed()
    press(browser, Keys.ESCAPE)


def test_ranges_pages_and_pairs_are_decided_together(browser, report):
    order = ids(report)
    chord(browser, Keys.SHIFT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    picked = browser.execute_script("return [...document.querySelectorAll('.card.picked')].map(c => c.dataset.id)")
    assert picked == order[:3]
    press(browser, "r")
    assert "3 of 52 decided" in text(browser, "count") and shown_ids(browser)[0] == order[3]
    press(browser, "a", "w")
    assert "27 of 52 decided" in text(browser, "count")
    undo(browser)
    wait_for(lambda: "3 of 52 decided" in text(browser, "count"))
    first = report.iloc[3]
    rest = report.iloc[3:52]
    pair = rest[(rest["label"] == first["label"]) & (rest["suggested_label"] == first["suggested_label"])]
    sure = pair[pair["noise_score"] >= 0.9]
    press(browser, Keys.HOME, "b")
    assert f"{3 + len(sure)} of 52 decided" in text(browser, "count")
    assert not set(ids(sure)) & set(shown_ids(browser))
    browser.find_element(By.ID, "page-right").click()
    assert f"{3 + len(sure) + 24} of 52 decided" in text(browser, "count")


def test_filters_groups_orders_and_pages(browser, report):
    issues = report.head(52)
    choose(browser, "given", 1)
    chosen = issues[issues["label"] == 1]
    assert shown_ids(browser) == ids(chosen.head(24)) and f"{len(chosen)} shown" in text(browser, "count")
    choose(browser, "suggested", 0)
    assert shown_ids(browser) == ids(chosen[chosen["suggested_label"] == 0])
    browser.execute_script("document.getElementById('clear').click()")
    choose(browser, "least", 0.8)
    assert f"{(issues['noise_score'] >= 0.8).sum()} shown" in text(browser, "count")
    browser.execute_script("document.getElementById('clear').click()")
    choose(browser, "text", "7.JPG")
    assert shown_ids(browser) == ids(issues[issues["path"].str.endswith("7.jpg")])
    choose(browser, "text", "")
    choose(browser, "order", "index")
    assert shown_ids(browser) == [str(i) for i in sorted(issues["index"])[:24]]
    choose(browser, "order", "likely")
    press(browser, "n", "n")
    assert shown_ids(browser) == ids(issues.tail(4)) and not browser.find_element(By.ID, "next").is_enabled()
    press(browser, "g", "2", Keys.ENTER)
    wait_for(lambda: shown_ids(browser) == ids(issues.iloc[24:48]))
    choose(browser, "group", "pair")
    headings = browser.find_elements(By.CSS_SELECTOR, ".group b")
    assert len(headings) > 1 and "→" in headings[0].text
    choose(browser, "scope", "all")
    assert "60 shown" in text(browser, "count")


def test_a_cell_of_the_matrix_leads_to_its_issues(browser, report):
    browser.find_element(By.ID, "tab-charts").click()
    assert browser.find_element(By.ID, "charts").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "td [data-pair='1,0']").click()
    issues = report.head(52)
    assert shown_ids(browser) == ids(issues[(issues["label"] == 1) & (issues["suggested_label"] == 0)])
    assert browser.find_element(By.ID, "review").is_displayed()


def test_zoom_and_maps_with_honest_cells(browser, report):
    press(browser, " ")
    zoom = browser.find_element(By.ID, "zoom")
    assert zoom.is_displayed() and zoom.find_element(By.CSS_SELECTOR, ".frame").size["width"] > 600
    assert zoom.find_elements(By.TAG_NAME, "canvas") == []  # only on demand
    press(browser, "m")
    wait_for(lambda: zoom.find_elements(By.TAG_NAME, "canvas"))
    cells = browser.execute_script(
        "const c = document.querySelector('#zoom canvas');"
        " return [c.width, c.height, getComputedStyle(c).imageRendering]"
    )
    assert cells == [4, 4, "pixelated"]
    order = ids(report)
    press(browser, "w")  # decides, and goes on to the next
    wait_for(lambda: zoom.get_attribute("data-id") == order[1])
    press(browser, " ")
    assert not zoom.is_displayed() and current(browser) == order[1]
    browser.find_elements(By.CSS_SELECTOR, ".card .frame")[2].click()
    assert zoom.is_displayed() and zoom.get_attribute("data-id") == order[3]
    press(browser, Keys.ESCAPE)
    assert not zoom.is_displayed()


def test_annotations_are_imported_and_those_of_another_run_are_named(browser, report, tmp_path):
    press(browser, "w", "r")
    path, rows = downloaded(browser)
    undo(browser), undo(browser)
    wait_for(lambda: "0 of 52 decided" in text(browser, "count"))
    browser.find_element(By.ID, "file").send_keys(str(path))
    wait_for(lambda: "2 of 52 decided" in text(browser, "count"))
    assert downloaded(browser)[1] == rows
    undo(browser)
    wait_for(lambda: "0 of 52 decided" in text(browser, "count"))
    (tmp_path / "excel.csv").write_text("\ufeff" + path.read_text().replace(",", ";"))
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "excel.csv"))
    wait_for(lambda: "2 of 52 decided" in text(browser, "count"))
    assert downloaded(browser)[1] == rows
    (tmp_path / "other.csv").write_text(f"index,annotation,new_label\n5,right,\n{report['index'][9]},right,\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "other.csv"))
    wait_for(lambda: "Of another run and left out: 1 of 2 rows" in text(browser, "warning"))
    assert "3 of 52 decided" in text(browser, "count")
    first, second = report["index"][[20, 21]]
    lines = [f"{first},right,,anna", f"{second},right,,anna", f"{first},right,,bo", f"{second},wrong,,bo", ",right,,"]
    (tmp_path / "two.csv").write_text("\n".join(("index,annotation,new_label,annotator", *lines)))
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "two.csv"))
    wait_for(lambda: "5 of 52 decided" in text(browser, "count"))
    assert text(browser, "warning") == (
        f"Said once more, in another way, and left out: 1 of 5 rows, sample {second}. "
        "Of another run and left out: 1 of 5 rows, sample ."
    )
    assert {downloaded(browser)[1][str(index)]["annotation"] for index in (first, second)} == {"right"}
    (tmp_path / "words.csv").write_text(f"index,annotation,new_label\n{report['index'][10]},correct,\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "words.csv"))
    said = f"Neither wrong, right nor unsure and left out: 1 of 1 row, “correct” of sample {report['index'][10]}."
    wait_for(lambda: text(browser, "warning") == said)
    assert browser.find_element(By.ID, "toast").is_displayed()
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "no.csv"))
    wait_for(lambda: "no columns `index` and `annotation`" in text(browser, "warning"))
    assert not browser.find_element(By.ID, "toast").is_displayed()


def test_an_import_looks_for_the_images_where_ids_have_changed(browser, report, tmp_path):
    rows = report.iloc[[3, 5]].to_dict("records")
    path, other = rows[0]["path"].removeprefix("photos/"), report["index"][9]
    with open(tmp_path / "old.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "annotation", "new_label", "path"])
        writer.writerows(
            [[other, "right", "", path], [rows[1]["index"], "unsure", "", ""], [other, "right", "", "gone.jpg"]]
        )
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "old.csv"))
    wait_for(lambda: "2 of 52 decided" in text(browser, "count"))
    assert "Of another run and left out: 1 of 3 rows" in text(browser, "warning")
    found = {row["index"]: row["annotation"] for row in downloaded(browser)[1].values()}
    assert found == {str(rows[0]["index"]): "right", str(rows[1]["index"]): "unsure"}


def test_marks_of_an_earlier_version_are_imported(browser, report, tmp_path):
    first = report.iloc[0]
    (tmp_path / "marks.csv").write_text(f"index,mark,new_label,new_label_name\r\n{first['index']},wrong,1,dog\r\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "marks.csv"))
    wait_for(lambda: "1 of 52 decided" in text(browser, "count"))
    assert downloaded(browser)[1][str(first["index"])]["new_label_name"] == "dog"


def test_a_keyboard_reaches_everything_and_a_reader_hears_it(browser, report):
    browser.execute_script("document.getElementById('filters').open = true")
    order = browser.execute_script(
        "return [...document.querySelectorAll('a[href],button,select,input,summary,[tabindex]')]"
        ".filter(e => e.tabIndex >= 0 && e.offsetParent !== null).map(e => e.id || e.className)"
    )
    assert {"scope", "status", "given", "least", "order", "group", "text", "download", "import", "page"} <= set(order)
    assert sum(name.startswith("card") for name in order) == 1  # one stop for the gallery; arrows move inside
    names = browser.execute_script(
        "return [...document.querySelectorAll('.card, .card input, select, section, nav, dialog, .tools input')]"
        ".map(e => e.getAttribute('aria-label') || e.closest('label')?.textContent)"
    )
    assert all(names)
    press(browser, "n")
    assert browser.find_element(By.ID, "page").get_attribute("value") == "2"
    press(browser, "w")
    assert "wrong" in browser.execute_script("return document.getElementById('live').textContent")
    style = "return getComputedStyle(document.querySelector('.card:focus-visible')).outlineStyle"
    assert browser.execute_script(style) == "solid"
    press(browser, "?")
    assert "large picture" in text(browser, "keys")
    press(browser, Keys.ESCAPE)


def luminance(color):
    parts = [float(v) / 255 for v in color.split("(")[1].rstrip(")").replace(",", " ").split()[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme, browser, report):
    """WCAG AA: 4.5 to 1 between text and what is behind it."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    choose(browser, "status", "any")
    press(browser, "w", "r")
    pairs = browser.execute_script(
        "const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        " if (!/, 0\\)$|transparent/.test(c)) return c; } };"
        "return ['h1', '.soft', '.tile.main b', '.bars .name', 'select', '#download', '.says .g', '.says .s', '.why',"
        " '.path', '[data-set=wrong][aria-pressed=true]', '[data-set=right][aria-pressed=true]', '#count', 'kbd',"
        " 'td.same', '.badge', '#toast', 'summary', '[aria-selected=true]', '.none'].map(s => {"
        " const e = document.querySelector(s); return [s, getComputedStyle(e).color, behind(e)]; })"
    )
    for where, ink, paper in pairs:
        high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (where, ink, paper)
    page = luminance(pairs[0][2])
    assert page < 0.05 if scheme == "dark" else page > 0.8
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_shows_one_card_beside_the_other_and_no_bar_sideways(browser, report):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.refresh()
        width, frame = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.querySelector('.card .frame').clientWidth]"
        )
        assert width <= 390 and frame > 330
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# -- from a server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, browser):
    table = make_run(tmp_path, 80)
    with serving(tmp_path / "run", annotator="anna") as server:
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(server.url)
        wait_for(lambda: shown_ids(browser))
        yield table, server
        urls = requested(browser)
        assert urls and all(url.startswith((server.url, "data:", "blob:")) for url in urls)
    browser.get("about:blank")


def log_of(tmp_path):
    return tmp_path / "run" / "_audit" / "annotations.jsonl"


def saved(browser):
    return text(browser, "saved") == "all on disk"


def test_every_key_is_on_the_disk(browser, served, tmp_path):
    table, server = served
    order = ids(table)
    press(browser, "w", "r", "u", "1")
    wait_for(lambda: saved(browser) and order[4] == shown_ids(browser)[0])
    found = read_annotations(log_of(tmp_path), table).set_index("index")
    assert found["annotation"].tolist()[:3] == ["wrong", "right", "unsure"] and len(found) == 4
    undo(browser)
    wait_for(lambda: saved(browser) and order[3] == shown_ids(browser)[0])
    assert len(read_annotations(log_of(tmp_path), table)) == 3
    browser.refresh()
    undo(browser)
    wait_for(lambda: saved(browser) and order[2] == shown_ids(browser)[0])
    assert len(read_annotations(log_of(tmp_path), table)) == 2
    loaded = "return [...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth === 60)"
    wait_for(lambda: browser.execute_script(loaded))
    assert browser.get_log("browser") == []


def test_another_reviewer_is_seen_and_asked_for_an_annotation(browser, served, tmp_path):
    table, server = served
    order = ids(table)
    with serving(tmp_path / "run", annotator="bo") as other:
        line = {"index": int(order[0]), "annotation": "right", "new_label": 0, "new_label_name": "x"}
        other.review.log.append([line], "bo")
    wait_for(lambda: order[0] not in shown_ids(browser))  # asked for every three seconds
    choose(browser, "status", "mine")
    wait_for(lambda: order[0] in shown_ids(browser))
    assert "bo: right" in browser.find_element(By.CSS_SELECTOR, ".card .annotations").text
    press(browser, "w")
    wait_for(lambda: saved(browser) and "1 disputed" in text(browser, "count"))


def test_two_browsers_at_once_lose_nothing_and_see_each_other(browser, served, tmp_path, tmp_path_factory):
    """Each decides from its end of the list, by turns and without waiting for the other."""
    table, server = served
    other = start_browser(tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads"))
    try:
        other.get(server.url)
        choose(other, "annotator", "bo")
        wait_for(lambda: len(shown_ids(other)) == 24)
        press(other, Keys.END)
        for _ in range(5):
            press(browser, "w")
            press(other, "r")  # the place of a decided card is taken by the one before it
        wait_for(lambda: saved(browser) and saved(other))
        decided = read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)
        assert decided.groupby(["annotator", "annotation"]).size().to_dict() == {
            ("anna", "wrong"): 5,
            ("bo", "right"): 5,
        }
        assert decided["index"].nunique() == 10
        gone = {str(index) for index in decided["index"]}
        for one in (browser, other):
            wait_for(lambda one=one: text(one, "count").startswith("10 of ") and not gone & set(shown_ids(one)))
        other.refresh()
        wait_for(lambda: text(other, "count").startswith("10 of ") and not gone & set(shown_ids(other)))
    finally:
        other.quit()


def test_the_noise_rate_is_measured_by_a_sample(browser, served):
    choose(browser, "order", "rate")
    wait_for(lambda: "to know the noise rate within about 3 points: 0 done, no estimate yet" in text(browser, "rate"))
    press(browser, "w", "r", "w", "r", "w", "r")
    wait_for(lambda: "6 done" in text(browser, "rate"))


def test_maps_come_from_the_server_when_they_are_asked_for(browser, tmp_path):
    table = make_run(tmp_path, 80)
    (evidence,) = make_evidence(1)

    def maps(index):
        if index != int(table["index"][0]):
            raise ValueError("the dataset has changed")
        return evidence

    with serving(tmp_path / "run", maps=maps) as server:
        browser.get(server.url)
        wait_for(lambda: shown_ids(browser))
        press(browser, " ", "m")
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#zoom canvas"))
        press(browser, "w")
        wait_for(lambda: "There are no maps: the dataset has changed" in text(browser, "warning"))
        browser.get("about:blank")
    browser.get_log("browser")


class KillableReview:
    """`hnml review` on one port, which can be killed and started again; each start has another address."""

    def __init__(self, run, browser):
        self.run, self.browser, self.port = run, browser, str(free_port())
        self.start()

    def start(self):
        self.process, self.url, _ = start_review(self.run, "--port", self.port, "--annotator", "anna")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def open_and_press(self, *keys: str):
        """Open the page and wait until the keys are on the disk."""
        self.browser.get(self.url)
        wait_for(lambda: shown_ids(self.browser))
        press(self.browser, *keys)
        wait_for(lambda: saved(self.browser))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser.get("about:blank")
        self.kill()
        self.browser.get_log("browser")


def test_a_server_that_is_killed_in_the_middle_loses_no_key(browser, tmp_path):
    """Keys go on after the server's end; they wait in the browser, and reach the disk once it is back."""
    table = make_run(tmp_path, 80)
    order, run = ids(table), tmp_path / "run"
    with KillableReview(run, browser) as review:
        review.open_and_press("w", "w")
        review.kill()
        press(browser, "r", "r", "r")
        wait_for(lambda: "3 annotations kept in this browser" in text(browser, "warning"))
        assert len(read_annotations(log_of(tmp_path), table)) == 2
        review.start()
        browser.get(review.url)  # another token, the same port: what waits is of this page
        wait_for(lambda: saved(browser))
        found = read_annotations(log_of(tmp_path), table).set_index("index")
        assert found.loc[[int(i) for i in order[:5]], "annotation"].tolist() == ["wrong"] * 2 + ["right"] * 3


def test_keys_wait_for_a_server_with_another_address(browser, tmp_path):
    """The old tab stays open while the server comes back with a new token: what waits is neither sent nor dropped."""
    table = make_run(tmp_path, 80)
    order, run = ids(table), tmp_path / "run"
    with KillableReview(run, browser) as review:
        review.open_and_press("w")
        review.kill()
        press(browser, "r", "r")
        wait_for(lambda: "2 annotations kept in this browser" in text(browser, "warning"))
        review.start()
        time.sleep(3.5)  # two retries
        assert "another address: 2 annotations kept in this browser" in text(browser, "warning")
        press(browser, "u")
        wait_for(lambda: text(browser, "saved") == "3 not kept yet")
        assert len(read_annotations(log_of(tmp_path), table)) == 1
        browser.get(review.url)
        wait_for(lambda: saved(browser))
        found = read_annotations(log_of(tmp_path), table).set_index("index")
        assert found.loc[[int(i) for i in order[:4]], "annotation"].tolist() == ["wrong", "right", "right", "unsure"]


def test_a_refused_change_is_kept_and_offered(browser, served, tmp_path):
    """Nothing that the server will not take is called saved, and nothing is thrown away unasked."""
    table, server = served
    order = ids(table)
    (tmp_path / "other.csv").write_text("index,annotation,new_label\n5,right,\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "other.csv"))
    wait_for(lambda: text(browser, "saved") == "1 change not taken by the server")
    press(browser, "w")
    wait_for(lambda: order[0] not in shown_ids(browser) and len(read_annotations(log_of(tmp_path), table)) == 1)
    assert not saved(browser)
    browser.refresh()
    wait_for(lambda: text(browser, "refused-download") == "Download 1 not taken")
    for old in browser.downloads.iterdir():
        old.unlink()
    browser.find_element(By.ID, "refused-download").click()
    path = browser.downloads / "not_taken.csv"
    wait_for(path.exists)
    with open(path, newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["index"], row["annotation"]) == ("5", "right") and "Sample 5 is not in this audit" in row["reason"]
    browser.find_element(By.ID, "refused-forget").click()
    wait_for(lambda: saved(browser))
    assert not browser.find_element(By.ID, "refused").is_displayed()
    browser.get_log("browser")


def test_an_import_that_is_larger_than_a_request_may_be_arrives_in_pieces(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("hnml_hf.audit.review.server.MAX_BODY", 2**19)
    table = make_run(tmp_path, 5500, images=False)
    said = "".join(f"{index},right,\n" for index in table["index"])
    (tmp_path / "large.csv").write_text(f"index,annotation,new_label\n{said}")
    with serving(tmp_path / "run", annotator="anna") as server:
        browser.get(server.url)
        wait_for(lambda: shown_ids(browser))
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "large.csv"))
        wait_for(lambda: saved(browser) and len(read_annotations(log_of(tmp_path), table)) == 5500, 30)
        assert not text(browser, "warning")
        browser.get("about:blank")
    browser.get_log("browser")  # no image is there


def test_a_full_disk_is_named_and_the_key_waits_for_room(browser, served, tmp_path, monkeypatch):
    table, server = served
    order = ids(table)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        press(browser, "w")
        wait_for(lambda: "not be written: No space left on device. 1 annotation kept in" in text(browser, "warning"))
        assert text(browser, "saved") == "1 not kept yet"
    wait_for(lambda: saved(browser) and text(browser, "warning") == "")
    assert order[0] not in shown_ids(browser)
    assert read_annotations(log_of(tmp_path), table)["index"].tolist() == [int(order[0])]
    browser.get_log("browser")


def test_a_page_of_another_site_reads_and_changes_nothing(browser, served, tmp_path):
    table, server = served
    browser.get("about:blank")
    body = json.dumps({"entries": [{"index": int(table["index"][0]), "annotation": "right"}], "batch": "ab" * 6})
    answer = browser.execute_async_script(
        "const [url, body, done] = arguments; (async () => { const out = [];"
        " for (const [path, options] of [['rows', {}], ['annotate', {method: 'POST', body, headers:"
        " {'content-type': 'application/json'}}], ['annotate', {method: 'POST', body, mode: 'no-cors'}]])"
        " try { const r = await fetch(url + path, options); out.push(r.type); } catch { out.push('failed'); }"
        " done(out); })()",
        server.url,
        body,
    )
    assert answer[:2] == ["failed", "failed"] and answer[2] in ("opaque", "failed")
    assert len(read_annotations(log_of(tmp_path), table)) == 0
    browser.get(server.url)
    browser.get_log("browser")


def test_what_the_server_says_of_a_bad_import_is_shown(browser, served, tmp_path):
    (tmp_path / "other.csv").write_text("index,annotation,new_label\n5,right,\n")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "other.csv"))
    wait_for(lambda: "Sample 5 is not in this audit" in text(browser, "warning"))
    assert isinstance(served[0], pd.DataFrame)
    browser.get_log("browser")


def test_a_report_without_issues_says_so_and_shows_all_rows(tmp_path, browser):
    table = make_table(9)
    table["noise_score"] = table["noise_score"] / 4
    table.attrs["dataset_fingerprint"] = os.urandom(8).hex()
    path = render_report(table, table.attrs, tmp_path / "report.html", evidence=make_evidence(9))
    browser.get(path.as_uri())
    assert text(browser, "empty") == "No label is probably wrong. The filters have all rows."
    assert text(browser, "count").startswith("0 of 0 decided")
    browser.execute_script(
        "const s = document.getElementById('scope'); s.value = 'all'; s.dispatchEvent(new Event('change'))"
    )
    assert len(browser.find_elements(By.CSS_SELECTOR, ".card img")) == 9
