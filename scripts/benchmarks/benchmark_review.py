"""What a review costs: label issues decided by keyboard in a real browser, with kills in between, and a million rows.

    python scripts/benchmarks/benchmark_review.py --output docs/results/review.json
    python scripts/benchmarks/benchmark_review.py --against ../earlier --output docs/results/review.json
    python scripts/benchmarks/benchmark_review.py --screenshots docs/images

Needs selenium and Debian's `chromium` and `chromium-driver`. Pictures are those of the quickstart (Fashion-MNIST).
Every figure includes selenium's own time for each key, some 10 ms; a person's time to look is not measured.
`--against` measures the first page of an earlier checkout and of this one by turns, for a machine that others use too,
and adds that to the file.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from provenance import provenance

from hnml_hf import load_noisy_dataset
from hnml_hf.audit.review.annotations import read_annotations
from hnml_hf.audit.table import FORMAT, write_audit


PORT = 8651
ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def make_table(n: int, names: list[str], labels: np.ndarray, suggested: np.ndarray, score: np.ndarray, paths):
    """A table of scores with a summary, most probably wrong first."""
    order = np.argsort(-score, kind="stable")
    label_names = np.asarray(names, dtype=object)
    table = pd.DataFrame(
        {
            "index": np.arange(n)[order],
            "path": np.asarray(paths, dtype=object)[order],
            "label": labels[order],
            "label_name": label_names[labels[order]],
            "suggested_label": suggested[order],
            "suggested_name": label_names[suggested[order]],
            "noise_score": score[order],
            "rank": np.arange(1, n + 1),
            "given_probability": 0.9 * (1 - score[order]),
            "suggested_probability": 0.9 * score[order],
            "times_seen": 1,
        }
    )
    k = len(names)
    matrix = np.full((k, k), 0.1 / (k - 1)) + (0.9 - 0.1 / (k - 1)) * np.eye(k)
    rate = float(score.mean())
    table.attrs = {
        "format": FORMAT,
        "class_names": names,
        "noise_rate": rate,
        "noise_rate_interval": [max(rate - 0.03, 0), rate + 0.03],
        "transition_matrix": matrix.tolist(),
        "transition_matrix_interval": None,
        "dataset_fingerprint": f"benchmark-{n}",
        "source": "Fashion-MNIST",
        "provenance": "Scores made up for a benchmark.",
    }
    return table


def photographs(folder: Path, count: int, side: int = 640):
    """Images of the quickstart as JPEG files of a photograph's size: paths, names, given and true labels."""
    data = load_noisy_dataset("quickstart")["train"]
    names = data.features["label"].names
    generator = np.random.default_rng(0)
    rows = generator.choice(len(data), count, replace=False)
    paths, true = [], np.array(data["label"])[rows]
    labels = np.where(generator.random(count) < 0.6, (true + generator.integers(1, 10, count)) % 10, true)
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows.tolist()):
        paths.append(str(folder / f"{number:05}.jpg"))
        data[row]["image"].convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=85)
    return paths, names, labels, true


def decided_run(folder: Path, count: int) -> pd.DataFrame:
    """A run with `count` label issues, all scores above 0.5; its table, with the true class of each row."""
    paths, names, labels, true = photographs(folder / "photos", count)
    generator = np.random.default_rng(1)
    suggested = np.where(true == labels, (labels + 1) % 10, true)
    score = np.where(true == labels, 0.5 + 0.3 * generator.random(count), 0.7 + 0.3 * generator.random(count))
    table = make_table(count, names, labels, suggested, score, paths)
    write_audit(folder / "run" / "_audit", table)
    return table.assign(true=true[table["index"]])


