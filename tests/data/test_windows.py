"""Windows of training sequences: which rows they are of, and how likely each is."""

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data.windows import SHOWN, TrainingWindows, window_ends


class Split:
    """Three users with 6, 2 and 1 targets, their rows mixed; a target's id is 10 * user + its place."""

    uid_field = "user"

    def __init__(self, users=(1, 2, 3)):
        rows = [(1, 10), (2, 20), (1, 11), (1, 12), (3, 30), (1, 13), (2, 21), (1, 14), (1, 15)]
        user, item = torch.tensor(rows).T
        self.inter_feat = Interaction({"user": torch.tensor(users)})
        self.all_rows = self if len(users) != 3 else Split(user.tolist())
        if self.all_rows is self:
            self.inter_feat = Interaction({"user": user, "item": item})


def test_a_window_is_consecutive_rows_of_a_user_each_showing_one_item_more():
    windows = TrainingWindows(Split(), 4)
    windows.starts = np.array([1, 0, 0])
    rows = windows.rows(np.array([2, 0, 1]))
    assert rows["user"].tolist() == [3, 1, 1, 1, 1, 2, 2]
    assert rows["item"].tolist() == [30, 11, 12, 13, 14, 20, 21]
    assert rows[SHOWN].tolist() == [1, 1, 2, 3, 4, 1, 2]
    assert window_ends(rows, "user").tolist() == [0, 4, 4, 4, 4, 6, 6]
    assert SHOWN not in Split().all_rows.inter_feat, "the split's own rows stay as they are"


def test_rows_of_no_window_are_ends():
    assert window_ends(Interaction({"user": torch.tensor([4, 4, 5])}), "user").tolist() == [0, 1, 2]


def test_starts_and_how_likely_each_row_is():
    windows, rng, seen = TrainingWindows(Split(), 4), np.random.default_rng(0), []
    for _ in range(3000):
        windows.draw(rng)
        seen.append(windows.starts[0])
        assert windows.starts[1:].tolist() == [0, 0]
    assert set(seen) == {0, 1, 2}
    # User 1: windows of rows 0-3, 1-4, 2-5. Rows in the order of the table: see Split.
    expected = np.array([1, 3, 2, 3, 3, 3, 3, 2, 1]) / 3
    np.testing.assert_allclose(windows.coverage(), expected)
    counts = np.zeros(9)
    for start in seen:
        counts[[place for place in np.array([0, 2, 3, 5, 7, 8])[start : start + 4]]] += 1 / len(seen)
    np.testing.assert_allclose(counts[[0, 2, 3, 5, 7, 8]], expected[[0, 2, 3, 5, 7, 8]], atol=0.03)
