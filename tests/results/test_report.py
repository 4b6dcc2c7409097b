"""The report: one file that needs nothing else, in which every text stays text; and what a browser makes of it."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import plotly.offline
import pytest
from report_samples import EVIL, analysis_results, make_run, make_runs, write_analyses
from test_table import failed_row, make_row

from recbole_llm import cli
from recbole_llm.errors import UserError
from recbole_llm.results.files import write_json
from recbole_llm.results.reading import Analysis
from recbole_llm.results.report.analyses import SECTIONS, section_of
from recbole_llm.results.report.parts import Details, Plot, Row, Table
from recbole_llm.results.report.write import write_report

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """The elements of a page, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.texts.append(data)
        else:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report of everything there is."""
    folder = tmp_path_factory.mktemp("report")
    runs = make_runs(folder / "saved")
    return write_report([*runs, write_analyses(folder / "analyses")], folder / "report.html", title=f"Report {EVIL}")


@pytest.fixture(scope="module")
def page(full):
    return Reader(full.read_text(encoding="utf-8"))


def texts_of(value):
    """All texts in a figure."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for entry in value for text in texts_of(entry)]
    return [value] if isinstance(value, str) else []


def test_the_file_is_small_and_needs_nothing_else(full, page):
    assert full.stat().st_size < 5_000_000
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    own = page.scripts["style"] + page.scripts["script"].replace("http://www.w3.org", "")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", own)
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.partition("style-src")[0]
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert len(links) == len(set(links)) == 3 + len(SECTIONS) and set(links) <= anchors


def test_plotly_is_in_it_once(page):
    library = gzip.decompress(base64.b64decode(page.scripts["plotly"])).decode()
    assert library == plotly.offline.get_plotlyjs()
    assert [attributes.get("id") for tag, attributes in page.elements if tag == "script"] == ["figures", "plotly", None]
    assert "plotly.js v" in page.text and "MIT" in page.text


def test_every_text_stays_text(full, page):
    assert EVIL in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.count("title") == page.count("h1") == 1
    shown = texts_of(json.loads(page.scripts["figures"]))
    assert any(text.startswith("&lt;script&gt;") for text in shown), "a label is escaped for plotly, which reads some HTML"
    assert not any("<" in text.replace("<br>", "") for text in shown)
    assert "<script>window.evil" not in full.read_text(encoding="utf-8")


def test_what_is_in_the_page(page):
    """Table, settings that differ, commands, versions, seeds, times and machine; the analyses' commands."""
    text = page.text
    for wanted in (
        "ml-100k · 200 users · seeds 1, 2 (mean ± standard deviation)",
        "95 % interval",
        "LLMSTAR beta=0.5",
        "corrected for 2 comparisons (Holm)",
        "recbole-llm run --model=LLMSTAR --dataset=ml-100k --seed=2",
        "recbole-llm analyze order",
        "Settings in which runs differ",
        "2026-01-01 10:00",
        "4.4 min",
        "1.50 GB",
        "a CPU, 2 cores",
        "torch: 2.13",
        "commit: 0123abc, dirty: no",
    ):
        assert wanted in text, wanted


def test_the_plots_have_the_numbers(page):
    figures = json.loads(page.scripts["figures"])
    forest = figures[0]
    assert forest["layout"]["yaxis"]["categoryarray"] == ["LLMSTAR beta=0", "LLMSTAR beta=0.5"]
    trace = forest["data"][0]
    for value, up, down in zip(trace["x"], trace["error_x"]["array"], trace["error_x"]["arrayminus"], strict=True):
        assert value < 0 and up > 0 and down > 0 and value + up < 0
    assert trace["marker"]["symbol"] == ["circle", "circle"]
    shares = figures[2]["data"][0]["y"]
    assert shares == sorted(shares) and shares[-1] == 1
    losses = [figure for figure in figures if figure["layout"]["yaxis"]["title"].get("text") == "training loss"]
    assert len(losses) == 6 and [trace["name"] for trace in losses[0]["data"]] == ["retrieval", "sequence"]


