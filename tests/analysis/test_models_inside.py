"""Representations, attention, costs, curves and cases of trained models, and the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from recbole_llm import cli
from recbole_llm.analysis import curve, efficiency, trained
from recbole_llm.analysis.attention import (
    AttentionSettings,
    attention_weights,
    item_spans,
    look,
    shares,
    words,
)
from recbole_llm.analysis.cases import CaseSettings, rankings, show
from recbole_llm.analysis.order import ORIGINAL, OrderSettings
from recbole_llm.analysis.representations import compare_representations, mean_distance, represent
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData


@pytest.fixture
def llm(make_model):
    def make(name="LLMSRec", **settings):
        config, model, splits = make_model(name, **settings)
        model.eval()
        record = {"train_seconds": 60.0, "validations": [{"epoch": 2.0, "step": 4, "hit@5": 0.5}], "best_step": 4}
        return TrainedModel(name, config, splits, model, model.score, config["history_length"], None, record)

    return make


def test_mean_distance_is_that_of_all_pairs():
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(37, 4)))
    pairs = [float((vectors[a] - vectors[b]).norm()) for a in range(37) for b in range(37) if a != b]
    assert mean_distance(vectors, rows_at_once=5) == pytest.approx(np.mean(pairs), abs=1e-9)


def test_representations_of_an_llm_and_of_its_teacher(llm):
    model = llm()
    teacher = TrainedModel("SASRec", model.config, model.splits, None, None, 50, model.model.teacher_run, {})
    for one in (model, teacher):
        found = compare_representations(one, OrderSettings(inference=("whole", "reverse"), draws=2))
        vectors = represent(one, one.splits["test"]).double()
        unit = torch.nn.functional.normalize(vectors, dim=1)
        between = (unit @ unit.T).masked_fill(torch.eye(len(unit), dtype=torch.bool), 0).sum() / (len(unit) * (len(unit) - 1))
        assert found["cosine_between_users"] == pytest.approx(float(between), abs=1e-9)
        assert found["unit_distance"] <= 2 and found["users"] == 60
        for condition in found["conditions"]:
            assert condition["users"] == 60 and -1 <= condition["cosine"] < 0.99999


@pytest.mark.parametrize("name", ["LLMSRec", "TALLRec", "CoLLM"])
def test_spans_are_the_items_of_the_prompt(llm, name):
    model = llm(name, history_length=4)
    rows = model.splits["test"].inter_feat[torch.arange(3)]
    batch, weights = attention_weights(model, rows)
    histories = model.model.histories(rows)
    for row, spans in enumerate(item_spans(model, rows)):
        text = words(model, batch, row)
        assert len(weights[row][0]) == len(text) and len(spans) == histories.lengths[row]
        for (start, end), item in zip(spans.tolist(), histories.items[row].tolist(), strict=False):
            inside = "".join(text[start:end])
            assert model.splits["test"].item_texts[item] in inside and "Item No." in inside
            assert ("[item]" in inside) == (name != "TALLRec")
        assert "Item No." not in "".join([*text[: spans[0, 0]], *text[spans[-1, 1] :]])
        assert (spans[1:, 0] == spans[:-1, 1]).all()


def test_attention_is_causal_and_shares_add_up(llm):
    model = llm()
    rows = model.splits["test"].inter_feat[torch.arange(2)]
    before = model.model.represent_distinct_users(rows)
    _, weights = attention_weights(model, rows)
    assert torch.equal(before, model.model.represent_distinct_users(rows))  # the attention is again what it was
    for attention, spans in zip(weights, item_spans(model, rows), strict=True):
        for layer in attention:
            assert torch.allclose(layer.sum(dim=1), torch.ones(len(layer)), atol=1e-5)
            assert (layer.triu(1) == 0).all()
            assert sum(shares(layer, spans).values()) == pytest.approx(1, abs=1e-5)


def test_shares_by_hand():
    rows = [[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.1, 0.2, 0.7, 0, 0], [0.1, 0.3, 0.2, 0.4, 0], [1, 0, 0, 0, 0]]
    attention = torch.tensor(rows)
    found = shares(attention, np.array([[1, 2], [2, 4]]))
    assert found == pytest.approx({"within": (0.7 + 0.6) / 2, "across": (0.2 + 0.3) / 2, "rest": 0.1})


def test_a_look_at_attention_lists_the_strongest_tokens(llm):
    model = llm()
    found = look(model, AttentionSettings(users=2, top=3), OrderSettings())
    assert len(found["users"]) == 2 and set(found["shares"]) == {ORIGINAL, "inference whole"}
    for user in found["users"]:
        first, moved = (user["conditions"][name]["last"]["tokens"] for name in (ORIGINAL, "inference whole"))
        assert [entry["token"] for entry in first] != [entry["token"] for entry in moved]
        for place, entry in enumerate(first):
            weights = [weight for _, _, weight in entry["attends_to"]]
            assert weights == sorted(weights, reverse=True) and len(weights) == 3 and sum(weights) <= 1 + 1e-4
            assert all(at <= place for _, at, weight in entry["attends_to"] if weight > 0)


def test_costs_and_curve(llm, monkeypatch):
    model = llm()
    found = efficiency.measure(model)
    assert found["minutes_per_epoch"] == 0.5 and found["users"] == 60 and found["epochs"] == 2.0
    assert found["tokens_per_second"] > 0 and found["peak_memory_gb"] > 0.05
    assert found["trained_parameters"] == sum(p.numel() for p in model.model.trained_parameters().values())


def test_cases_show_what_is_moved(llm):
    model = llm()
    found = rankings(model, OrderSettings())
    cases = show(model, np.array([5, 7]), found, CaseSettings(users=2, best=3))
    for row, case in zip((5, 7), cases, strict=True):
        target = int(model.splits["test"].inter_feat["item_id"][row])
        assert case["truth"] == model.splits["test"].item_texts[target]
        first, moved = (case["conditions"][name]["history"] for name in (ORIGINAL, "inference whole"))
        assert [date for _, date in first] == [date for _, date in moved]
        assert sorted(title for title, _ in first) == sorted(title for title, _ in moved) and first != moved
        assert len(case["conditions"][ORIGINAL]["best"]) == 3 and case["conditions"][ORIGINAL]["rank"] >= 1


# ---- Found again


def test_a_trained_llm_is_found_again_and_its_teacher_is_shuffled_too(tiny_settings, monkeypatch):
    settings = {**tiny_settings, "epochs": 1, "shuffle_training": "reverse"}
    config, data = make_config("LLMSRec", "chain", config_dict=settings), SharedData()
    model = trained.obtain("LLMSRec", config, data)
    assert model.model.teacher_run.splits["train"].fingerprint == data.splits(config)["train"].fingerprint
    assert model.record["finished"] and model.model.fingerprint == data.splits(config)["train"].text_fingerprint
    plain = make_config("LLMSRec", "chain", config_dict={**settings, "shuffle_training": None})
    assert data.splits(plain)["train"].text_fingerprint != model.model.fingerprint
    monkeypatch.setattr("recbole_llm.trainer.trainer.LLMTrainer.fit", lambda *_, **__: pytest.fail("trained again"))
    again = trained.obtain("LLMSRec", config, data)
    for name, parameter in model.model.trained_parameters().items():
        assert torch.equal(parameter, again.model.trained_parameters()[name])
    assert [entry["epoch"] for entry in again.record["validations"]] == [2 / 3, 1.0]  # two of three steps
    rows = curve.format_results([{"model": "LLMSRec", "dataset": "chain", "seed": 1, **again.record}])
    assert rows.count("LLMSRec") == 2 and "best" in rows


# ---- The command line


def test_analyze_dataset_on_the_command_line(chain_data, capsys, tmp_path):
    line = ["analyze", "dataset", "--dataset=chain", f"--data_path={chain_data}", "--draws=1", "--support=3"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert "users" in shown and "support > 3" in shown
    kept = json.loads((tmp_path / "analyses" / "dataset-chain.json").read_text())
    assert kept["command"] == ["recbole-llm", *line] and kept["results"]["users"] == 60


def test_mistakes_on_the_command_line(capsys):
    for line, message in (
        (["analyze", "ordr", "--dataset=chain"], "unknown analysis 'ordr'; did you mean order?"),
        (["analyze", "order", "--model=SASRec"], "name a dataset"),
        (["analyze", "order", "--dataset=chain", "--model=SASRec", "--inference=hole"], "inference: 'hole' is unknown"),
        (["analyze", "order", "--dataset=chain", "--model=SASRec", "--seed=a"], "seed: 'a' must be"),
        (["analyze", "sweep", "--dataset=chain", "--model=SASRec"], "write --over=beta:0,0.3,0.7"),
        (["analyze", "crossdomain", "--dataset=chain", "--model=LLMSRec"], "--train=A --dataset=B"),
        (["analyze", "crossdomain", "--dataset=ml-100k", "--model=LLMSRec", "--train=ml-100k"], "train: ml-100k is the data"),
        (["analyze", "crossdomain", "--dataset=ml-100k", "--model=SASRec", "--train=chain"], "SASRec knows items by their ids"),
    ):
        assert cli.main(line) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["analyze", "--help"]) == 0 and "representations" in capsys.readouterr().out
