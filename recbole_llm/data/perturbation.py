"""Perturbed orders of a history: the multi-scale negatives of LLM-STAR (section 3.2).

Every function keeps the multiset of items, never returns the order it was given, and returns None where the history
is too short or too uniform to have another order of that kind.
"""

from __future__ import annotations

import numpy as np

REDRAWS = 8  # random redraws before the orders that differ are enumerated by swapping


def _shuffle_within(items: np.ndarray, start: int, stop: int, rng: np.random.Generator) -> np.ndarray | None:
    """Shuffle ``items[start:stop]`` into an order that differs, or None where all its items are equal."""
    part = items[start:stop]
    if len(part) < 2 or (part == part[0]).all():
        return None
    for _ in range(REDRAWS):
        shuffled = rng.permutation(part)
        if (shuffled != part).any():
            break
    else:
        # Rare (two items: chance 2^-8): exchange two different items, which cannot be the same order.
        first = int(rng.integers(len(part)))
        others = np.flatnonzero(part != part[first])
        second = int(others[rng.integers(len(others))])
        shuffled = part.copy()
        shuffled[[first, second]] = shuffled[[second, first]]
    return np.concatenate([items[:start], shuffled, items[stop:]])


def shuffle_all(items: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Random shuffle: the whole sequence is permuted.

    Args:
        items: item ids int64 ``[n]``.
        rng: source of randomness.

    Returns:
        int64 ``[n]``, or None.
    """
    return _shuffle_within(items, 0, len(items), rng)


def shuffle_window(items: np.ndarray, shortest: int, longest: int, rng: np.random.Generator) -> np.ndarray | None:
    """Window shuffle: the items inside one window of random length and place are permuted.

    Args:
        items: item ids int64 ``[n]``.
        shortest, longest: range of the window's length, both included; cut to the history's length.
        rng: source of randomness.
    """
    longest = min(longest, len(items))
    shortest = min(shortest, longest)
    if longest < 2:
        return None
    # A window of equal items has no other order: look at windows in random order until one has.
    for length in rng.permutation(np.arange(shortest, longest + 1)):
        for start in rng.permutation(len(items) - int(length) + 1):
            shuffled = _shuffle_within(items, int(start), int(start) + int(length), rng)
            if shuffled is not None:
                return shuffled
    return None


def shuffle_last(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray | None:
    """Last-N shuffle: the last ``count`` items, those that say most about the next one, are permuted.

    Args:
        items: item ids int64 ``[n]``.
        count: N; the whole history where it is shorter.
        rng: source of randomness.
    """
    return _shuffle_within(items, max(0, len(items) - count), len(items), rng)


def draw_negatives(
    items: np.ndarray,
    lengths: np.ndarray,
    rng: np.random.Generator,
    *,
    whole: int = 1,
    window: int = 1,
    last: int = 1,
    window_shortest: int = 2,
    window_longest: int = 5,
    last_items: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the negatives of each history of a batch.

    Args:
        items: item ids int64 ``[B, L]``, right padded with 0.
        lengths: int64 ``[B]``.
        rng: source of randomness.
        whole, window, last: how many negatives of each kind a history gets.
        window_shortest, window_longest: range of the window's length in items.
        last_items: N of the last-N shuffle.

    Returns:
        perturbed item ids int64 ``[P, L]`` and the history each belongs to, int64 ``[P]``. A history gives fewer than
        ``whole + window + last`` where it is too short or constant.
    """
    kinds = (
        [lambda row: shuffle_all(row, rng)] * whole
        + [lambda row: shuffle_window(row, window_shortest, window_longest, rng)] * window
        + [lambda row: shuffle_last(row, last_items, rng)] * last
    )
    perturbed, parents = [], []
    for row, length in enumerate(lengths):
        for kind in kinds:
            shuffled = kind(items[row, :length])
            if shuffled is not None:
                padded = np.zeros(items.shape[1], dtype=np.int64)
                padded[:length] = shuffled
                perturbed.append(padded)
                parents.append(row)
    if not perturbed:
        return np.zeros((0, items.shape[1]), dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.stack(perturbed), np.array(parents, dtype=np.int64)