def test_a_model_has_one_color_though_others_have_no_curve(tmp_path):
    runs = make_runs(tmp_path / "saved")
    for run in tmp_path.glob("saved/SASRec-*/curve.json"):
        run.unlink()
    figures = json.loads(Reader(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")).scripts["figures"])
    quality, validation = figures[1]["data"], figures[3]["data"]
    colors = [{trace["name"].partition(" · ")[0]: trace["marker"]["color"] for trace in data} for data in (quality, validation)]
    assert len(colors[1]) == 2 and colors[1].items() <= colors[0].items()


@pytest.mark.parametrize("name", SECTIONS)
def test_each_analysis_has_a_table_and_a_plot(name):
    section = section_of(Analysis(name, analysis_results()[name], "recbole-llm analyze", Path(f"{name}.json")))
    parts = []
    waiting = list(section.parts)
    while waiting:
        part = waiting.pop()
        parts.append(part)
        waiting += part.parts if isinstance(part, (Row, Details)) else []
    assert section.title.endswith(": ml-100k")
    assert any(isinstance(part, Plot) for part in parts)
    tables = [part for part in parts if isinstance(part, Table)]
    assert tables and all(len(row) == len(table.header) for table in tables for row in table.rows)


def test_the_analyses_of_the_library_have_a_section():
    from recbole_llm.analysis.command import ANALYSES

    assert set(SECTIONS) == set(ANALYSES)


def test_numbers_are_sorted_as_such(page):
    values = [attributes["data-value"] for tag, attributes in page.elements if tag == "td" and "data-value" in attributes]
    assert any(re.fullmatch(r"0\.\d+", value) for value in values) and "nan" not in values


def test_published_figures_and_failures_are_shown(tmp_path):
    files = sorted((ROOT / "results").glob("*.json"))
    reader = Reader(write_report(files, tmp_path / "old.html").read_text(encoding="utf-8"))
    for file in files:
        for table in json.loads(file.read_text(encoding="utf-8"))["tables"]:
            assert " ".join(table["command"].split()) in reader.text
    for wanted in ("protocol full", "protocol retrieval", "LLM-SRec: whole training step"):
        assert wanted in reader.text
    write_json([make_row("A", [1, 2]), failed_row("B", error=EVIL)], tmp_path / "run.json")
    reader = Reader(write_report([tmp_path / "run.json"], tmp_path / "run.html").read_text(encoding="utf-8"))
    assert f"B FAILED: {EVIL}" in reader.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "neither a run nor a results_file"),
        ('{"analysis": "order", "results": [{"model": 1}]}', "damaged or of another version"),
        ('{"analysis": "horoscope", "results": [{}]}', "no report of the analysis 'horoscope'; known: dataset, order"),
        ('{"analysis": "order", "results": [3]}', "holds no results of an analysis"),
        ('{"tables": [{"dataset": "d", "rows": [{"model": "A", "metrics": {"hit@1": "x"}}]}]}', "a metric that is no number"),
        ("[]", "nothing to report"),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(tmp_path, content, message):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([tmp_path / "in.json"], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "saved" / "a", "SASRec")
    make_run(tmp_path / "saved" / "b", "LLMSTAR", shift=2)
    assert cli.main(["report", "saved", "--title=1: two", "--against=LLMSTAR", "--metric=HIT@10"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    text = Reader(Path("report.html").read_text(encoding="utf-8")).text
    assert "hit@10 vs LLMSTAR" in text and text.startswith("1: two")
    assert cli.main(["report", "saved", "--against=Nobody"]) == cli.main(["report", "nowhere"]) == cli.main(["report"]) == 2
    assert cli.main(["report", "saved", "--output=saved"]) == 2
    told = capsys.readouterr().err
    assert told.count("Error: ") == 4 and "Traceback" not in told


# --- in a browser ----------------------------------------------------------------------------------------------------

DRIVER = """
<iframe id="frame" style="border:0;width:1280px;height:900px"></iframe><pre id="outcome"></pre>
<script>
const frame = document.getElementById("frame"), outcome = {};
const wait = (done) => new Promise((resolve) => {
  const look = () => done() ? resolve() : setTimeout(look, 50);
  look();
});
frame.srcdoc = PAGE;
(async () => {
  await wait(() => frame.contentDocument && frame.contentDocument.documentElement.dataset.drawn);
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const places = [...page.querySelectorAll("[data-figure]")];
  outcome.places = places.length;
  outcome.drawn = places.filter((place) => place.querySelector("svg.main-svg")).length;
  outcome.overflow = {};
  for (const width of [1280, 420]) {
    frame.style.width = width + "px";
    await new Promise((resolve) => setTimeout(resolve, 500));
    outcome.overflow[width] = root.scrollWidth - root.clientWidth;
  }
  const color = () => view.getComputedStyle(page.body).backgroundColor;
  const ink = () => view.getComputedStyle(places[0].querySelector("text")).fill;
  outcome.light = [color(), ink()];
  page.getElementById("theme").click();
  await new Promise((resolve) => setTimeout(resolve, 500));
  outcome.dark = [color(), ink()];
  const table = page.querySelector("table"), head = table.querySelectorAll("thead button")[1];
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.value).map(Number);
  head.click(); outcome.down = column();
  head.click(); outcome.up = column();
  const legend = page.querySelector(".legend button");
  legend.click(); outcome.pressed = legend.getAttribute("aria-pressed");
  view.dispatchEvent(new Event("beforeprint"));
  outcome.closed = page.querySelectorAll("details:not([open]):not(.long)").length;
  view.dispatchEvent(new Event("afterprint"));
  outcome.reclosed = page.querySelectorAll("details:not([open])").length;
  outcome.theme = root.dataset.theme;
  outcome.evil = view.evil === undefined && page.images.length === 0;
  document.getElementById("outcome").textContent = JSON.stringify(outcome);
})();
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(full, tmp_path):
    """Drawn whole, nothing wider than the window, sorted by a click, light and dark, open in print, no script but its own."""
    text = json.dumps(full.read_text(encoding="utf-8")).replace("<", "\\u003c")
    driver = DRIVER.replace("PAGE", text)
    (tmp_path / "driver.html").write_text(f'<meta charset="utf-8">{driver}', encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=1", "--virtual-time-budget=60000", "--window-size=1400,1000"]
    command += ["--dump-dom", f"file://{tmp_path / 'driver.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="outcome">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    outcome = json.loads(html.unescape(found[1]))
    assert outcome["places"] == outcome["drawn"] > 20
    assert outcome["overflow"] == {"1280": 0, "420": 0}
    assert outcome["light"][0] == "rgb(255, 255, 255)" and outcome["dark"][0] == "rgb(20, 23, 26)"
    assert outcome["light"][1] != outcome["dark"][1]
    assert outcome["down"] == sorted(outcome["down"], reverse=True) and outcome["up"] == sorted(outcome["up"])
    assert len(set(outcome["up"])) == 3
    assert outcome["pressed"] == "false" and outcome["closed"] == 0 and outcome["reclosed"] > 5
    assert outcome["theme"] == "dark" and outcome["evil"]