class Server:
    """`scripts/review.py` in a process of its own, and the seconds until it printed its address."""

    def __init__(self, run: Path, port: int = PORT, tree: Path = ROOT):
        start = time.perf_counter()
        command = [sys.executable, tree / "scripts/review.py", run, "--port", str(port), "--annotator", "benchmark"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
        for line in self.process.stdout:
            if line.startswith("Review: "):
                self.url = line.split()[1]
                break
        self.seconds = time.perf_counter() - start

    def processor_seconds(self) -> float:
        """What the process has used so far, in steps of 10 ms: it does not depend on what else the machine does."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self) -> int:
        """The most memory that the process has had."""
        (line,) = [line for line in Path(f"/proc/{self.process.pid}/status").open() if line.startswith("VmHWM")]
        return int(line.split()[1]) // 1024

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def start_browser(profile: Path):
    from selenium import webdriver  # not for --help
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}", "--window-size=1400,1000"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def current(browser) -> str | None:
    return browser.execute_script("return document.querySelector('.card.now')?.dataset.id")


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError("the browser did not get there")
        time.sleep(0.005)
    return found


def press(browser, key: str):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser, duration=0).send_keys(key).perform()


def key_for(row) -> str:
    """What a person who knows the truth presses: right, wrong, or the digit of the true class."""
    if row.true == row.label:
        return "r"
    return "w" if row.true == row.suggested_label else str((row.true + 1) % 10)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and they in turn."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = []
    for child in children.get(pid, []):
        found += [child, *descendants(child)]
    return found


def kill_browser(browser):
    """SIGKILL to the browser and its driver: nothing is written in a hurry."""
    for pid in [*descendants(browser.service.process.pid), browser.service.process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    browser.service.process.wait()


class Reviewer:
    """Presses the key that a person who knows the truth would press, card by card."""

    def __init__(self, browser, keys: dict[str, str]):
        self.browser, self.keys, self.pressed, self.times, self.count = browser, keys, set(), [], 0

    def open(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        wait_for(lambda: current(browser))

    def decide(self):
        """One card, until the next one is there."""
        shown = current(self.browser)
        start = time.perf_counter()
        press(self.browser, self.keys[shown])
        self.pressed.add(shown)
        self.count += 1
        if len(self.pressed) < len(self.keys):
            wait_for(lambda: current(self.browser) not in (None, shown))
        self.times.append(time.perf_counter() - start)


def keyboard(folder: Path, count: int) -> dict:
    """Decide `count` issues; the server is killed after a third of them, the browser after two thirds."""
    table = decided_run(folder, count)
    keys = {str(row.index): key_for(row) for row in table.itertuples(index=False, name="Row")}
    server, browser = Server(folder / "run"), start_browser(folder / "profile")
    reviewer = Reviewer(browser, keys)
    reviewer.open(browser, server.url)
    killed = {}
    while len(reviewer.pressed) < count:
        reviewer.decide()
        if len(reviewer.pressed) >= count // 3 and "server" not in killed:
            server.kill()
            for _ in range(3):  # keys that find no server
                reviewer.decide()
            killed["server"] = len(reviewer.pressed)
            server = Server(folder / "run")
            reviewer.open(browser, server.url)
        elif len(reviewer.pressed) >= 2 * count // 3 and "browser" not in killed:
            kill_browser(browser)
            killed["browser"] = len(reviewer.pressed)
            browser = start_browser(folder / "profile")
            reviewer.open(browser, server.url)
    wait_for(lambda: browser.find_element("id", "saved").text == "all on disk")
    browser.quit()
    server.kill()
    found = read_annotations(folder / "run" / "_audit" / "annotations.jsonl", table).set_index("index")
    lost = count - len(found)
    true = table.set_index("index").loc[found.index, "true"]
    return {
        "issues": count,
        "keystrokes": reviewer.count,
        "seconds": round(sum(reviewer.times), 1),
        "seconds_per_issue": round(sum(reviewer.times) / count, 4),
        "median_seconds_to_next_card": round(statistics.median(reviewer.times), 4),
        "p99_seconds_to_next_card": round(float(np.quantile(reviewer.times, 0.99)), 4),
        "killed_after": killed,
        "annotations_lost": lost,
        "annotations_wrong": int((found["new_label"] != true).sum()),
    }


def large_run(folder: Path, n: int) -> np.random.Generator:
    """A run of n rows in 100 classes and 1,000 folders, without images."""
    generator = np.random.default_rng(0)
    names = [f"class {number:02}" for number in range(100)]
    labels, suggested = generator.integers(0, 100, n), generator.integers(0, 100, n)
    score = generator.beta(0.2, 1.0, n)
    paths = [f"/photos/train/folder {row % 1000:03}/{row:07}.jpg" for row in range(n)]
    write_audit(folder / "run" / "_audit", make_table(n, names, labels, suggested, score, paths))
    return generator


def first_pages(folder: Path, n: int, earlier: Path, times: int = 8) -> dict:
    """Seconds from the start of the process to the first rows, and of the first page by folder, of two checkouts."""
    large_run(folder, n)
    found: dict[str, list] = {"earlier": [], "now": []}
    for _ in range(times):
        for name, tree in (("earlier", earlier), ("now", ROOT)):
            start = time.perf_counter()
            server = Server(folder / "run", tree=tree)
            token, connection = server.url.split("/")[3], HTTPConnection("127.0.0.1", PORT)
            took = []
            for path in ("", "rows?size=24", "rows?size=24&group=folder"):
                if "group" in path:
                    took.append(time.perf_counter() - start)
                    time.sleep(1)  # somebody looks at the first page
                    start = time.perf_counter()
                connection.request("GET", f"/{token}/{path}")
                connection.getresponse().read()
            found[name].append((took[0], time.perf_counter() - start))
            connection.close()
            server.kill()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=earlier, capture_output=True, text=True, check=True)
    result: dict = {"rows": n, "times": times, "earlier_commit": commit.stdout.strip()}
    for name, seconds in found.items():
        for what, values in zip(("first_page", "first_by_folder"), np.array(seconds).T, strict=True):
            result.setdefault(f"seconds_to_{what}", {})[name] = {
                "best": round(float(values.min()), 2),
                "median": round(float(np.median(values)), 2),
            }
    return result


def million(folder: Path, n: int) -> dict:
    """Start, first page and other pages of a review of n rows."""
    generator = large_run(folder, n)
    server = Server(folder / "run")
    started = server.processor_seconds()
    token = server.url.split("/")[3]
    connection = HTTPConnection("127.0.0.1", PORT)

    def ask(path: str, body: dict | None = None) -> tuple[float, bytes]:
        start = time.perf_counter()
        origin = {"Origin": f"http://127.0.0.1:{PORT}", "Content-Type": "application/json"}
        connection.request("POST" if body else "GET", f"/{token}/{path}", body and json.dumps(body), origin)
        content = connection.getresponse().read()
        return time.perf_counter() - start, content

    page, _ = ask("")
    rows, content = ask("rows?size=24")
    total = json.loads(content)["total"]
    first = {"html": round(page, 3), "rows": round(rows, 3)}
    first_page = server.processor_seconds()
    asked = {}
    for name, words in {
        "label issues": "",
        "all rows": "scope=all",
        "by pair": "group=pair",
        "by folder": "group=folder",
        "all rows by folder": "scope=all&group=folder",
        "most informative": "scope=all&order=informative",
        "sample for the rate": "order=rate",
        "by id": "scope=all&order=index",
        "of one pair": "scope=all&given=3&suggested=7",
        "of one folder": "scope=all&folder=folder%20007",
        "by file name": "scope=all&text=0012345",
        "score of 90 % or more": "scope=all&least=0.9",
    }.items():
        words = words and f"&{words}"
        used = server.processor_seconds()
        cold, content = ask(f"rows?size=24{words}")
        processor = server.processor_seconds() - used
        last = json.loads(content)["total"]
        warm = [ask(f"rows?size=24&start={start}{words}")[0] for start in generator.integers(0, last, 20)]
        asked[name] = {"rows": last, "first": round(cold, 3), "slowest_of_20": round(max(warm), 3)}
        asked[name] |= {"processor_seconds_of_first": round(processor, 2)}
    sample = json.loads(content)["items"][0]["id"]
    key = []
    for number in range(20):
        entry = {"index": sample, "annotation": "right" if number % 2 else "unsure"}
        key.append(ask("annotate", {"entries": [entry], "batch": f"{number:08x}"})[0])
        key[-1] += ask("rows?size=24")[0]
    connection.close()
    memory = server.peak_mib()
    browser = start_browser(folder / "profile")
    start = time.perf_counter()
    browser.get(server.url)
    wait_for(lambda: current(browser))
    in_browser = time.perf_counter() - start
    loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    browser.quit()
    server.kill()
    return {
        "rows": n,
        "issues": total,
        "seconds_from_process_start_to_address": round(server.seconds, 2),
        "processor_seconds_to_address": round(started, 2),
        "processor_seconds_to_first_page": round(first_page, 2),  # with all that the process needs to start
        "peak_memory_mib": memory,
        "seconds_of_first_page": first,
        "seconds_of_first_page_in_browser": round(in_browser, 2),  # with the start of the browser's first tab
        "seconds_of_first_page_by_the_browsers_clock": round(loaded, 2),
        "seconds_of_a_page": asked,
        "seconds_of_an_annotation_and_the_next_page": {
            "median": round(statistics.median(key), 3),
            "slowest_of_20": round(max(key), 3),
        },
    }


def screenshots(folder: Path, output: Path):
    """The pictures of docs/audit.md."""
    table = decided_run(folder, 200)
    server, browser = Server(folder / "run", 0), start_browser(folder / "profile")
    output.mkdir(parents=True, exist_ok=True)

    def shot(name: str):
        time.sleep(3)  # pictures, and the end of the message at the bottom
        png = folder / "shot.png"
        browser.save_screenshot(str(png))
        with Image.open(png) as image:
            image.convert("RGB").save(output / f"review_{name}.webp", quality=75, method=6)

    def scheme(value: str):
        features = [{"name": "prefers-color-scheme", "value": value}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    keys = {str(row.index): key_for(row) for row in table.itertuples(index=False, name="Row")}
    reviewer = Reviewer(browser, keys)
    reviewer.open(browser, server.url)
    scheme("light")
    for _ in range(60):
        reviewer.decide()
    shot("light")
    scheme("dark")
    shot("dark")
    press(browser, " ")
    shot("zoom")
    press(browser, " ")
    scheme("light")
    browser.execute_script(
        "document.getElementById('filters').open = true; const s = document.getElementById('group');"
        " s.value = 'pair'; s.dispatchEvent(new Event('change'))"
    )
    shot("pairs")
    browser.execute_script("document.getElementById('clear').click(); document.getElementById('filters').open = false")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.refresh()
    shot("phone")
    browser.quit()
    server.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--issues", type=int, default=1000, help="Label issues decided by keyboard; 0: only the rows are measured."
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="Rows of the large review.")
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    parser.add_argument("--against", type=Path, help="An earlier checkout, and nothing else is measured.")
    parser.add_argument("--screenshots", type=Path, help="Folder for screenshots, and nothing else is done.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if options.screenshots:
            screenshots(folder, options.screenshots)
            return
        busy = os.getloadavg()[0]
        known = (
            json.loads(options.output.read_text(encoding="utf-8"))
            if options.output and options.output.is_file()
            else {}
        )
        if options.against:
            compared = first_pages(folder / "large", options.rows, options.against.absolute())
            loads = {"at the start": round(busy, 1), "at the end": round(os.getloadavg()[0], 1)}
            compared["provenance"] = {**provenance(threads=1), "load_average": loads}
            write({**known, "against": compared}, options.output)
            return
        result = {"keyboard": keyboard(folder / "keyboard", options.issues)} if options.issues else known
        print(json.dumps(result), flush=True)
        result["large"] = million(folder / "large", options.rows)
        loads = {"at the start": round(busy, 1), "at the end": round(os.getloadavg()[0], 1)}
        measured = {**provenance(threads=1), "load_average": loads}
        if options.issues:
            result["provenance"] = measured
        else:
            result["large"]["provenance"] = measured
    write(result, options.output)


def write(result: dict, output: Path | None):
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
