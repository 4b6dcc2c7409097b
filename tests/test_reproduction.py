"""docs/reproduction.md: a row for every table and figure of the four papers, and commands that resolve."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recbole_llm import cli, quick_start
from recbole_llm.config.command_line import parse_command_line
from recbole_llm.config.presets import presets_of
from recbole_llm.config.schema import known_keys
from recbole_llm.registry import MODELS

PAGE = (Path(__file__).parents[1] / "docs" / "reproduction.md").read_text(encoding="utf-8")
# What each paper has, from its captions.
PAPERS = {"LLM-SRec": (13, 9), "LLM-STAR": (6, 4), "ST2SI": (9, 5), "RSLLM": (4, 5)}
SECTIONS = {part.split()[0]: part for part in PAGE.split("\n## ")[1:]}
SHORT = dict(re.findall(r"`(RUN\d?)` is `(.+?)`", PAGE))
WHOLE = [
    pytest.param(f"{SHORT[name]} {rest}".strip(), id=f"{name} {rest[:60]}", marks=[pytest.mark.slow] * (rest.count(",") > 4))
    for name, rest in re.findall(r"`(RUN\d?)\b([^`]*)`", PAGE)
    if "<" not in rest and rest
]
OPTIONS = [found for found in re.findall(r"`((?:recbole-llm analyze )?[^`]*--[^`]+)`", PAGE) if "RUN" not in found]


def test_every_table_and_figure_has_a_row():
    assert set(SECTIONS) == set(PAPERS)
    for paper, (tables, figures) in PAPERS.items():
        named: dict[str, list[int]] = {"Table": [], "Figure": []}
        for row in re.findall(r"^\| ((?:Table|Figure) [^|]+) \|", SECTIONS[paper], re.M):
            kind = "Table"
            for word in re.findall(r"Table|Figure|\d+", row):
                if word.isdigit():
                    named[kind].append(int(word))
                else:
                    kind = word
        assert sorted(named["Table"]) == list(range(1, tables + 1)), paper
        assert sorted(named["Figure"]) == list(range(1, figures + 1)), paper


def test_every_row_has_a_known_status():
    for line in PAGE.splitlines():
        if re.match(r"\| (Table|Figure) ", line):
            assert line.split("|")[-2].strip() in {"run", "run, in part", "ready", "data", "no"}, line


@pytest.mark.parametrize("line", WHOLE)
def test_a_command_resolves(line, monkeypatch, capsys):
    configured = []

    def configure_all(models, dataset, seeds=(), config_file_list=None, settings=None, on_row=None):
        for name in models:
            configured.append(quick_start.configure(name, dataset, models, None, config_file_list, settings or {}))
        return []

    monkeypatch.setattr(quick_start, "compare", configure_all)
    monkeypatch.setattr("recbole_llm.config.settings.check_dataset", lambda dataset, folder: None)
    monkeypatch.setattr("recbole_llm.config.first_look.check_dataset", lambda dataset, folder: None)
    assert cli.main(["run", *shlex.split(line)[2:]]) == 0, capsys.readouterr().err
    assert configured


@pytest.mark.parametrize("line", OPTIONS)
def test_other_keys_are_known(line):
    of_analyses = {"model", "dataset", "training", "inference", "results", "over", "train", "users", "topk"}
    words = [word for word in shlex.split(line) if word.startswith("--")]
    given = parse_command_line([word for word in words if "<" not in word], flags=())
    known = set().union(*(known_keys(name) for name in MODELS)) | of_analyses | {"preset"}
    for key, value in given.items():
        assert key.rpartition(".")[2] in known, key
        if key == "preset":
            assert any(value in presets_of(name) for name in MODELS)


def test_there_are_commands():
    assert len(WHOLE) >= 8 and len(OPTIONS) >= 15
