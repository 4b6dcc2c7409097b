"""The folder of a run: written and read back, and nothing odd taken for one."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import polars as pl
import pytest

from recbole_llm.errors import UserError
from recbole_llm.results import run as runs
from recbole_llm.results.run import read_run, write_curve, write_run

RECORD = {
    "model": "LLMSTAR",
    "dataset": "ml-100k",
    "protocol": "retrieval",
    "seed": 7,
    "settings": {"learning_rate": 1e-4, "topk": [10]},
    "changed": {"learning_rate": 1e-4},
    "command": "recbole-llm run --model=LLMSTAR --dataset=ml-100k",
    "versions": {"recbole_llm": "0.1", "numpy": "1.26"},
    "git": None,
    "data": {"fingerprint": "3fa9", "users": 4, "items": 9, "interactions": 30},
    "backbone": {"backbone": "tiny"},
    "teacher": {"model": "SASRec", "folder": "saved/SASRec-x"},
    "machine": {"platform": "Linux", "cpu": "a CPU", "cores": 2, "memory_bytes": 8 << 30, "gpu": None},
    "started": "2026-01-02T03:04:05+00:00",
    "finished": "2026-01-02T04:04:05+00:00",
    "seconds": {"train": 90.0, "evaluate": 12.0},
    "peak_memory_bytes": {"cpu": 1 << 30, "gpu": None},
    "trained_parameters": 1234,
    "users": 3,
    "test_set": "ab12",
    "valid_metric": "NDCG@10",
    "metrics": {"valid": {"ndcg@10": 0.5}, "test": {"ndcg@10": 0.25, "validratio": math.nan}},
    "tests": {},
}
CURVE = [
    {"step": 10, "epoch": 0.5, "seconds": 40.0, "losses": {"recommendation": 2.5}, "valid": None},
    {"step": 20, "epoch": 1.0, "seconds": 90.0, "losses": {"recommendation": 1.5}, "valid": {"ndcg@10": 0.5}},
]


def written(folder, **changes):
    return write_run(folder, {**RECORD, **changes}, CURVE, ["u1", "Ü", "3"], ranks=[1, 4, 2])


def test_what_is_written_is_read(tmp_path):
    written(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert sorted(os.listdir(run.folder)) == ["curve.json", "ranks.parquet", "run.json"]
    assert run == read_run(tmp_path / "run" / "run.json")
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["format"], record["version"]) == ("recbole-llm run", 2)
    assert record["metrics"]["test"]["validratio"] is None and math.isnan(run.test["validratio"])
    assert run.curve == CURVE and run.valid == {"ndcg@10": 0.5} and run.seconds == 102.0
    assert run.finished.isoformat() == RECORD["finished"] and run.name == "run"
    table = pl.read_parquet(run.folder / "ranks.parquet")
    assert table.schema == {"user": pl.String, "rank": pl.Int32}
    assert table.rows() == [("u1", 1), ("Ü", 4), ("3", 2)]
    row = run.row("LLMSTAR:plain")
    assert row["model"] == "LLMSTAR:plain" and run.row()["model"] == "LLMSTAR"
    assert (row["ranks"].tolist(), row["user_ids"].tolist()) == ([1, 4, 2], ["u1", "Ü", "3"])
    assert (row["train_seconds"], row["eval_seconds"], row["users"], row["role"]) == (90.0, 12.0, 3, "model")


def test_judged_labels(tmp_path):
    write_run(tmp_path, RECORD, [], ["a", "b"], labels=np.array([1, 0]), values=np.array([0.25, -1.5]))
    assert read_run(tmp_path).ranks()["values"].tolist() == [0.25, -1.5]
    assert read_run(tmp_path).ranks()["labels"].tolist() == [1, 0] and "ranks" not in read_run(tmp_path).row()
    assert pl.read_parquet(tmp_path / "ranks.parquet").columns == ["user", "label", "value"]


def test_every_field_is_documented(request):
    page = (request.config.rootpath / "docs" / "runs.md").read_text()
    record = page.partition("## The record")[2].partition("\n## ")[0]
    named = {word.strip("`") for line in record.splitlines() for word in line.split(" | ")[0].strip("| ").split(", ")}
    assert named >= set(runs.FIELDS)


def test_a_killed_writer_leaves_no_record_with_other_ranks(tmp_path, monkeypatch):
    written(tmp_path)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "write_curve", killed)  # the ranks are new, the record is not there yet
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path, RECORD, CURVE, ["other"], ranks=[9])
    assert not runs.exists(tmp_path)
    with pytest.raises(UserError, match="does not exist: give the folder of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("format", "other", "is no record of a run"),
        ("version", 3, "newer version"),
        ("version", None, "is no record of a run"),
        ("seed", "7", "its seed is missing"),
        ("seed", True, "its seed is missing"),
        ("model", "\x1b[2J", "its model is missing"),
        ("metrics", {"test": {"ndcg@10": "high"}}, "its metrics is missing"),
        ("metrics", {"test": {"\x1b[2J": 1.0}}, "its metrics is missing"),
        ("seconds", {"train": "long"}, "its seconds is missing"),
        ("finished", "yesterday", "its finished is missing"),
        ("settings", [], "its settings is missing"),
    ],
)
def test_an_odd_record_is_refused(tmp_path, field, value, sentence):
    written(tmp_path)
    file = tmp_path / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, field: value}))
    with pytest.raises(UserError, match=sentence):
        read_run(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": '])
def test_an_odd_file_is_refused(tmp_path, content):
    written(tmp_path)
    for name in ("run.json", "curve.json"):
        old = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content if (name, content) != ("curve.json", b"[]") else b"[1]")
        with pytest.raises(UserError, match=name):
            read_run(tmp_path)
        (tmp_path / name).write_bytes(old)
    (tmp_path / "ranks.parquet").write_bytes(content)
    with pytest.raises(UserError, match="ranks.parquet is missing or damaged"):
        read_run(tmp_path).ranks()


@pytest.mark.parametrize("columns", [{"user": [1], "rank": [1]}, {"user": ["a"], "other": [1]}, {"user": ["a"], "rank": ["1"]}])
def test_another_table_is_refused(tmp_path, columns):
    run = written(tmp_path)
    pl.DataFrame(columns).write_parquet(tmp_path / "ranks.parquet")
    with pytest.raises(UserError, match="is no table of user and rank"):
        run.ranks()


def test_a_record_that_lacks_a_field_is_not_written(tmp_path):
    for record in ({key: value for key, value in RECORD.items() if key != "teacher"}, {**RECORD, "colour": "red"}):
        with pytest.raises(ValueError, match="'(teacher|colour)'"):
            write_run(tmp_path, record, CURVE, ["a"], ranks=[1])
    assert os.listdir(tmp_path) == []


def test_a_curve_alone_is_no_run(tmp_path):
    write_curve(tmp_path / "new", CURVE)
    assert runs.read_curve(tmp_path / "new") == CURVE and not runs.exists(tmp_path / "new")
    assert runs.read_curve(tmp_path) == []
