"""Places of the chosen candidates in a prompt that lists them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from recbole_llm.analysis.position import chosen_places, count_places, format_results, measure
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import shuffled_columns

SETTINGS = {"topk": [1], "metrics": ["Hit"], "valid_metric": "Hit@1", "protocol": "generation", "train_candidates": 4}


@pytest.fixture
def answering(make_model):
    """A function (decode) -> a tiny LLM that answers in titles, untrained."""

    def make(decode):
        config, model, splits = make_model("TALLRec", recommend_by="generation", decode=decode, **SETTINGS)
        model.eval()
        return TrainedModel("TALLRec", config, splits, model, model.score, config["history_length"], None, {})

    return make


def test_places_are_those_of_the_prompt():
    rng = np.random.default_rng(0)
    candidates = np.array([rng.permutation(50)[:6] for _ in range(200)])
    listed = np.take_along_axis(candidates, shuffled_columns(candidates, 5), axis=1)
    picked = listed[:, 2]  # whoever always takes the third
    chosen, targets = chosen_places((candidates == picked[:, None]).astype(float), candidates, 5)
    assert (chosen == 2).all()
    assert (listed[np.arange(200), targets] == candidates[:, 0]).all()
    scores = np.array([[1.0, 1.0, 0.0], [-np.inf] * 3])
    assert chosen_places(scores, candidates[:2, :3], 5)[0].tolist() == [-2, -1]


def test_the_test_by_hand():
    found = count_places(np.array([0] * 9 + [1] * 3 + [2] * 6 + [-1, -2]), np.array([0] * 5 + [1] * 10 + [2] * 5), 3)
    assert found["chosen"] == [9, 3, 6] and found["invalid"] == found["ambiguous"] == 1 and found["expected"] == 6
    assert found["chi_square"] == pytest.approx((3**2 + 3**2 + 0) / 6)
    assert found["p_value"] == pytest.approx(chi2.sf(3, 2))
    assert found["targets"] == [5, 10, 5] and found["hits"] == [5, 3, 3]
    assert count_places(np.array([-1, -1]), np.array([0, 2]), 3)["p_value"] is None


def test_one_who_takes_the_first_is_found_and_one_who_draws_is_not():
    rng = np.random.default_rng(1)
    targets = rng.integers(20, size=1000)
    biased = np.where(rng.random(1000) < 0.1, 0, rng.integers(20, size=1000))
    assert count_places(biased, targets, 20)["p_value"] < 0.001
    assert np.mean([count_places(rng.integers(20, size=1000), targets, 20)["p_value"] < 0.05 for _ in range(200)]) < 0.12


def test_an_llm_is_asked(answering):
    model = answering("constrained")
    found, columns = measure(model)
    assert found["users"] == 60 and sum(found["chosen"]) == 60 and len(found["chosen"]) == 10
    assert found["metrics"]["hit@1"] == pytest.approx(sum(found["hits"]) / 60) and found["metrics"]["validratio"] == 1
    assert np.bincount(np.array(columns["chosen"]), minlength=11).tolist() == [0, *found["chosen"]]
    generator = model.model.form.generator
    generator.score_answers(["nothing"], np.array([[1, 2]]))  # not counted: each measure counts anew
    assert measure(model)[0]["metrics"]["validratio"] == 1
    table = format_results([{"model": "TALLRec", "seed": 1, "dataset": "chain", **found}])
    assert "10.0 %" in table and "9 degrees of freedom" in table


def test_a_model_without_a_list_is_refused(make_model):
    config, model, splits = make_model("LLMSRec")
    with pytest.raises(UserError, match="LLMSRec lists no candidates"):
        measure(TrainedModel("LLMSRec", config, splits, model, model.score, 10, None, {}))
