"""The example model as a user's own package: installed outside the checkout, in one table with ours and RecBole's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The example package, installed by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(EXAMPLES, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "site"


def recbole_llm(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recbole_llm", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_stands_in_one_table_with_ours_and_recboles(site, tmp_path, chain_data):
    done = recbole_llm(
        site, tmp_path, "run", "--model=SASRec,LLMSTAR,MyModel,MyModel:plain", "--dataset=chain", f"--data_path={chain_data}",
        "--MyModel:plain.correct_popularity=False", "--backbone=tiny", "--epochs=1", "--SASRec.epochs=1",
        "--learning_rate=0.01", "--head_hidden_size=16", "--representation_size=8", "--eval_args={mode: uni9}",
        "--topk=[5]", "--valid_metric=Hit@5", "--results_file=results.json", "--use_gpu=False", "--show_progress=False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["label"] for row in rows] == ["SASRec", "LLMSTAR", "MyModel", "MyModel:plain"]
    assert rows[2]["metrics"]["test"] != rows[3]["metrics"]["test"]
    assert "MyModel:plain" in done.stdout


@pytest.mark.slow
def test_its_keys_are_known_and_checked(site, tmp_path, chain_data):
    shown = recbole_llm(site, tmp_path, "run", "--help", "--model=MyModel")
    assert "correct_popularity" in shown.stdout and "temperature of the scores" in shown.stdout
    wrong = ("run", "--model=MyModel", "--dataset=chain", f"--data_path={chain_data}", "--temperature=0")
    done = recbole_llm(site, tmp_path, *wrong)
    assert done.returncode == 2 and "temperature must be a number > 0" in done.stderr and "Traceback" not in done.stderr


def test_it_is_unknown_where_it_is_not_installed(tmp_path, chain_data):
    done = recbole_llm(tmp_path, tmp_path, "run", "--model=MyModel", "--dataset=chain", f"--data_path={chain_data}")
    assert done.returncode == 2 and "There is no model named 'MyModel'" in done.stderr
