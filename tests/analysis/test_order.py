"""Order sensitivity, on data whose answer is known, and the statistics behind it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recbole_llm.analysis import order, trained
from recbole_llm.analysis.job import read_columns
from recbole_llm.analysis.order import (
    ORIGINAL,
    OrderSettings,
    analyze,
    format_results,
    inference_sensitivity,
    jaccard,
    per_user_columns,
    rank,
)
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.evaluation.intervals import bootstrap_means, compare
from recbole_llm.evaluation.stock_scores import stock_scores

BOTH = OrderSettings(inference=("whole",), training=("whole",), draws=2)


@pytest.fixture(scope="module")
def on_chain(make_job, in_folder):
    """The result of SASRec on data of known order."""
    return in_folder(analyze, make_job("ordered"), BOTH)[0]


def condition_of(result, name):
    return next(condition for condition in result["conditions"] if condition["condition"] == name)


# ---- Known answers


@pytest.mark.parametrize("name", ["inference whole", "training whole"])
def test_order_is_half_of_sasrec_on_a_chain(on_chain, name):
    found = condition_of(on_chain, name)["metrics"]["ndcg@10"]
    assert found["original"] > 0.7
    assert found["change"] < -0.5 and found["change_interval"][1] < -0.45 and found["p_value"] < 0.001
    assert found["change"] == pytest.approx(found["perturbed"] / found["original"] - 1)


def test_nothing_moves_where_the_data_has_no_order(make_job, in_folder):
    [result] = in_folder(analyze, make_job("random"), OrderSettings(draws=2, inference=("whole", "reverse")))
    assert len(result["conditions"]) == 2
    for condition in result["conditions"]:
        for metric in ("ndcg@10", "recall@10"):
            low, high = condition["metrics"][metric]["difference_interval"]
            assert low <= 0 <= high, (condition["condition"], metric)


class BagOfItems(nn.Module):
    """Scores items by their nearness to the mean of the history, in whatever order it stands."""

    ITEM_ID, ITEM_SEQ, ITEM_SEQ_LEN = "item_id", "item_id_list", "item_length"

    def __init__(self, places: torch.Tensor, items: int) -> None:
        super().__init__()
        angle = places.double() / items * 2 * torch.pi
        self.register_buffer("vectors", torch.stack([angle.cos(), angle.sin()], dim=1))
        self.n_items, self.device = len(places), torch.device("cpu")

    def full_sort_predict(self, rows):
        history = rows[self.ITEM_SEQ]
        vectors = self.vectors[history] * (history > 0)[:, :, None]
        return (vectors.sum(dim=1) / rows[self.ITEM_SEQ_LEN][:, None]) @ self.vectors.T


def test_a_bag_of_items_does_not_move(make_job):
    [(_, config)] = make_job("ordered").configs()
    splits = SharedData().splits(config)
    tokens = splits["train"].field2id_token["item_id"]
    places = torch.tensor([0, *(int(token) for token in tokens[1:])])
    model = BagOfItems(places, len(tokens) - 1)
    bag = TrainedModel("Bag", config, splits, model, stock_scores(model), 50, None, {})
    conditions, by_user = inference_sensitivity(bag, OrderSettings(inference=("whole", "window", "last", "reverse"), draws=2))
    assert len(conditions) == 4
    for condition in conditions:
        found = condition["metrics"]["ndcg@10"]
        assert found["original"] > 0.18, "chance is .15: the bag knows something"
        assert found["difference_interval"][0] <= 0 <= found["difference_interval"][1]
        assert condition["jaccard"]["jaccard@10"] > 0.99


# ---- The statistics


def test_a_planted_five_percent_is_found_with_2000_users():
    rng = np.random.default_rng(4)
    found = []
    for repeat in range(20):
        ranks = np.minimum(1 + rng.geometric(0.05, size=2000), 100)
        original = np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0)
        # One in ten of the users whose target is listed loses half of the value: 5 % of the mean.
        perturbed = np.where(rng.random(2000) < 0.1, original / 2, original)
        result = compare(original, perturbed, seed=repeat)
        found.append(result["change_interval"][1] < 0 and result["p_value"] < 0.05)
        assert result["change"] == pytest.approx(-0.05, abs=0.025)
    assert all(found)


def test_intervals_hold_their_promise():
    rng = np.random.default_rng(5)
    inside = []
    for repeat in range(80):
        original = rng.random(150) * (rng.random(150) < 0.4)
        noise = rng.normal(0, 0.2, size=150)
        low, high = compare(original, original + noise, seed=repeat, draws=1000)["difference_interval"]
        inside.append(low <= 0 <= high)
    assert 0.87 <= np.mean(inside) <= 1.0


def test_bootstrap_is_that_of_drawing_users():
    rng = np.random.default_rng(6)
    values = np.where(rng.random((300, 2)) < 0.8, 0.0, rng.random((300, 2)))
    means = bootstrap_means(values, seed=1, draws=10_000)
    plain = values[rng.integers(300, size=(10_000, 300))].mean(axis=1)
    assert means.shape == (10_000, 2)
    shares = [0.025, 0.5, 0.975]
    assert np.allclose(np.quantile(means, shares, axis=0), np.quantile(plain, shares, axis=0), atol=3e-3)
    assert np.allclose(np.cov(means.T), np.cov(plain.T), rtol=0.1, atol=2e-6)
    assert np.array_equal(means, bootstrap_means(values, seed=1, draws=10_000))


def test_no_change_of_nothing():
    found = compare(np.zeros(20), np.zeros(20))
    assert found["change"] is None and found["change_interval"] is None and found["p_value"] == 1.0


def test_jaccard_by_hand():
    a = np.array([[1, 2, 3], [1, 2, 3], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    b = np.array([[3, 2, 1], [3, 4, 5], [1, 2, -1], [-1, -1, -1], [1, 2, 3]])
    assert jaccard(a, b).tolist() == [1.0, 1 / 5, 1 / 2, 1.0, 0.0]


# ---- Files


def test_users_values_give_the_aggregates(on_chain):
    columns = per_user_columns(on_chain)
    names = list(dict.fromkeys(columns["condition"].tolist()))
    assert names == [ORIGINAL, "inference whole", "training whole"]
    for condition in on_chain["conditions"]:
        rows = columns["condition"] == condition["condition"]
        assert rows.sum() == on_chain["users"] == len(set(columns["user"][rows].tolist()))
        for metric, found in condition["metrics"].items():
            assert columns[metric][rows].mean() == pytest.approx(found["perturbed"], abs=1e-6)
            assert columns[metric][columns["condition"] == ORIGINAL].mean() == pytest.approx(found["original"], abs=1e-6)
        for metric, value in condition["jaccard"].items():
            assert columns[metric][rows].mean() == pytest.approx(value, abs=1e-6)
    table = format_results([on_chain], metrics=["ndcg@10"])
    assert table.count("SASRec") == 2 and "inference whole" in table


def test_what_was_done_is_read(make_job, in_folder, on_chain, monkeypatch):
    monkeypatch.setattr(trained, "obtain", lambda *arguments: pytest.fail("a model was asked for"))
    [again] = in_folder(analyze, make_job("ordered"), BOTH)
    assert again["read"] and not on_chain["read"]
    assert again["conditions"] == on_chain["conditions"]


def test_a_truncated_result_is_computed_again_and_is_the_same(make_job, in_folder, on_chain):
    file = Path(on_chain["folder"]) / "result.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    [again] = in_folder(analyze, make_job("ordered"), BOTH)
    assert not again["read"] and again["conditions"] == on_chain["conditions"]
    assert json.loads(file.read_text()) == json.loads(text)


def test_a_run_that_stops_between_models_goes_on(make_job, in_folder, on_chain, monkeypatch):
    job = make_job("ordered", models=("SASRec", "GRU4Rec"))
    asked = []

    def stop(name, *arguments):
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, "obtain", stop)
    with pytest.raises(KeyboardInterrupt):
        in_folder(analyze, job, BOTH)
    assert asked == ["GRU4Rec"]  # SASRec's result stands, although it was found for another list of models


def test_settings_make_results_of_their_own(make_job, in_folder, on_chain):
    [other] = in_folder(analyze, make_job("ordered"), OrderSettings(inference=("last",), draws=1))
    assert not other["read"] and other["folder"] != on_chain["folder"]
    assert [condition["condition"] for condition in other["conditions"]] == ["inference last"]
    assert other["test_set"] == on_chain["test_set"] and other["metrics"] == on_chain["metrics"]


def test_mistakes_are_named(make_job):
    with pytest.raises(UserError, match="inference: 'hole' is unknown; did you mean 'whole'"):
        OrderSettings(inference=("hole",))
    with pytest.raises(UserError, match="draws: 0 is no whole number"):
        OrderSettings(draws=0)
    with pytest.raises(UserError, match="name the models to analyze"):
        analyze(make_job(models=()), OrderSettings())
    with pytest.raises(UserError, match="cannot be read"):
        read_columns("nowhere.tsv")


# ---- LLM recommenders


@pytest.fixture
def llm(make_model):
    def make(name, **settings):
        config, model, splits = make_model(name, **settings)
        model.eval()
        return TrainedModel(name, config, splits, model, model.score, config["history_length"], None, {})

    return make


def test_an_llm_is_asked_for_the_same_items_in_another_order(llm):
    model = llm("LLMSRec", history_length=4)
    split, changed = order.perturbed(model.splits["test"], "whole", 0, most=model.reads)
    before = model.model.histories(model.splits["test"].inter_feat)
    after = model.model.histories(split.inter_feat)
    assert (np.sort(before.items, axis=1) == np.sort(after.items, axis=1)).all()
    assert (before.dates == after.dates).all()
    assert ((before.items != after.items).any(axis=1) == changed).all() and changed.any()


def test_generation_is_judged_by_its_answers(llm):
    model = llm("TALLRec", recommend_by="generation", protocol="generation", topk=[1], metrics=["Hit"], valid_metric="Hit@1",
                decode="constrained", train_candidates=4)  # fmt: skip
    original = rank(model, model.splits["test"])
    assert original.other == {"validratio": 1.0} and original.top.shape == (60, 1) and (original.top > 0).all()
    [condition], by_user = inference_sensitivity(model, OrderSettings(draws=1), original)
    assert set(condition["metrics"]) == {"hit@1"} and condition["other"]["validratio"] == [1.0, 1.0]
    assert condition["jaccard"]["jaccard@1"] == np.mean(by_user["inference whole"]["jaccard@1"])
    assert set(by_user["inference whole"]["jaccard@1"]) <= {0.0, 1.0}


def test_yes_no_is_refused(make_job):
    settings = {"protocol": "yes_no", "recommend_by": "yes_no", "metrics": ["AUC"], "valid_metric": "AUC"}
    job = make_job("ordered", models=("SASRec", "TALLRec"), **settings)
    with pytest.raises(UserError, match="yes_no ranks no items"):
        analyze(job, OrderSettings())
