"""What the documentation says is what the package does: pictures, figures, models, links and versions."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

import recbole_llm
from recbole_llm import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {file.stem: file.read_text(encoding="utf-8") for file in sorted((DOCS / "results").glob("*.md"))}
RESULTS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "results").glob("*.json"))}


def cells(page: str) -> list[list[str]]:
    """The rows of all tables of a page, without the code marks."""
    rows = [line.replace("`", "").strip().strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip().removesuffix(" *") for cell in row] for row in rows]


@pytest.mark.parametrize("name", ["architecture", "figures"])
def test_a_picture_is_up_to_date(name):
    script = runpy.run_path(str(DOCS / f"{name}.py"))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["draw"](), f"run: python docs/{name}.py"


def test_no_arrow_points_up():
    """The picture's script refuses rooms that are out of order, and leaves out what other imports imply."""
    direct = runpy.run_path(str(DOCS / "architecture.py"))["direct"]
    assert direct("abc", {"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": ["b"], "b": ["c"], "c": []}
    with pytest.raises(ValueError, match="c imports a"):
        direct("abc", {"a": set(), "b": set(), "c": {"a"}})


def test_every_room_is_described():
    rooms, _ = runpy.run_path(str(DOCS / "architecture.py"))["rooms_and_imports"]()
    described = re.findall(r"^\| `(\w+)` \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert described == rooms


def test_every_topic_has_its_raw_figures():
    assert set(PAGES) - {"index"} == set(RESULTS) - {"speed"}
    for name in RESULTS:
        assert f"`results/{name}.json`" in PAGES["index"]


@pytest.mark.parametrize("topic", sorted(set(RESULTS) - {"speed", "order"}))
def test_a_page_has_the_raw_figures(topic):
    """Each row of the raw figures is a row of the page: its numbers in the order of the columns."""
    shown = cells(PAGES[topic])
    rows = [row for table in RESULTS[topic]["tables"] for row in table["rows"]]
    assert rows
    for row in rows:
        # ST2SI's accuracies have a column of their own, and three digits.
        values = [value for name, value in row["metrics"].items() if not name.startswith("ilp_")]
        figures = [f"{value:.4f}".removeprefix("0") for value in values]
        label = row["model"].removeprefix("RSLLM, ")
        here = [line[1 : 1 + len(figures)] for line in shown if line[0] in (row["model"], label)]
        assert figures in here, row["model"]


def test_the_page_on_order_has_the_raw_figures():
    names = {"LLMSRec": "LLM-SRec", "LLMSTAR": "LLM-STAR", "last": "last 3", "ndcg@10": "NDCG@10", "hit@10": "HR@10"}
    tables = RESULTS["order"]["tables"]
    rows = [row for table in tables for row in table["rows"] if "jaccard" in row and row["metric"].endswith("@10")]
    shown = cells(PAGES["order"])
    assert len(rows) >= 16
    for row in rows:
        means = [f"{row[name]:.4f}".removeprefix("0") for name in ("original", "perturbed")]
        change, low, high = (f"{100 * value:+.1f} %" for value in (row["change"], *row["change_interval"]))
        kind = row["condition"].removeprefix("inference ")
        head = [names.get(name, name) for name in (row["model"], kind, row["metric"])]
        line = [*head, *means, change, f"{low} to {high}"]
        assert line in [found[:7] for found in shown], line


def test_the_speed_page_has_the_raw_figures():
    shown = cells((DOCS / "speed.md").read_text(encoding="utf-8"))
    rows = [row for table in RESULTS["speed"]["tables"] for row in table["rows"] if "ratio" in row]
    assert len(rows) == 12
    for row in rows:
        ratio = "132" if row["ratio"] == 132 else f"{row['ratio']:.2f}"
        assert [row["what"], ratio, row.get("bound", "")] in shown


def test_every_model_has_a_section():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(#", page, re.MULTILINE)
    own = [name for name, entry in registry.MODELS.items() if entry.model.startswith("recbole_llm.")]
    own += registry.BASELINES
    assert listed == own
    for name in own:
        assert re.search(rf"--model=\S*\b{name}\b", page), name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    for command in ("make quickstart", "make test"):
        assert f"    {command}\n" in readme
    links = re.findall(r"\]\(([^)#]+)", readme)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).is_file()] == []


def test_settings_named_by_the_models_page_are_keys():
    """A key that is renamed must be renamed in the documentation."""
    from recbole_llm.config.schema import known_keys, read_schema

    schema = [*read_schema().values(), *map(known_keys, registry.BASELINES)]
    known = {name for keys in schema for name in keys}
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--(?:[A-Za-z]+(?::\w+)?\.)?([a-z_]+)=", page)) | set(re.findall(r"`([a-z_]+): ", page))
    assert len(named) > 10 and named <= known | {"model", "dataset"}, sorted(named - known)


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == recbole_llm.__version__


def warn_in(module: str) -> None:
    exec("import warnings; warnings.warn('old', DeprecationWarning)", {"__name__": module})


def test_deprecated_calls_of_our_own_code_fail():
    with pytest.raises(DeprecationWarning, match="old"):
        warn_in("recbole_llm.data.dataset")
    warn_in("another_package")  # others' are not ours to repair
