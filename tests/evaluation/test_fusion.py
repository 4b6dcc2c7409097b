"""Two models as one row, against scores, ranks and weights worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.evaluation import fusion
from recbole_llm.evaluation.evaluate import evaluate_ranking
from recbole_llm.evaluation.fusion import PartScores, fuse, fuse_parts, parts_of, score_part, standardized

INF = float("inf")


def test_standardized_by_hand():
    """1, 3, 5 have mean 3 and deviation sqrt(8 / 3)."""
    found = standardized(torch.tensor([[1.0, 3.0, 5.0], [7.0, 7.0, 7.0]]))
    assert found.dtype == torch.float64
    side = 2 / (8 / 3) ** 0.5
    assert torch.allclose(found, torch.tensor([[-side, 0.0, side], [0.0, 0.0, 0.0]], dtype=torch.float64))


def test_the_padding_item_does_not_count():
    with_padding, without = torch.tensor([[-INF, 1.0, 3.0, 5.0]]), torch.tensor([[1.0, 3.0, 5.0]])
    found = standardized(with_padding)
    assert found[0, 0] == -INF and torch.equal(found[:, 1:], standardized(without))
    mixed = fuse(with_padding, torch.tensor([[0.0, 2.0, 1.0, 9.0]]), 0.5)
    assert mixed[0, 0] == -INF and torch.isfinite(mixed[:, 1:]).all()


def test_fuse_by_hand():
    """The scale of a model's scores does not matter: those of the second are a hundred times as large."""
    first, second = torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[500.0, 300.0, 100.0]])
    assert torch.allclose(fuse(first, second, 0.5), torch.zeros(1, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fuse(first, second, 0.25), 0.5 * standardized(first))


def test_the_names_of_parts():
    assert parts_of("SASRec+LLMSTAR:b") == ("SASRec", "LLMSTAR:b") and parts_of("LLMSTAR:b") == ()


@pytest.fixture(scope="module")
def judged(chain_data):
    """A configuration, the splits, and two models that each know the target of half of the users."""
    given = {"data_path": str(chain_data), "eval_args": {"mode": "uni9"}, "topk": [1], "valid_metric": "Hit@1"}
    config = make_config("LLMSRec", "chain", config_dict={**given, "valid_users": 40})
    splits = SharedData().splits(config)

    def knows(parity):
        def score(batch, candidates):
            rng = np.random.default_rng(candidates.numpy().tolist())
            scores = torch.from_numpy(rng.normal(size=candidates.shape)).float()
            scores[batch["user_id"] % 2 == parity, 0] += 50.0
            return scores

        return score

    return config, splits, knows(0), knows(1)


def test_the_weight_is_chosen_on_the_validation_and_the_row_knows_what_both_know(judged):
    config, splits, even, odd = judged
    first, second = score_part(even, splits, config), score_part(odd, splits, config)
    fused = fuse_parts(first, second, splits, config)
    alone = evaluate_ranking(even, splits["test"], config, "test").metrics["hit@1"]
    assert 0.2 <= fused.weight <= 0.8
    assert alone < 0.7 and fused.test.metrics["hit@1"] > alone + 0.2 and fused.valid["hit@1"] > 0.8


def test_weights_0_and_1_are_the_parts(judged, monkeypatch):
    """Ranks, ties included: the second model's scores are rounded, so that targets tie."""
    config, splits, even, odd = judged

    def rounded(batch, candidates):
        return odd(batch, candidates).clamp(max=3).round()

    first, second = score_part(even, splits, config), score_part(rounded, splits, config)
    for weights, score in (((0.0,), even), ((1.0,), rounded)):
        monkeypatch.setattr(fusion, "WEIGHTS", weights)
        fused = fuse_parts(first, second, splits, config)
        alone = evaluate_ranking(score, splits["test"], config, "test")
        assert np.array_equal(fused.test.ranks, alone.ranks) and fused.test.test_set == alone.test_set


def test_of_equal_weights_the_first_is_taken(judged):
    config, splits, even, _ = judged
    same = score_part(even, splits, config)
    assert fuse_parts(same, same, splits, config).weight == 0.0


def test_parts_of_other_candidates_are_refused(judged):
    config, splits, even, odd = judged
    first = score_part(even, splits, config)
    other = PartScores(first.scores, {**first.test_sets, "valid": "another"})
    with pytest.raises(UserError, match="different users or candidates"):
        fuse_parts(first, other, splits, config)


def test_scores_that_do_not_fit_the_memory(judged, monkeypatch):
    config, splits, even, _ = judged
    monkeypatch.setattr(fusion.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(UserError, match="eval_args"):
        score_part(even, splits, config)
