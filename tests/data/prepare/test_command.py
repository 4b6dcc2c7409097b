"""``recbole-llm prepare`` as a user meets it: sentences, and folders that are whole or not there."""

import os
import signal
import subprocess
import sys

import pytest
from raw_files import json_lines, lines

from recbole_llm.cli import main
from recbole_llm.config.settings import datasets_in

pl = pytest.importorskip("polars")


def music(raw, users=3):
    row = {"overall": 5.0, "unixReviewTime": 1}
    json_lines(raw / "Music_5.json", *(row | {"reviewerID": f"u{user}", "asin": "A"} for user in range(users)))
    json_lines(raw / "meta_Music.json", {"asin": "A", "title": "a" * 3000})
    return [f"--raw-dir={raw}"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["ml-1m"], "no source offers 'ml-1m'; did you mean movielens-1m?"),
        (["amazon-cd"], "did you mean amazon-cds?"),
        (["amazon-2023"], "a source with several datasets: write amazon-2023:<Category>"),
        (["amazon-2023:../x"], "name a category as published"),
        (["movielens:3m"], "movielens:3m is unknown: choose one of 100k"),
        (["yelp:photo"], "choose yelp:review or yelp:tip"),
        (["amazon-cds", "--rawdir=x"], "unknown key --rawdir; did you mean --raw-dir?"),
        (["amazon-cds", "--user=x"], "--user is for tables of your own"),
        (["amazon-cds", "--core=-1"], "--core is -1: give a whole number"),
        (["amazon-cds", "--name=a/b"], "'a/b' cannot be the name of a dataset"),
        (["a", "b"], "name one dataset"),
    ],
)
def test_mistakes(words, message, capsys):
    assert main(["prepare", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_help(capsys):
    assert main(["prepare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "amazon-cds " in printed and "movielens:32m" in printed and "--raw-dir" in printed
    assert main(["prepare", "amazon-cds", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "CDs_and_Vinyl.train.csv.gz" in printed and "raw/meta_categories/meta_CDs_and_Vinyl.jsonl.gz" in printed


def test_run_says_what_makes_the_data(capsys):
    assert main(["run", "--model=SASRec", "--dataset=amazon-cds"]) == 2
    assert "not in 'dataset/amazon-cds' yet: run `recbole-llm prepare amazon-cds`, which makes it." in capsys.readouterr().err
    assert main(["run", "--model=LLMSTAR", "--dataset=steam", "--data_path=elsewhere"]) == 2
    assert "run `recbole-llm prepare steam --data-path=elsewhere`" in capsys.readouterr().err


def test_items_of_your_own(tmp_path):
    words = music(tmp_path / "raw")
    (tmp_path / "raw" / "meta_Music.json").unlink()
    lines(tmp_path / "own.csv", ",title,asin", "0,Mine,A")
    assert main(["prepare", "amazon-2018:Music", *words, "--items=own.csv", "--name=mine"]) == 0
    assert (tmp_path / "dataset/mine/mine.item").read_text() == "item_id:token\ttitle:token_seq\nA\tMine\n"
    readme = (tmp_path / "dataset/mine/README.md").read_text()
    assert "| own.csv |" in readme and "| Music_5.json |" in readme


@pytest.mark.parametrize("before", [False, True])
def test_a_killed_preparation_leaves_nothing_half_written(tmp_path, before):
    words = ["prepare", "amazon-2018:Music", *music(tmp_path / "raw"), "--overwrite=True"]
    folder = tmp_path / "dataset" / "amazon-2018-music"
    if before:
        assert main(words) == 0
    files = {path.name: path.read_bytes() for path in folder.iterdir()} if before else None
    code = (
        "import os, signal, sys; from recbole_llm.data.prepare import write; from recbole_llm.cli import main\n"
        "write._write_text = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *words], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert folder.exists() == before and datasets_in("dataset") == (["amazon-2018-music"] if before else [])
    if before:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert main(words) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["amazon-2018-music"]


@pytest.mark.skipif(os.name == "nt", reason="file size limits are Unix's")
def test_a_full_disk_leaves_nothing(tmp_path):
    words = ["prepare", "amazon-2018:Music", *music(tmp_path / "raw", users=2000)]
    code = (
        "import resource, sys; from recbole_llm.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    full = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "no room left in dataset (File too large)" in full.stderr
    assert not list((tmp_path / "dataset").iterdir())


def test_every_preset_has_settings_in_the_library():
    from recbole_llm.config.schema import load_yaml
    from recbole_llm.data.prepare.catalog import all_presets, all_sources
    from recbole_llm.registry import properties_folder

    for name, preset in all_presets().items():
        settings = load_yaml(properties_folder() / "dataset" / f"{name}.yaml")
        assert settings["prepare_command"] == f"recbole-llm prepare {name}"
        assert all_sources()[preset.source].wording.series in settings["prompt_sentence"]
