"""Each user's sequence of items, and windows of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction


def user_sequences(train) -> list[np.ndarray]:
    """Recover each user's whole training sequence from the rows of a training split, one row per prefix."""
    rows = train.inter_feat
    users, targets = rows[train.uid_field].numpy(), rows[train.iid_field].numpy()
    first_items = rows[train.iid_field + train.config["LIST_SUFFIX"]][:, 0].numpy()
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(users[order]) != 0])
    return [
        np.concatenate([[first_items[rows_of_user[0]]], targets[rows_of_user]])
        for rows_of_user in np.split(order, starts[1:])
    ]


def training_items(dataset: Any) -> list[np.ndarray]:
    """By internal user id, the sorted distinct items of the user's training; none of a user without training rows.

    Args:
        dataset: a split of a ``TextSequentialDataset``.
    """
    train = dataset.splits["train"]
    found = [np.zeros(0, dtype=np.int64)] * train.user_num
    users = np.unique(train.inter_feat[train.uid_field].numpy())
    for user, sequence in zip(users.tolist(), user_sequences(train), strict=True):
        found[user] = np.unique(sequence)
    return found


def single_interactions(train: Any) -> Any:
    """The interactions of a training split, each once and without its history, as a plain RecBole ``Dataset``.

    What a model learns from that knows users and items, but no sequences. A row of the split is a prefix with its target:
    the first item of each user, which no row has as its target, is among the interactions here, and so is the item of a
    user that has no other.

    Args:
        train: a training split, one row per prefix.
    """
    sequences = user_sequences(train)
    users = np.repeat(np.unique(train.inter_feat[train.uid_field].numpy()), [len(sequence) for sequence in sequences])
    lone_users, lone_items = train.lone_interactions or (torch.empty(0, dtype=torch.int64),) * 2
    rows = {
        train.uid_field: torch.cat([torch.from_numpy(users), lone_users]),
        train.iid_field: torch.cat([torch.from_numpy(np.concatenate(sequences)), lone_items]),
    }
    plain = copy.copy(train)
    plain.__class__ = Dataset  # a sequential one would look for histories in its rows
    plain.inter_feat = Interaction(rows)
    return plain


def cut_windows(sequences: list[np.ndarray], length: int, rng: np.random.Generator) -> np.ndarray:
    """Cut sequences into windows of ``length + 1`` items that cover every target once, at random offsets.

    Returns:
        int64 ``[W, length + 1]``, right padded with 0; consecutive windows of a user overlap in one item, which is
        the target of the first and the first input of the second.
    """
    windows = []
    for sequence in sequences:
        end = int(rng.integers(1, length + 1)) if len(sequence) > length + 1 else len(sequence) - 1
        start = 0
        while start < len(sequence) - 1:
            windows.append(sequence[start : end + 1])
            start, end = end, min(end + length, len(sequence) - 1)
    table = np.zeros((len(windows), length + 1), dtype=np.int64)
    for row, window in enumerate(windows):
        table[row, : len(window)] = window
    return table


def gather_windows(
    values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, width: int, rows_at_once: int = 1 << 15
) -> torch.Tensor:
    """Return ``out[r, k] = values[starts[r] + k]`` for ``k < lengths[r]``, and 0 beyond.

    Args:
        values: ``[N, ...]``.
        starts: ``[R]`` rows of ``values``.
        lengths: ``[R]``, at most ``width``.
        rows_at_once: bounds the memory held beside the result; changes no value.

    Returns:
        ``[R, width, ...]``, of the values' dtype.
    """
    # Row n of the view is values[n : n + width]: copying whole rows of it is faster than indexing their elements.
    windows = torch.cat([values, values.new_zeros((width, *values.shape[1:]))]).unfold(0, width, 1).movedim(-1, 1)
    out = values.new_empty((len(starts), width, *values.shape[1:]))
    offsets = torch.arange(width, device=values.device)
    for first in range(0, len(starts), rows_at_once):
        part = slice(first, first + rows_at_once)
        block = out[part]
        block.copy_(windows[starts[part]])
        block[offsets >= lengths[part, None]] = 0
    return out
