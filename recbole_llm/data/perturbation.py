"""Perturbed orders of a history: the multi-scale negatives of LLM-STAR (section 3.2), and the tests of order sensitivity.

Every function of a history keeps the multiset of items, never returns the order it was given, and returns None where the
history is too short or too uniform to have another order of that kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recbole_llm.errors import UserError

KINDS = ("whole", "window", "last", "reverse")
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


def shuffle_windows(
    items: np.ndarray, shortest: int, longest: int, count: int | None, rng: np.random.Generator
) -> np.ndarray | None:
    """Window shuffle over several windows: the sequence is cut into consecutive windows of drawn lengths, and the items inside
    ``count`` of them (None: all) are permuted.

    Args:
        items: item ids int64 ``[n]``.
        shortest, longest: range of the windows' lengths, both included; the last window is what is left.
        count: how many windows change, as far as there are so many that can.
        rng: source of randomness.
    """
    bounds = [0]
    while bounds[-1] < len(items):
        bounds.append(min(len(items), bounds[-1] + int(rng.integers(shortest, max(shortest, longest) + 1))))
    shuffled, changed = items, 0
    for place in rng.permutation(len(bounds) - 1).tolist():
        if count is not None and changed == count:
            break
        part = _shuffle_within(shuffled, bounds[place], bounds[place + 1], rng)
        if part is not None:
            shuffled, changed = part, changed + 1
    return shuffled if changed else shuffle_window(items, shortest, longest, rng)


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
    windows_shuffled: int | None = 1,
    last_items: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the negatives of each history of a batch.

    Args:
        items: item ids int64 ``[B, L]``, right padded with 0.
        lengths: int64 ``[B]``.
        rng: source of randomness.
        whole, window, last: how many negatives of each kind a history gets.
        window_shortest, window_longest: range of the window's length in items.
        windows_shuffled: how many windows a negative of that kind changes, see :func:`shuffle_windows`; 1: one anywhere.
        last_items: N of the last-N shuffle.

    Returns:
        perturbed item ids int64 ``[P, L]`` and the history each belongs to, int64 ``[P]``. A history gives fewer than
        ``whole + window + last`` where it is too short or constant.
    """
    def windows(row: np.ndarray) -> np.ndarray | None:
        if windows_shuffled == 1:
            return shuffle_window(row, window_shortest, window_longest, rng)
        return shuffle_windows(row, window_shortest, window_longest, windows_shuffled, rng)

    kinds = (
        [lambda row: shuffle_all(row, rng)] * whole
        + [windows] * window
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


def reverse(items: np.ndarray) -> np.ndarray | None:
    """The sequence backwards, int64 ``[n]``; None where that is the same."""
    backwards = items[::-1].copy()
    return None if (backwards == items).all() else backwards


def training_order(
    items: np.ndarray, users: np.ndarray, first_row: np.ndarray, kind: str, seed: int, split: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``shuffle_training``: the row that each row takes its item from, and whether it belongs to the training split.

    Args:
        items, users: internal ids of the interactions ``[N]``, sorted by user.
        first_row: where each one's user begins ``[N]``.
        kind: of :data:`KINDS`.
        seed: of the run.
        split: of ``eval_args``.

    Raises:
        UserError: another kind, or another split than the last items left out.
    """
    if kind not in KINDS:
        raise UserError(f"the key shuffle_training is {kind!r}: set it to one of {', '.join(KINDS)}")
    if split != {"LS": "valid_and_test"}:
        raise UserError(
            f"the key shuffle_training needs the split {{'LS': 'valid_and_test'}} in eval_args, not {split}: set that split"
        )
    begins = np.unique(first_row)
    lengths = np.diff(np.append(begins, len(users)))
    lengths -= np.clip(lengths - 2, 0, 2)  # validation and test; a user of three items has no validation item
    order = np.arange(len(users))
    is_training = order - first_row < np.repeat(lengths, np.diff(np.append(begins, len(users))))
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        part = np.arange(begin, begin + length)
        moved, _ = perturb_histories(items[part][None], np.array([length]), users[begin : begin + 1], kind, seed)
        order[part] = part[moved[0]]
    return torch.from_numpy(order), torch.from_numpy(is_training)


def perturb_histories(
    items: np.ndarray,
    lengths: np.ndarray,
    names: np.ndarray,
    kind: str,
    seed: int,
    *,
    most: int | None = None,
    window_shortest: int = 2,
    window_longest: int = 5,
    last_items: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw another order of each history. A history's draw depends on ``seed`` and its name, not on the other histories.

    Args:
        items: item ids int64 ``[B, L]``, right padded.
        lengths: int64 ``[B]``.
        names: what tells the histories apart, such as user ids, int64 ``[B]``, at least 0.
        kind: one of :data:`KINDS`.
        seed: of the draw.
        most: only the latest ``most`` items of a history may move (what a model reads); None: all.
        window_shortest, window_longest: range of the window's length in items.
        last_items: N of the last-N shuffle.

    Returns:
        the place that each place takes its item from, int64 ``[B, L]``, so that
        ``np.take_along_axis(items, order, axis=1)`` are the perturbed histories; and whether a history has another order,
        bool ``[B]``. One that has none stays as it is.
    """
    shuffles = {
        "whole": lambda part, rng: shuffle_all(part, rng),
        "window": lambda part, rng: shuffle_window(part, window_shortest, window_longest, rng),
        "last": lambda part, rng: shuffle_last(part, last_items, rng),
        "reverse": lambda part, rng: reverse(part),
    }
    shuffle = shuffles[kind]
    order = np.tile(np.arange(items.shape[1]), (len(items), 1))
    changed = np.zeros(len(items), dtype=bool)
    for row, (length, name) in enumerate(zip(lengths.tolist(), names.tolist(), strict=True)):
        start = 0 if most is None else max(0, length - most)
        part = items[row, start:length]
        shuffled = shuffle(part, np.random.default_rng([seed, name]))
        if shuffled is None:
            continue
        changed[row] = True
        # Equal items keep their order among themselves: the k-th of them goes to the k-th place that holds such an item.
        order[row, start + np.argsort(shuffled, kind="stable")] = start + np.argsort(part, kind="stable")
    return order, changed
