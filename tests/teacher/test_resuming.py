"""A stock model whose training was stopped ends with the weights and the curve of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recbole.trainer import Trainer

from recbole_llm import checkpoint, cli
from recbole_llm.quick_start import compare
from recbole_llm.results.clean import find_orphans
from recbole_llm.results.run import read_curve
from recbole_llm.teacher import resuming

SIZES = {"hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 1}
CASES = {  # model: its settings, and after how many batches of its training it is stopped
    "SASRec": ({**SIZES, "train_batch_size": 64}, 20),
    "BERT4Rec": ({**SIZES, "train_batch_size": 128}, 14),
    "BPR": ({"embedding_size": 8, "train_batch_size": 128}, 14),
}


@pytest.fixture(autouse=True)
def a_state_at_each_epoch(monkeypatch):
    monkeypatch.setattr(resuming, "MOST_TIME", math.inf)


@pytest.fixture
def settings(tiny_settings):
    return {
        **{key: value for key, value in tiny_settings.items() if key in ("data_path", "eval_args", "topk", "valid_metric")},
        "checkpoint_dir": "saved", "show_progress": False, "use_gpu": False, "resume": True, "epochs": 6, "stopping_step": 2,
    }  # fmt: skip


def stop_after(monkeypatch, batches):
    """The training of stock models is interrupted at a batch."""
    left = [batches]

    def check(self, loss):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_check_nan", check)


def ended(folder):
    """All that a training left: weights, curve and validation, without times."""
    record = checkpoint.read_record(folder)
    curve = [{**point, "seconds": 0} for point in read_curve(folder)]
    return checkpoint.read_weights(folder), curve, record["valid_result"], record["settings"]


def assert_equal(one, other):
    assert one[1:] == other[1:] and one[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize("model", ["SASRec", *(pytest.param(name, marks=pytest.mark.slow) for name in ("BERT4Rec", "BPR"))])
def test_a_stopped_training_ends_as_one_that_was_not(model, settings, monkeypatch, tmp_path):
    own, batches = CASES[model]
    own = {**settings, **own}
    whole = ended(compare([model], "chain", settings={**own, "checkpoint_dir": "whole"})[0]["checkpoint"])
    assert len(whole[1]) > 2
    for place in (batches, 1):  # twice: what was gone on with is stopped again
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, place)
            compare([model], "chain", settings=own)
    (folder,) = Path("saved").glob(f"{model}-*")
    state = json.loads((folder / "resume" / "state.json").read_text())
    assert 1 < state["epoch"] < 6 and len(state["curve"]) == state["epoch"]
    assert not list(Path("saved").glob("*.pth")) and len(list((folder / "resume").iterdir())) == 2
    assert [orphan.kind for orphan in find_orphans("saved", unfinished=True) if orphan.kind != "lock"] == ["unfinished"]
    trained = []
    count = Trainer._check_nan
    monkeypatch.setattr(Trainer, "_check_nan", lambda self, loss: (trained.append(1), count(self, loss)))
    (row,) = compare([model], "chain", settings=own)
    assert_equal(ended(row["checkpoint"]), whole)
    assert len(trained) < sum(point["step"] for point in whole[1][-1:]), "it began in the middle"
    assert sorted(path.name for path in folder.iterdir()) == [
        "curve.json", "model.safetensors", "ranks.parquet", "recbole_llm.json", "run.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_both_stages_of_s3rec_go_on(settings, monkeypatch, chain_data):
    own = {
        **settings, **SIZES, "pretrain_epochs": 3, "epochs": 3, "train_batch_size": 200, "train_stage": "pretrain",
        "item_attribute": "class", "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
        "checkpoint_dir": "whole",
    }  # fmt: skip
    data = Path("data/chain")
    data.mkdir(parents=True)
    for kind in ("inter", "item"):
        lines = (chain_data / "chain" / f"chain.{kind}").read_text().splitlines()
        if kind == "item":
            lines = [f"{line}\t{'class:token_seq' if not place else f'c{place % 3}'}" for place, line in enumerate(lines)]
        (data / f"chain.{kind}").write_text("\n".join(lines) + "\n")
    own["data_path"] = "data"
    rows = compare(["S3Rec"], "chain", settings=own)
    whole = ended(rows[0]["checkpoint"])
    assert [point.get("stage") for point in whole[1]] == ["pretrain"] * 3 + [None] * 3
    before, after = whole[1][2]["step"] // 3, whole[1][-1]["step"] // 3  # batches of an epoch
    own["checkpoint_dir"] = "saved"
    phases = []
    for place in (2 * before + 1, 1, before + after + 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, place)
            compare(["S3Rec"], "chain", settings=own)
        state = next(Path("saved").glob("S3Rec-*")) / "resume" / "state.json"
        phases.append(json.loads(state.read_text())["phase"])
    assert phases[0] == "pretrain" and phases[-1] is None
    (row,) = compare(["S3Rec"], "chain", settings=own)
    assert_equal(ended(row["checkpoint"]), whole)


def test_a_teacher_goes_on_as_well(tiny_settings, monkeypatch):
    teacher = {**tiny_settings["teacher_settings"], "epochs": 4, "train_batch_size": 64}
    own = {**tiny_settings, "epochs": 1, "resume": True, "checkpoint_dir": "saved", "teacher_settings": teacher}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 22)
        compare(["LLMSRec"], "chain", settings=own)
    (state,) = Path("saved").glob("SASRec-*/resume/state.json")
    assert json.loads(state.read_text())["epoch"] > 0
    rows = compare(["LLMSRec"], "chain", settings=own)
    assert [row["model"] for row in rows] == ["LLMSRec", "SASRec"] and "error" not in rows[0]
    assert not list(Path("saved").glob("*/resume"))


@pytest.mark.parametrize("what", ["without the key", "fresh", "damaged", "of other settings"])
def test_a_state_that_is_not_used(what, settings, monkeypatch, caplog):
    own = {**settings, **CASES["SASRec"][0], "epochs": 3}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 10)
        compare(["SASRec"], "chain", settings=own)
    (resume,) = Path("saved").glob("SASRec-*/resume")
    if what == "damaged":
        next(resume.glob("*.safetensors")).write_bytes(b"half")
    elif what == "of other settings":
        state = json.loads((resume / "state.json").read_text())
        (resume / "state.json").write_text(json.dumps({**state, "identity": {}}))
    changes = {"without the key": {"resume": False}, "fresh": {"fresh": True}}.get(what, {})
    messages = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, message, *rest, **options: messages.append(str(message)))
    (row,) = compare(["SASRec"], "chain", settings={**own, **changes})
    assert [point["epoch"] for point in read_curve(row["checkpoint"])] == [1, 2, 3] and not resume.exists()
    told = [message for message in messages if "starts again" in message]
    assert len(told) == (what != "fresh")


def test_short_epochs_do_not_write_all_the_time(settings, monkeypatch):
    monkeypatch.setattr(resuming, "MOST_TIME", 0.0)
    written = []
    monkeypatch.setattr(resuming.ResumedTraining, "_write_state", lambda *arguments: written.append(arguments))
    compare(["SASRec"], "chain", settings={**settings, **CASES["SASRec"][0]})
    assert len(written) == 1


@pytest.mark.slow
def test_a_killed_process(settings, chain_data, tmp_path):
    given = {**settings, **CASES["SASRec"][0], "model": "SASRec", "dataset": "chain"}
    words = [f"--{key}={value}" for key, value in given.items() if key != "checkpoint_dir"]
    assert cli.main(["run", *words, "--checkpoint_dir=whole"]) == 0
    code = (
        "import math, os, sys; from recbole.trainer import Trainer; from recbole_llm import cli; "
        "from recbole_llm.teacher import resuming; resuming.MOST_TIME = math.inf; left = [20]\n"
        "def check(self, loss):\n    left[0] -= 1\n    left[0] < 0 and os.kill(os.getpid(), 9)\n"
        "Trainer._check_nan = check\ncli.main(['run', *sys.argv[1:]])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    assert list(Path("saved").glob("SASRec-*/resume/state.json"))
    assert cli.main(["run", *words]) == 0
    assert_equal(ended(next(Path("saved").glob("SASRec-*"))), ended(next(Path("whole").glob("SASRec-*"))))
