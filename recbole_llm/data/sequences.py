"""Each user's sequence of items, and windows of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction


class Ragged(Sequence[np.ndarray]):
    """Arrays of different lengths, one behind the other in one array.

    Args:
        values: ``[N]``.
        bounds: int64 ``[n + 1]``, from 0 to N: array k is ``values[bounds[k] : bounds[k + 1]]``.
    """

    def __init__(self, values: np.ndarray, bounds: np.ndarray) -> None:
        self.values, self.bounds = values, bounds

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Ragged:
        """The same arrays, int64."""
        bounds = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64), bounds)

    @property
    def lengths(self) -> np.ndarray:
        """Int64 ``[n]``."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place = place % len(self)
        return self.values[self.bounds[place] : self.bounds[place + 1]]


def user_sequences(train: Any) -> Ragged:
    """Recover each user's whole training sequence from the rows of a training split, one row per prefix."""
    rows = train.inter_feat
    users, targets = rows[train.uid_field].numpy(), rows[train.iid_field].numpy()
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(users[order]) != 0])
    bounds = np.r_[starts, len(users)] + np.arange(len(starts) + 1)
    values = np.empty(bounds[-1], dtype=np.int64)
    values[bounds[:-1]] = first_items(train, order[starts])
    rest = np.ones(len(values), dtype=bool)
    rest[bounds[:-1]] = False
    values[rest] = targets[order]
    return Ragged(values, bounds)


def first_items(split: Any, rows: np.ndarray, rows_at_once: int = 1 << 15) -> np.ndarray:
    """The oldest item of the histories of some ``rows`` (int64 ``[n]``) of a split, int64 ``[n]``."""
    field = split.iid_field + split.config["LIST_SUFFIX"]
    parts = [rows[start : start + rows_at_once] for start in range(0, len(rows), rows_at_once)]
    # Copied, since a view would keep all histories of its part.
    found = [split.inter_feat[part][field][:, 0].clone().numpy() for part in parts]
    return np.concatenate([np.empty(0, np.int64), *found])


def training_items(dataset: Any) -> Ragged:
    """By internal user id, the sorted distinct items of the user's training; none of a user without training rows.

    Args:
        dataset: a split of a ``TextSequentialDataset``.
    """
    train = dataset.splits["train"]
    sequences = user_sequences(train)
    users = np.repeat(np.unique(train.inter_feat[train.uid_field].numpy()), sequences.lengths).astype(np.int64)
    users, items = np.divmod(np.unique(users * train.item_num + sequences.values), train.item_num)
    return Ragged(items, np.searchsorted(users, np.arange(train.user_num + 1)))


def single_interactions(train: Any) -> Any:
    """The interactions of a training split, each once and without its history, as a plain RecBole ``Dataset``.

    What a model learns from that knows users and items, but no sequences. A row of the split is a prefix with its target:
    the first item of each user, which no row has as its target, is among the interactions here, and so is the item of a
    user that has no other.

    Args:
        train: a training split, one row per prefix.
    """
    sequences = user_sequences(train)
    users = np.repeat(np.unique(train.inter_feat[train.uid_field].numpy()), sequences.lengths)
    lone_users, lone_items = train.lone_interactions or (torch.empty(0, dtype=torch.int64),) * 2
    rows = {
        train.uid_field: torch.cat([torch.from_numpy(users), lone_users]),
        train.iid_field: torch.cat([torch.from_numpy(sequences.values), lone_items]),
    }
    plain = copy.copy(train)
    plain.__class__ = Dataset  # a sequential one would look for histories in its rows
    plain.inter_feat = Interaction(rows)
    return plain


def cut_windows(sequences: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> np.ndarray:
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


def gather_windows(values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Return ``out[r, k] = values[starts[r] + k]`` for ``k < lengths[r]``, and 0 beyond.

    Args:
        values: ``[N, ...]``.
        starts: ``[R]`` rows of ``values``.
        lengths: ``[R]``, at most ``width``.

    Returns:
        ``[R, width, ...]``, of the values' dtype.
    """
    return copy_windows(windows_of(values, width), starts, lengths)


def windows_of(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return a view ``[N + 1, width, ...]`` of ``values`` ``[N, ...]`` and zeros behind: row n is ``values[n : n + width]``."""
    return torch.cat([values, values.new_zeros((width, *values.shape[1:]))]).unfold(0, width, 1).movedim(-1, 1)


def copy_windows(
    windows: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, rows_at_once: int = 1 << 15
) -> torch.Tensor:
    """Copy the rows ``starts`` of ``windows``, see :func:`windows_of`, with 0 from ``lengths`` on.

    Args:
        rows_at_once: bounds the memory held beside the result; changes no value.
    """
    # Copying whole rows of the view is faster than indexing their elements.
    width = windows.shape[1]
    out = windows.new_empty((len(starts), width, *windows.shape[2:]))
    offsets = torch.arange(width, device=windows.device)
    for first in range(0, len(starts), rows_at_once):
        part = slice(first, first + rows_at_once)
        block = out[part]
        block.copy_(windows[starts[part]])
        block[offsets >= lengths[part, None]] = 0
    return out
