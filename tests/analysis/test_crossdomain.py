"""Trained on one dataset, tested on another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_llm.analysis.crossdomain import CrossSettings, analyze, format_results, measure, transplant
from recbole_llm.analysis.job import Job, read_columns
from recbole_llm.data.prepare import generate_chain
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError


@pytest.fixture(scope="module")
def other_data(chain_data):
    """Another dataset beside the chain, with more items."""
    generate_chain(chain_data, "other", users=30, items=50, seed=7, noise=0.1)
    return chain_data


def test_what_was_learned_is_moved_and_stays_what_it_is(make_model, other_data):
    source = make_model("LLMSRec")[1]
    config, target, _ = make_model("LLMSRec", "other")
    learned = {name: torch.full_like(parameter, 0.01) for name, parameter in source.trained_parameters().items()}
    transplant(learned, target)
    assert all((parameter == 0.01).all() for parameter in target.trained_parameters().values())
    assert not any(name.startswith("teacher.") for name in learned), "the other dataset's teacher stays"
    with pytest.raises(UserError, match="user_out differs"):
        transplant({**learned, "user_out": torch.zeros(5, 5)}, target)
    del learned["user_out"]
    with pytest.raises(UserError, match="user_out differs"):
        transplant(learned, target)


def test_conditions_differ_in_what_stands_for_an_item(make_model, other_data):
    config, model, splits = make_model("LLMSRec", "other")
    torch.manual_seed(5)
    learned = {name: parameter + 0.1 * torch.randn_like(parameter) for name, parameter in model.trained_parameters().items()}
    found, columns = measure("LLMSRec", learned, config, SharedData(), CrossSettings(train="chain", bootstrap=100))
    assert [condition["vectors"] for condition in found["conditions"]] == ["without", "own"] and found["users"] == 30
    conditions = np.array(columns["condition"])
    ndcg = {name: np.array(columns["ndcg@5"])[conditions == name] for name in ("untrained", "without", "own")}
    assert found["untrained"]["ndcg@5"] == pytest.approx(ndcg["untrained"].mean())
    for condition in found["conditions"]:
        compared = condition["metrics"]["ndcg@5"]
        assert compared["perturbed"] == pytest.approx(ndcg[condition["vectors"]].mean())
        assert compared["original"] == pytest.approx(ndcg["untrained"].mean())
    # With no vectors in the prompts, the projection of vectors has no say; with them, it has.
    moved = {name: value + 1 if name.startswith("item_projection") else value for name, value in learned.items()}
    again, others = measure("LLMSRec", moved, config, SharedData(), CrossSettings(train="chain", bootstrap=100))
    other = {name: np.array(others["ndcg@5"])[conditions == name] for name in ndcg}
    assert (other["without"] == ndcg["without"]).all() and (other["own"] != ndcg["own"]).any()


@pytest.mark.slow
def test_the_whole_way_and_once_more(tiny_settings, other_data, tmp_path):
    job = Job("other", ["LLMSRec"], settings={**tiny_settings, "epochs": 1}, output=str(tmp_path / "analyses"))
    settings = CrossSettings(train="chain", vectors=("without",), bootstrap=100)
    [result] = analyze(job, settings)
    assert (result["train"], result["dataset"], result["read"]) == ("chain", "other", False)
    columns = read_columns(f"{result['folder']}/per_user.tsv")
    trained = columns["hit@5"][columns["condition"] == "without"]
    assert result["conditions"][0]["metrics"]["hit@5"]["perturbed"] == pytest.approx(trained.mean(), abs=1e-6)
    assert analyze(job, settings)[0]["read"]
    assert "trained on chain, tested on other" in format_results([result])


def test_mistakes_are_named(tiny_settings):
    with pytest.raises(UserError, match="--train=A --dataset=B"):
        CrossSettings()
    with pytest.raises(UserError, match="vectors: zero is none of without, own"):
        CrossSettings(train="chain", vectors=("zero",))
    with pytest.raises(UserError, match="SASRec knows items by their ids alone"):
        analyze(Job("chain", ["SASRec"], settings=tiny_settings), CrossSettings(train="other"))
    with pytest.raises(UserError, match="name another"):
        analyze(Job("chain", ["LLMSRec"], settings=tiny_settings), CrossSettings(train="chain"))
