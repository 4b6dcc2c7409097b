"""Windows of the users' training sequences in which every position is a target (``train_targets: window``).

::

    sequence                a b c d e f g h      history_length 3: windows of 4 items
    a window                    c d e f          drawn anew in each epoch
    its rows: prompt shows      c       -> d
                                c d     -> e
                                c d e   -> f

A row of a window is the training row of its target, history and all, with :data:`SHOWN`: of how many of the latest items a
prompt is made. What else reads the row (the teacher) sees the whole history.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

SHOWN = "items_shown"  # field of an Interaction: the latest items of the history that a prompt shows, int64 [B]


class TrainingWindows:
    """Draws one window of each user in each epoch.

    Args:
        split: the training split with one row per user, whose ``all_rows`` have a row for each target, in order of time.
        length: the most targets of a window: one less than its items.

    Attributes:
        starts: first row of each user's present window, counted within the user's rows, int64 ``[U]``; at 0 until drawn.
    """

    def __init__(self, split: Any, length: int) -> None:
        self.length = length
        self._all, field = split.all_rows.inter_feat, split.uid_field
        users = self._all[field].numpy()
        self._order = np.argsort(users, kind="stable")
        wanted = split.inter_feat[field].numpy()
        self._first = np.searchsorted(users[self._order], wanted)
        self._counts = np.searchsorted(users[self._order], wanted, side="right") - self._first
        self.starts = np.zeros_like(self._first)

    def draw(self, rng: np.random.Generator) -> None:
        """Draw the users' windows of an epoch: every start is as likely as any other."""
        self.starts = rng.integers(0, np.maximum(self._counts - self.length, 0) + 1)

    def rows(self, users: np.ndarray) -> Interaction:
        """The rows of the present windows of some rows of the split, int64 ``[n]``: window by window, oldest target first."""
        lengths = np.minimum(self._counts[users], self.length)
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = self._all[torch.from_numpy(self._order[np.repeat(self._first[users] + self.starts[users], lengths) + place])]
        rows.update(Interaction({SHOWN: torch.from_numpy(place + 1)}))
        return rows

    def coverage(self) -> np.ndarray:
        """How likely each row of ``all_rows`` is to be in its user's window in an epoch, float64."""
        spare = np.maximum(self._counts - self.length, 0)
        place = np.arange(self._counts.sum()) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        spare = np.repeat(spare, self._counts)
        covering = np.minimum(place, spare) - np.maximum(place - self.length + 1, 0) + 1
        share = np.zeros(len(self._all))
        share[self._order[np.repeat(self._first, self._counts) + place]] = covering / (spare + 1)
        return share


def window_ends(rows: Interaction, user_field: str) -> np.ndarray:
    """For each row the last row of its window, int64 ``[B]``; rows that belong to no window are ends themselves."""
    if SHOWN not in rows:
        return np.arange(len(rows))
    users = rows[user_field].cpu().numpy()
    ends = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    return ends[np.searchsorted(ends, np.arange(len(users)))]
