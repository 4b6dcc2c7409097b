"""Several processes give what one gives: losses, weights, metrics and the users' ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import crew
import polars as pl
import pytest
from safetensors.torch import load_file

# SGD: Adam divides by a gradient's size, and makes a step of what is zero but for rounding.
SETTINGS = {
    "dataset": "chain", "backbone": "tiny", "backbone_dtype": "float32", "topk": "[1,5]", "valid_metric": "Hit@5",
    "eval_args": "{mode: uni9}", "epochs": 1, "eval_step": 1, "valid_users": 10, "train_batch_size": 24, "learner": "sgd",
    "learning_rate": 0.01, "history_length": 4, "use_gpu": False, "show_progress": False, "results_file": "results.json",
    "per_user_file": "users.tsv",
}  # fmt: skip
FILES = "curve.json", "run.json"
HEADS = {"head_hidden_size": 16, "representation_size": 8}
TEACHER = {
    "item_projection_hidden_size": 16,
    "teacher_settings": "{epochs: 1, hidden_size: 8, inner_size: 16, n_layers: 1, train_batch_size: 256}",
}
MODELS = {
    "LLMSTAR": {**HEADS, **TEACHER},
    "TALLRec": {**HEADS, "lora_dropout": 0, "accumulation_steps": 2},
    "ST2SI": {"tuning": "full", "eval_args": "{mode: full}", "valid_metric": "NDCG@5"},
    "LLMSRec": {**HEADS, **TEACHER, "train_targets": "window", "negatives": "in_batch", "micro_batch_tokens": 300},
    "LLaRA": {**TEACHER, "lora_dropout": 0, "recommend_by": "generation", "decode": "greedy", "train_candidates": 4},
    "CoLLM": {**HEADS, **TEACHER, "lora_dropout": 0, "clip_grad_norm": "{max_norm: 0.1}"},
    "RSLLM": {**TEACHER, "lora_dropout": 0, "recommend_by": "generation", "decode": "likelihood", "train_candidates": 4},
}


def job(model: str, data: Path, folder: Path, processes: int = 1, **more: Any) -> crew.Job:
    """The run of a model."""
    of_job = {name: more.pop(name) for name in ("disturbed", "by", "once", "words_of") if name in more}
    settings = {"model": model, "data_path": data, **SETTINGS, **MODELS.get(model, {}), **more}
    return crew.Job(["run", *(f"--{key}={value}" for key, value in settings.items())], str(folder), processes, **of_job)


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """What two folders of runs hold is the same but for rounding."""
    runs = sorted(path.parent.name for path in one.glob("saved/*/run.json"))
    assert runs and runs == sorted(path.parent.name for path in other.glob("saved/*/run.json"))
    assert (one / "users.tsv").read_text() == (other / "users.tsv").read_text()
    for run in runs:
        folders = [folder / "saved" / run for folder in (one, other)]
        curves, records = ([json.loads((folder / name).read_text()) for folder in folders] for name in FILES)
        for point, same in zip(*curves, strict=True):
            assert point["losses"] == pytest.approx(same["losses"], rel=tolerance, abs=tolerance)
            assert point["valid"] == same["valid"]
        assert records[0]["metrics"] == records[1]["metrics"] and records[0]["test_set"] == records[1]["test_set"]
        ranks, others = (pl.read_parquet(folder / "ranks.parquet") for folder in folders)
        assert ranks.equals(others)
        weights, same = (load_file(folder / "model.safetensors") for folder in folders)
        assert weights.keys() == same.keys()
        for key, value in weights.items():
            assert value.tolist() == pytest.approx(same[key].tolist(), abs=tolerance) if value.dim() < 2 else (
                (value - same[key]).abs().max() <= tolerance
            ), key
        assert sorted(path.name for path in folders[0].rglob("*")) == sorted(path.name for path in folders[1].rglob("*"))


Runs = dict[str, tuple[crew.Ended, Path]]


def run_all(jobs: dict[str, crew.Job], folder: Path, seconds: float) -> Runs:
    """How jobs end and their folders, by their names. One process imports the library for all of them."""
    ended = crew.run(list(jobs.values()), folder, seconds)
    return {name: (end, Path(jobs[name].folder)) for name, end in zip(jobs, ended, strict=True)}


@pytest.fixture(scope="module")
def fast(chain_data, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("fast")
    jobs = {name: job("LLMSTAR", chain_data, folder / name, processes) for name, processes in (("one", 1), ("two", 2))}
    jobs["mistake"] = job("TALLRec", chain_data, folder / "mistake", 2, valid_metric="Hit@7")
    return run_all(jobs, folder, 300)


@pytest.fixture(scope="module")
def slow(chain_data, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("slow")
    jobs = {
        f"{model}-{processes}": job(model, chain_data, folder / f"{model}-{processes}", processes)
        for model in MODELS
        for processes in ((1, 4) if model == "LLMSTAR" else (1, 2))
    }
    return run_all(jobs, folder, 3000)


def check(one: tuple[crew.Ended, Path], several: tuple[crew.Ended, Path], model: str) -> None:
    """One process and several: the same, and the main process alone speaks."""
    for ended, _ in (one, several):
        assert set(ended.codes) == {0}, ended.errors
    assert_same(one[1], several[1])
    assert model in several[0].outputs[0]
    assert set(several[0].outputs[1:]) == set(several[0].errors[1:]) == {""}
    assert len(list(several[1].glob("log_tensorboard/*/*"))) == len(list(one[1].glob("log_tensorboard/*/*")))


def test_two_processes_give_what_one_gives(fast):
    check(fast["one"], fast["two"], "LLMSTAR")


def test_a_mistake_of_all_is_told_once(fast):
    ended, _ = fast["mistake"]
    assert ended.codes == [2, 2]
    assert re.fullmatch(r"Error: valid_metric.*\n", ended.errors[0]) and ended.errors[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_form(model, slow):
    check(slow[f"{model}-1"], slow[f"{model}-{4 if model == 'LLMSTAR' else 2}"], model)
