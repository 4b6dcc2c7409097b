"""Several processes are started by RecBole's keys, by torchrun or by accelerate."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_failures import LONG, STATE
from test_processes import job

import recbole_llm
from recbole_llm.errors import UserError
from recbole_llm.processes import environment, launch
from recbole_llm.quick_start import compare

SCRIPT = Path(recbole_llm.__file__).parents[1] / "run_recbole_llm.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({}, False), ({"nproc": 1}, False), ({"nproc": 2}, True), ({"world_size": 2}, True), ({"nproc": 1, "port": 7}, False)],
)
def test_when_processes_are_started(settings, asked, monkeypatch):
    assert launch.is_asked(settings) is asked
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.is_asked(settings)
    assert (environment.size(), environment.rank()) == (2, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nproc": 0}, "nproc: 0 is no whole number from 1"),
        ({"nproc": "two"}, "nproc: 'two' is no whole number"),
        ({"nproc": 2, "world_size": 3}, "world_size 3, nproc 2 and group_offset 0 do not fit together"),
        ({"nproc": 2, "world_size": 4, "group_offset": 4}, "do not fit together"),
        ({"nproc": 2, "world_size": 4}, "give its ip and a free port"),
    ],
)
def test_numbers_that_make_no_sense(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        launch.is_asked(settings)
        launch.launch(["run"], settings)


def test_the_words_of_the_processes():
    words = ["run", "--nproc=2", "--model", "SASRec", "--port", "29500", "--epochs=1", "--ip=here", "-d", "ml-100k"]
    assert launch._without_keys(words) == ["run", "--model", "SASRec", "--epochs=1", "-d", "ml-100k"]


def test_python_starts_no_processes():
    with pytest.raises(UserError, match="nproc: several processes are started by run_recbole_llm.py or torchrun"):
        compare(["LLMSTAR"], "ml-100k", settings={"nproc": 2})


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    from recbole_llm import cli

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["clean"]) == 2
    assert "clean is for one process, and 2 were launched together" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["clean"]) == 2
    assert capsys.readouterr().err == ""


def test_a_model_alone_is_not_run_by_several(make_model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched together, and this way of running a model is for one"):
        make_model("TALLRec", item_projection_hidden_size=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        [SCRIPT, "--nproc=2"],
        [*TORCHRUN, SCRIPT],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=29534", SCRIPT],
    ],
    ids=["nproc", "torchrun", "accelerate"],
)
def test_every_way_to_start(start, chain_data, tmp_path):
    words = job("TALLRec", chain_data, tmp_path).words[1:]
    done = subprocess.run([sys.executable, *map(str, start), *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chain · 60 users") == 1  # one table
    (run,) = tmp_path.glob("saved/*/run.json")
    assert '"processes": 2' in run.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("start", "killed"), [([SCRIPT, "--nproc=2"], 0), ([*TORCHRUN, SCRIPT], 1)], ids=["nproc", "torchrun"])
def test_a_kill_is_told_whoever_started_the_processes(start, killed, chain_data, tmp_path):
    words = job("TALLRec", chain_data, tmp_path, **LONG).words[1:]
    begun = subprocess.Popen(
        [sys.executable, *map(str, start), *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(STATE)):
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.02)
    (victim,) = [
        child for child in psutil.Process(begun.pid).children(recursive=True) if child.environ().get("RANK") == str(killed)
    ]
    victim.kill()
    since = time.monotonic()
    _, errors = begun.communicate(timeout=60)
    print(f"{killed} killed: {time.monotonic() - since:.1f} s, code {begun.returncode}")
    assert begun.returncode == 1
    sentence = rf"Error: process {killed} \(pid {victim.pid} on .*\) ended without a word: .*--resume=True"
    assert len(re.findall(sentence, errors)) == 1, errors
    assert not psutil.pid_exists(victim.pid)
    done = subprocess.run([sys.executable, SCRIPT, *words, "--resume=True"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming the training" in done.stderr, done.stderr
