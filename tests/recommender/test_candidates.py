"""Candidates that a step's targets share."""

import numpy as np

from recbole_llm.recommender.candidates import SharedDraw

USER_ITEMS = [np.array([], dtype=int), np.array([1, 2, 3]), np.array([4])]


def test_targets_and_random_items_are_candidates_each_once():
    draw = SharedDraw(USER_ITEMS, np.array([0.0, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0]), share=0.25, others=4)
    users, targets = np.array([1, 1, 2]), np.array([2, 3, 4])
    found = draw(users, targets, 2, np.random.default_rng(0))
    assert len(np.unique(found.items)) == len(found.items) >= 4 and {2, 3, 4} <= set(found.items) <= set(range(1, 11))
    assert (found.items[found.targets] == targets).all()
    for row, user in enumerate(users):
        assert set(found.items[found.left_out[row]]) == set(USER_ITEMS[user]) & set(found.items)
    items, left_out = found.of_rows(np.array([0, 2]))
    assert items[:, 0].tolist() == [2, 4] and not left_out[:, 0].any()
    for row, user in enumerate((1, 2)):
        assert set(items[row, ~left_out[row]]) == {targets[2 * row]} | set(found.items) - set(USER_ITEMS[user])
        assert len(items[row, ~left_out[row]]) == len(set(items[row, ~left_out[row]]))


def test_how_likely_an_item_is_a_candidate():
    """Against counting: each of 8 rows of an epoch brings its target into a step of 2 with probability 1/4."""
    epoch = np.array([1, 1, 1, 1, 2, 2, 3, 4])
    counts, rng, steps = np.bincount(epoch, minlength=21).astype(float), np.random.default_rng(0), 4000
    draw = SharedDraw([np.array([], dtype=int)], counts, share=1 / 8, others=5)
    seen = np.zeros(21)
    said = np.full(21, np.nan)
    for _ in range(steps):
        found = draw(np.zeros(2, dtype=int), rng.choice(epoch, 2), 2, rng)
        seen[found.items] += 1 / steps
        said[found.items] = np.exp(found.log_expected_counts)
    np.testing.assert_allclose(seen[5:], 5 / 20, atol=0.03)
    np.testing.assert_allclose(said[5:], 5 / 20, rtol=1e-5)
    np.testing.assert_allclose(said[1:5], 1 - 0.75 * np.exp(-np.array([1, 0.5, 0.25, 0.25])), rtol=1e-5)
    np.testing.assert_allclose(said[1:5], seen[1:5], atol=0.1)  # of so few rows it is not quite a Poisson number
