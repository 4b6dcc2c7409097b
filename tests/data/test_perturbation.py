"""Perturbed orders keep the items, move what they say they move, and are never the identity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data.perturbation import draw_negatives, shuffle_all, shuffle_last, shuffle_window

KINDS = {
    "whole": lambda items, rng: shuffle_all(items, rng),
    "window": lambda items, rng: shuffle_window(items, 2, 4, rng),
    "last": lambda items, rng: shuffle_last(items, 3, rng),
}
histories = st.lists(st.integers(1, 4), min_size=1, max_size=10).map(lambda items: np.array(items, dtype=np.int64))


@pytest.mark.parametrize("kind", KINDS)
@given(items=histories, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_multiset_is_kept_and_order_is_not(kind, items, seed):
    shuffled = KINDS[kind](items, np.random.default_rng(seed))
    if shuffled is None:
        part = items[-3:] if kind == "last" else items
        assert len(set(part.tolist())) == 1, "a history that has another order must get one"
        return
    assert sorted(shuffled) == sorted(items)
    assert (shuffled != items).any()


@given(items=histories, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_window_moves_one_window_only(items, seed):
    shuffled = shuffle_window(items, 2, 4, np.random.default_rng(seed))
    if shuffled is not None:
        moved = np.flatnonzero(shuffled != items)
        assert moved[-1] - moved[0] < 4


@given(items=histories, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_last_leaves_the_beginning(items, seed):
    shuffled = shuffle_last(items, 3, np.random.default_rng(seed))
    if shuffled is not None:
        assert (shuffled[:-3] == items[:-3]).all()


def test_two_items_are_always_exchanged():
    for seed in range(200):
        assert shuffle_all(np.array([7, 9]), np.random.default_rng(seed)).tolist() == [9, 7]


def test_every_order_is_possible_and_about_equally_likely():
    rng = np.random.default_rng(0)
    seen = [tuple(shuffle_all(np.array([1, 2, 3]), rng)) for _ in range(5000)]
    counts = {order: seen.count(order) for order in set(seen)}
    assert len(counts) == 5  # six orders without the identity
    assert min(counts.values()) > 850 and max(counts.values()) < 1150


def test_draw_negatives_counts_kinds_and_skips_what_cannot_be_moved():
    items = np.array([[1, 2, 3, 4], [5, 5, 5, 0], [6, 0, 0, 0], [7, 8, 0, 0]])
    perturbed, parents = draw_negatives(items, np.array([4, 3, 1, 2]), np.random.default_rng(0), whole=2, window=1, last=1)
    assert parents.tolist() == [0] * 4 + [3] * 4
    assert (perturbed[4:] == [8, 7, 0, 0]).all()
    for row in perturbed[:4]:
        assert sorted(row) == [1, 2, 3, 4]


def test_draw_negatives_is_seeded():
    items, lengths = np.arange(1, 41).reshape(4, 10), np.full(4, 10)
    first = draw_negatives(items, lengths, np.random.default_rng([3, 5]))
    again = draw_negatives(items, lengths, np.random.default_rng([3, 5]))
    other = draw_negatives(items, lengths, np.random.default_rng([3, 6]))
    assert (first[0] == again[0]).all() and (first[0] != other[0]).any()


def test_no_negatives_at_all():
    perturbed, parents = draw_negatives(np.ones((2, 5), dtype=np.int64), np.array([5, 5]), np.random.default_rng(0))
    assert perturbed.shape == (0, 5) and parents.shape == (0,)


def test_several_windows_are_shuffled_within_themselves():
    from recbole_llm.data.perturbation import draw_negatives, shuffle_windows

    items, rng = np.arange(1, 13), np.random.default_rng(0)
    moved = []
    for _ in range(200):
        shuffled = shuffle_windows(items, 3, 3, None, rng)
        assert [sorted(part) for part in shuffled.reshape(4, 3).tolist()] == items.reshape(4, 3).tolist()
        assert (shuffled.reshape(4, 3) != items.reshape(4, 3)).any(axis=1).all(), "each window has another order"
        one = shuffle_windows(items, 3, 3, 2, rng)
        moved.append((one.reshape(4, 3) != items.reshape(4, 3)).any(axis=1))
    assert (np.sum(moved, axis=1) == 2).all() and (np.mean(moved, axis=0) > 0.3).all()
    lengths = {tuple(np.flatnonzero(shuffle_windows(items, 2, 5, 1, rng) != items)) for _ in range(200)}
    assert len({places[-1] - places[0] + 1 for places in lengths}) > 2, "windows of varying lengths"
    assert all(shuffle_windows(np.array(constant), 2, 5, None, rng) is None for constant in ([1], [1, 1]))
    same = [draw_negatives(items[None], np.array([12]), np.random.default_rng(4), window=2)[0] for _ in range(1)]
    again = draw_negatives(items[None], np.array([12]), np.random.default_rng(4), window=2, windows_shuffled=1)[0]
    assert (same[0] == again).all(), "the default is one window anywhere"
