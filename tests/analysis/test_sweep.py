"""A key over several values and seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recbole_llm.analysis import sweep
from recbole_llm.analysis.sweep import SweepSettings, analyze, format_results, summarize
from recbole_llm.errors import UserError


@pytest.mark.parametrize(
    ("over", "key", "values"),
    [
        ("beta:0,0.3,1e-4", "beta", [0, 0.3, 1e-4]),
        ("confidence:cosine,none,None", "confidence", ["cosine", "none", None]),
        ("LLMSTAR:a.beta:0,1", "LLMSTAR:a.beta", [0, 1]),
        ("topk:[5],[10, 20]", "topk", [[5], [10, 20]]),
    ],
)
def test_a_key_and_its_values(over, key, values):
    settings = SweepSettings(over=over)
    assert (settings.key, settings.values) == (key, values)


@pytest.mark.parametrize("over", ["", "beta", "beta:", ":1,2", "beta:1,1", "beta:[1", 3])
def test_what_is_no_key_with_values(over):
    with pytest.raises(UserError, match="write --over=beta:0,0.3,0.7"):
        SweepSettings(over=over)


def test_seeds_of_a_value_are_taken_together():
    def result(value, seed, metric):
        return {"model": "A", "dataset": "d", "key": "k", "value": value, "seed": seed, "metrics": {"hit@1": metric}}

    results = [result(0, 1, 0.2), result(0, 2, 0.4), result(1, 1, 0.5), {**result(1, 2, 0), "error": "broke"}]
    low, high = summarize(results)
    assert low["metrics"]["hit@1"] == pytest.approx({"mean": 0.3, "low": 0.2, "high": 0.4, "deviation": 0.02**0.5})
    assert high["seeds"] == 1 and high["metrics"]["hit@1"]["deviation"] is None
    table = format_results(results)
    assert ".3000 ± .1414" in table and "k = 1, seed 2 FAILED: broke" in table


def test_a_sweep_goes_on_where_it_stopped(make_job, in_folder, monkeypatch):
    job = replace(make_job("ordered", hidden_size=8, epochs=1), seeds=[1])
    once, kept = sweep.run_model, {}

    def weights(row):
        return next(Path(job.output).parent.glob(f"saved/{Path(row['checkpoint']).name}/*.safetensors"))

    def stops(config, *arguments):
        if kept:
            raise KeyboardInterrupt
        row = once(config, *arguments)[0]
        kept[config["n_layers"], config["seed"]] = weights(row).stat().st_mtime_ns
        return [row]

    monkeypatch.setattr(sweep, "run_model", stops)
    with pytest.raises(KeyboardInterrupt):
        in_folder(analyze, job, SweepSettings(over="n_layers:1,2"))
    monkeypatch.setattr(sweep, "run_model", once)
    results = in_folder(analyze, job, SweepSettings(over="n_layers:1,2"))
    times = {(result["value"], result["seed"]): weights(result).stat().st_mtime_ns for result in results}
    assert list(times) == [(1, 1), (2, 1)]
    assert {run: times[run] for run in kept} == kept, "what was trained is read"
    assert len({result["metrics"]["ndcg@10"] for result in results}) > 1


def test_a_run_that_fails_leaves_the_others(make_job, in_folder, monkeypatch):
    job = make_job("ordered", hidden_size=8, epochs=1)

    def fails(config, *arguments):
        if config["n_layers"] == 2:
            raise RuntimeError("out of memory\nat 0x1")
        return [{"metrics": {"ndcg@10": 0.5}, "valid_metric": "ndcg@10", "checkpoint": "x"}]

    monkeypatch.setattr(sweep, "run_model", fails)
    first, second = in_folder(analyze, job, SweepSettings(over="n_layers:1,2"))
    assert first["metrics"] == {"ndcg@10": 0.5} and second["error"] == "RuntimeError: out of memory"
    with pytest.raises(UserError, match="no run of the sweep succeeded; SASRec: RuntimeError"):
        in_folder(analyze, job, SweepSettings(over="n_layers:2"))
    with pytest.raises(UserError, match="unknown key 'depth'"):
        in_folder(analyze, job, SweepSettings(over="depth:1,2"))
