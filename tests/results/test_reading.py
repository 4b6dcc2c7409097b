"""What tables are made of: run folders, results files old and new, results by user; the same in Python and as a command."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_samples import make_run, make_runs, write_analyses
from test_table import failed_row

import recbole_llm
from recbole_llm import cli
from recbole_llm.errors import UserError
from recbole_llm.results.files import write_json, write_per_user
from recbole_llm.results.reading import read_inputs
from recbole_llm.results.table import format_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pair(tmp_path):
    return [make_run(tmp_path / "saved" / name, name, shift=shift) for name, shift in (("SASRec", 0), ("LLMSTAR", 3))]


def test_a_folder_its_record_and_the_folder_above_are_one_run_each(pair, tmp_path):
    rows = [run.row() for run in pair]
    expected = format_table(rows)
    folders = [str(run.folder) for run in pair]
    assert recbole_llm.table(folders) == expected and "(no test)" not in expected
    assert recbole_llm.table([f"{folder}/run.json" for folder in folders]) == expected
    assert recbole_llm.table([tmp_path / "saved"], against="SASRec") == expected
    assert recbole_llm.table(rows) == expected == recbole_llm.table([rows[0], folders[1]])
    assert [row["curve"] for row in read_inputs(folders).rows] == [run.curve for run in pair]


def test_results_files_find_the_users_results_of_their_runs(pair, tmp_path):
    rows = [run.row() for run in pair]
    write_json(rows, tmp_path / "out.json")
    write_per_user(rows, tmp_path / "users.tsv")
    assert recbole_llm.table([tmp_path / "out.json"]) == format_table(rows)
    shutil.rmtree(tmp_path / "saved")
    assert "(no test)" in recbole_llm.table([tmp_path / "out.json"])
    assert recbole_llm.table([tmp_path / "users.tsv", tmp_path / "out.json"]) == format_table(rows)


def test_the_results_of_another_run_in_the_same_folder_are_not_taken(pair, tmp_path):
    write_json([run.row() for run in pair], tmp_path / "out.json")
    make_run(pair[1].folder, "LLMSTAR", shift=5)
    found = read_inputs([tmp_path / "out.json"]).rows
    assert [row.get("ranks") is None for row in found] == [False, True]


def test_a_file_given_twice_is_noticed_and_counts_once(pair, tmp_path, capsys):
    write_json([*(run.row() for run in pair), failed_row("B")], tmp_path / "out.json")
    shutil.copy(tmp_path / "out.json", tmp_path / "copy.json")
    assert cli.main(["table", str(tmp_path / "out.json"), str(tmp_path / "copy.json"), str(pair[0].folder)]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{tmp_path / 'copy.json'} is the same as {tmp_path / 'out.json'} and counts once.\n"
    assert shown.out.count("\nSASRec ") == 1 and shown.out.count("FAILED") == 1 and "Holm" not in shown.out


def test_settings_tell_runs_apart_and_protocols_tables(tmp_path):
    folders = make_runs(tmp_path / "saved")
    table = recbole_llm.table(folders, metric="hit@10")
    assert "LLMSTAR beta=0 " in table and "LLMSTAR beta=0.5" in table and "hit@10 vs SASRec" in table
    make_run(tmp_path / "saved" / "full", "SASRec", protocol="full", test_set="all")
    tables = recbole_llm.table([tmp_path / "saved"]).split("ml-100k · protocol ")
    assert sorted(part.split(" ")[0] for part in tables[1:]) == ["full", "retrieval"]


def test_the_published_figures_are_read(capsys):
    for name in ("retrieval", "full-ranking", "generation", "quickstart", "representations"):
        assert cli.main(["table", str(ROOT / "results" / f"{name}.json")]) == 0
        out = capsys.readouterr().out
        for table in json.loads((ROOT / "results" / f"{name}.json").read_text())["tables"]:
            for row in table["rows"]:
                shown = f"{next(iter(row['metrics'].values())):.4f}".removeprefix("0")
                assert row["model"][:60] in out and shown in out
    assert cli.main(["table", str(ROOT / "results" / "speed.json")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_the_forms_on_the_command_line(pair, capsys):
    folders = [str(run.folder) for run in pair]
    assert cli.main(["table", *folders, "--format=csv", "--against=LLMSTAR", "--metric=HIT@10"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == ["LLMSTAR", "SASRec"] and rows[1]["compared metric"] == "hit@10"
    hits = [float(np.mean(run.ranks()["ranks"] <= 10)) for run in pair]
    assert float(rows[1]["difference"]) == pytest.approx(hits[0] - hits[1])
    for form, sign in (("md", "|:-"), ("latex", "\\toprule")):
        assert cli.main(["table", *folders, f"--format={form}"]) == 0
        assert sign in capsys.readouterr().out
    for wrong in ("--format=pdf", "--metric=ndcg@99", "--against=Nobody", "--fromat=md"):
        assert cli.main(["table", *folders, wrong]) == 2
        assert capsys.readouterr().err.startswith("Error: ")


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds neither a run nor an analysis"):
        recbole_llm.table([tmp_path])
    with pytest.raises(UserError, match="runs: there is none"):
        recbole_llm.table([])
    with pytest.raises(UserError, match="runs: there is none"):
        recbole_llm.table([write_analyses(tmp_path / "analyses")])
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="neither a run nor"):
        recbole_llm.table([tmp_path / "x.json"])


def test_the_analyses_of_single_models_are_found(tmp_path):
    folder = tmp_path / "analyses"
    content = {"analysis": "order", "model": "SASRec", "dataset": "ml-100k", "identity": []}
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "result.json").write_text(json.dumps({**content, "seed": name}))
    assert [analysis.results[0]["seed"] for analysis in read_inputs([folder]).analyses] == ["a", "b"]
    (folder / "order-ml-100k.json").write_text(json.dumps({"analysis": "order", "command": ["x", "a b"], "results": [content]}))
    (analysis,) = read_inputs([folder]).analyses
    assert analysis.command == "x 'a b'" and len(analysis.results) == 1


def test_the_package_names_its_functions():
    from recbole_llm import quick_start

    assert recbole_llm.compare is quick_start.compare and {"compare", "table"} <= set(dir(recbole_llm))
    with pytest.raises(AttributeError, match="no attribute 'tabel'"):
        recbole_llm.tabel  # noqa: B018
