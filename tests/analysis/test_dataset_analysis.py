"""Figures of a dataset, against counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from known_sequences import sequences_of

from recbole_llm.analysis.dataset import (
    DatasetSettings,
    analyze,
    count_rules,
    describe,
    drop_consecutive_repeats,
    format_result,
    reachable_targets,
    shuffled_within_users,
    training_transitions,
)
from recbole_llm.errors import UserError


def rules_by_counting(sequences: list[list[int]], n: int, support: int, confidence: float) -> int:
    grams = Counter(gram for sequence in sequences for gram in zip(*(sequence[k:] for k in range(n)), strict=False))
    starts = Counter(gram for sequence in sequences for gram in zip(*(sequence[k:] for k in range(n - 1)), strict=False))
    return sum(count > support and count / starts[gram[:-1]] > confidence for gram, count in grams.items())


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("confidence", [0.0, 0.1, 0.5])
def test_rules_are_those_that_counting_finds(n, confidence):
    rng = np.random.default_rng(3)
    sequences = [rng.integers(1, 5, size=rng.integers(1, 12)).tolist() for _ in range(120)]
    data = sequences_of(*sequences)
    for support in (0, 3, 10):
        found = count_rules(data.users, data.items, n, support, confidence)
        assert found == rules_by_counting(sequences, n, support, confidence)
    assert count_rules(data.users, data.items, n, 0, 0.0) > 0


def test_a_rule_stays_within_a_user():
    data = sequences_of([1, 2], [3, 4], [3, 4])
    assert count_rules(data.users, data.items, 2, 1, 0.1) == 1  # (3, 4) twice; (2, 3) is no pair


def test_consecutive_repeats_are_dropped_within_a_user_only():
    data = sequences_of([1, 1, 2, 2, 2, 1], [1, 3])
    kept = drop_consecutive_repeats(data.users, data.items)
    assert data.items[kept].tolist() == [1, 2, 1, 1, 3]


def test_shuffling_stays_within_users():
    users = np.repeat([1, 2, 3], [5, 1, 4])
    order = shuffled_within_users(users, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(10)) and order.tolist() != list(range(10))
    assert (users[order] == users).all()


def test_transitions_leave_out_validation_and_test():
    codes, counts = training_transitions(sequences_of([1, 2, 3, 4], [1, 2, 4, 1], [2, 1, 5]))
    assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == {1 * 6 + 2: 2}


def test_reachable_targets():
    # Training pairs: (1, 2), (2, 3), (5, 1).
    data = sequences_of([1, 2, 3, 9, 9], [5, 1, 7, 2], [3, 3, 1, 2], [4, 4, 4, 8])
    from_last, from_any = reachable_targets(data)
    assert from_last.tolist() == [False, False, True, False]
    assert from_any.tolist() == [False, True, True, False]


def test_ties_and_repeats():
    data = sequences_of([1, 1, 2, 1], [3, 4, 5], times=[[0, 0, 1, 1], [0, 1, 2]])
    found = describe(data, DatasetSettings())
    assert found["ties"] == {"pairs": 2 / 5, "users": 1 / 2, "test_items": 1 / 2}
    assert found["repeats"] == {"consecutive": 1 / 5, "interactions": 2 / 7, "test_items": 1 / 2}
    assert (found["users"], found["items"], found["interactions"]) == (2, 5, 7)


def test_a_chain_has_order_and_a_random_one_has_none(make_job, in_folder):
    ordered = in_folder(analyze, make_job("ordered"), DatasetSettings())
    random = in_folder(analyze, make_job("random"), DatasetSettings())
    # With 30 items in 250 histories all pairs are frequent after shuffling too; triples are not.
    assert ordered["rules"]["3-grams"]["before"] >= 30 and ordered["rules"]["3-grams"]["change"] < -0.9
    assert random["rules"]["3-grams"]["before"] == 0
    assert ordered["reachable"]["from_last"] > 0.85
    assert "sequential 2-grams" in format_result(ordered)
    assert in_folder(analyze, make_job("ordered"), DatasetSettings())["read"]


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="draws must be a whole number"):
        DatasetSettings(draws=0)
