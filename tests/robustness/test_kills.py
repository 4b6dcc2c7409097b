"""A comparison that is killed again and again ends with the table of one that was not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest

from recbole_llm.results.files import read_rows
from recbole_llm.results.run import read_run
from recbole_llm.results.table import format_table

KILLS = 10


@pytest.mark.slow
def test_ten_kills(chain_data, tmp_path):
    """In a process of its own: the threads of libraries that other tests have used here do not survive a fork."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import forks, test_kills as kills; forks.import_library(); "
        "kills.ten_kills(*sys.argv[2:])"
    )
    arguments = [str(Path(__file__).parent), str(chain_data), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{KILLS} kills" in done.stdout


def ten_kills(chain_data: str, folder: str) -> None:
    """A stock model and an LLM recommender that learns from it; each process is killed at a random
    moment after it has brought the comparison further."""
    tmp_path = Path(folder)
    settings = {
        "model": "SASRec,LLMSRec", "dataset": "chain", "data_path": chain_data, "backbone": "tiny",
        "backbone_dtype": "float32", "head_hidden_size": 16, "representation_size": 8, "item_projection_hidden_size": 16,
        "epochs": 4, "eval_step": 0.3, "SASRec.epochs": 2, "SASRec.hidden_size": 8, "SASRec.inner_size": 16,
        "SASRec.n_layers": 1, "topk": "[1,5]", "valid_metric": "Hit@5", "eval_args": "{mode: uni9}", "valid_users": 20,
        "train_batch_size": 10, "use_gpu": False, "show_progress": False, "protocol": "retrieval", "resume": True,
        "results_file": "results.json",
    }  # fmt: skip
    words = ["run", *(f"--{key}={value}" for key, value in settings.items())]
    whole = forks.run(words, tmp_path / "whole", tmp_path / "logs")
    assert whole.code == 0, whole.errors
    choice, saved, finished = random.Random(7), tmp_path / "killed" / "saved", []
    for kills in range(KILLS):
        started = time.time()
        child = forks.start(words, tmp_path / "killed", tmp_path / "logs")
        while not _written_since(saved, started):
            ended, _ = os.waitpid(child, os.WNOHANG)
            assert not ended, f"it was done after {kills} kills"
            time.sleep(0.01)
        time.sleep(choice.uniform(0, 0.03 * whole.seconds))
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"it was done after {kills} kills"
        forks.kill(child)
        finished.append(len(list(saved.glob("*/run.json"))))
    last = forks.run(words, tmp_path / "killed", tmp_path / "logs")
    assert last.code == 0, last.errors
    folders = [tmp_path / name for name in ("whole", "killed")]
    reports = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert len(reports[0]) == 2
    for one, other in zip(*reports, strict=True):
        names = ("label", "seed", "metrics", "test_set", "users", "folder")
        assert [one[name] for name in names] == [other[name] for name in names]
        runs = [read_run(folder / one["folder"]) for folder in folders]
        assert runs[0].ranks()["ranks"].tolist() == runs[1].ranks()["ranks"].tolist()
    tables = [format_table(_without_times(read_rows([folder / "results.json"]))) for folder in folders]
    assert tables[0] == tables[1] and "LLMSRec" in tables[0]
    print(f"{KILLS} kills in {whole.seconds:.0f} s of work; finished runs after each: {finished}")
    assert not [path for path in Path(tmp_path, "killed", "saved").rglob("*") if path.suffix in (".tmp", ".part", ".pth")]


@pytest.mark.slow
def test_two_at_the_same_time(chain_data, tmp_path):
    """The second of two equal commands waits for the first, and takes what it trained."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import forks, test_kills as kills; forks.import_library(); "
        "kills.two_at_the_same_time(*sys.argv[2:])"
    )
    arguments = [str(Path(__file__).parent), str(chain_data), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def two_at_the_same_time(chain_data: str, folder: str) -> None:
    settings = {
        "model": "SASRec", "dataset": "chain", "data_path": chain_data, "protocol": "retrieval", "epochs": 4, "hidden_size": 8,
        "inner_size": 16, "n_layers": 1, "eval_args": "{mode: uni9}", "topk": "[5]", "valid_metric": "Hit@5",
        "use_gpu": False, "show_progress": False,
    }  # fmt: skip
    words = ["run", *(f"--{key}={value}" for key, value in settings.items())]
    results = []
    for place, names in (("alone", ["a"]), ("together", ["b", "c"])):
        here = Path(folder, place)
        children = [forks.start([*words, f"--results_file={name}.json"], here, Path(folder, name)) for name in names]
        ended = [forks.wait(child, Path(folder, name), 200) for child, name in zip(children, names, strict=True)]
        assert [one.code for one in ended] == [0] * len(names), ended
        results += [json.loads((here / f"{name}.json").read_text())[0]["metrics"] for name in names]
        assert sum("training it now" in one.errors for one in ended) == 1, "one trains, the other takes its model"
    assert results[0] == results[1] == results[2]


def test_a_limit_of_file_size_does_not_hold_for_the_logs(tmp_path):
    ended = forks.run(["--help"], tmp_path / "here", tmp_path / "logs", file_size=10)
    assert ended.code == 0 and "recbole-llm run" in ended.output and ended.errors == ""


def _written_since(folder: Path, moment: float) -> bool:
    """Whether a run's folder has a file that is new."""
    return any(path.lstat().st_mtime > moment for path in folder.glob("[!.]*/**/*") if path.exists())


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "train_seconds": None, "eval_seconds": None} for row in rows]
