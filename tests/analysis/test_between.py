"""Which of two models uses order more."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.analysis.between import change_difference, compare_models, format_differences
from recbole_llm.analysis.job import write_columns
from recbole_llm.evaluation.intervals import compare


def planted(users: int = 800) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original values, the same with about 30 % lost, and with about 10 % lost."""
    rng = np.random.default_rng(3)
    original = rng.random(users) * (rng.random(users) < 0.5)
    return original, original * (rng.random(users) < 0.7), original * (rng.random(users) < 0.9)


def test_the_model_that_loses_more_is_told():
    original, much, little = planted()
    found = change_difference((original, much), (original, little))
    alone = [compare(original, values)["change"] for values in (much, little)]
    assert found["difference"] == pytest.approx(alone[0] - alone[1]) and found["difference"] < -0.1
    low, high = found["interval"]
    assert low < found["difference"] < high < 0
    back = change_difference((original, little), (original, much))
    assert back["difference"] == pytest.approx(-found["difference"]) and back["interval"][0] > 0


def test_equal_models_do_not_differ_and_nothing_has_no_ratio():
    original, much, _ = planted()
    assert change_difference((original, much), (2 * original, 2 * much))["interval"] == pytest.approx([0, 0], abs=1e-12)
    assert change_difference((0 * original, much), (original, much)) == {"difference": None, "interval": None}


def test_users_are_paired_by_name_and_other_test_sets_are_left_out(tmp_path):
    original, much, little = planted(40)
    users = np.array([f"u{number:02}" for number in range(40)])
    results = []
    for name, values, order, test_set in (
        ("A", much, np.arange(40), "x"),
        ("B", little, np.random.default_rng(1).permutation(40), "x"),
        ("C", little, np.arange(40), "y"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        columns = {
            "model": [name] * 80,
            "seed": [1] * 80,
            "condition": ["original"] * 40 + ["other"] * 40,
            "user": [*users[order], *users[order]],
            "hit@1": np.concatenate([original[order], values[order]]),
        }
        write_columns(folder / "per_user.tsv", columns)
        conditions = [{"condition": "other", "metrics": {"hit@1": {}}}]
        head = {"model": name, "seed": 1, "test_set": test_set, "settings": {"bootstrap": 500}}
        results.append({**head, "conditions": conditions, "folder": str(folder)})
    found = compare_models(results, "original")
    assert [len(entries) for entries in found] == [0, 1, 0]
    wanted = change_difference((original, little), (original, much), seed=1, draws=500)
    assert found[1][0]["against"] == "A" and found[1][0]["difference"] == pytest.approx(wanted["difference"], abs=1e-6)
    assert found[1][0]["interval"] == pytest.approx(wanted["interval"], abs=1e-6)
    table = format_differences([{**result, "against": entries} for result, entries in zip(results, found, strict=True)])
    assert table.count("\nB ") == 1 and "ndcg" not in table
