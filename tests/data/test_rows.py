"""Rows whose histories are copied when they are read are the rows that RecBole makes."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_llm.data import rows as module
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.rows import Histories, Rows
from recbole_llm.data.sequences import Ragged

STARTS, LENGTHS = torch.tensor([0, 0, 0, 4, 4]), torch.tensor([1, 2, 3, 1, 2])
PADDED = torch.tensor([[11, 0, 0], [11, 12, 0], [11, 12, 13], [15, 0, 0], [15, 16, 0]])


@pytest.fixture(params=[True, False], ids=["copied at once", "copied when read"])
def both(request, monkeypatch):
    """The same rows, with histories and without."""
    if not request.param:
        monkeypatch.setattr(module, "_ROWS_AT_HAND", 0)
    plain = {"user": torch.tensor([2, 2, 1, 1, 1]), "list": PADDED.clone()}
    histories = Histories.of(torch.arange(11, 18), STARTS, LENGTHS, 3)
    return Rows({"user": plain["user"].clone(), "list": histories}), Interaction(plain)


def assert_same(ours: Interaction, theirs: Interaction) -> None:
    assert ours.columns == theirs.columns and len(ours) == len(theirs)
    for name in theirs.columns:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "index",
    [slice(1, 4), [4, 0], np.array([2, 2]), torch.tensor([3]), np.array([True, False, True, False, False]), range(1, 3), []],
    ids=str,
)
def test_some_rows(both, index):
    ours, theirs = both
    numbers = list(index) if isinstance(index, (list, range)) else index
    expected = torch.as_tensor(np.atleast_1d(np.arange(5)[numbers]), dtype=torch.int64)
    assert_same(ours[index], Interaction({name: theirs[name][expected] for name in theirs.columns}))


def test_one_row(both):
    ours, theirs = both
    assert torch.equal(ours[2]["list"], theirs[2]["list"]) and ours[np.int64(2)]["user"] == 1


def test_what_recbole_does_with_an_interaction(both):
    ours, theirs = both
    for either in (ours, theirs):
        either.sort("user")
    assert_same(ours, theirs)
    assert_same(ours.to("cpu"), theirs)
    assert_same(copy.deepcopy(ours), theirs)
    assert_same(ours.repeat_interleave(2), theirs.repeat_interleave(2))
    assert {name: values.tolist() for name, values in ours.interaction.items()} == {
        name: values.tolist() for name, values in theirs.interaction.items()
    }
    assert [values.tolist() for values in ours.interaction.values()] == [theirs[name].tolist() for name in ours]
    assert ours.interaction.get("list").shape == (5, 3) and ours.interaction.get("other", 7) == 7
    ours.update(Interaction({"new": torch.arange(5)}))
    assert ours[1:2]["new"].tolist() == [1] and "list" in ours and "other" not in ours


def test_some_rows_copy_nothing_until_they_are_read(monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_HAND", 2)
    values = torch.arange(1000)
    rows = Rows({"list": Histories.of(values, torch.arange(900), torch.full((900,), 100), 100)})
    part = rows[100:300]
    (column,) = [column for _, column in part.interaction.stored()]
    assert isinstance(column, Histories) and column.windows.data_ptr() == next(rows.interaction.stored())[1].windows.data_ptr()
    assert type(rows[:2]) is Interaction and type(part) is Rows


@pytest.mark.parametrize("mode", ["valid_and_test", "valid_only", "test_only"])
def test_leave_one_out_is_that_of_recbole(mode):
    rng = np.random.default_rng(0)
    users = torch.from_numpy(np.r_[rng.integers(1, 40, 200), [50, 51, 51]])  # some with one row, and with two
    rows = Rows({"user": users, "place": torch.arange(len(users))})

    class Split:
        inter_feat, config = rows, {"unused_col": None}
        logger = logging.getLogger("quiet")
        _drop_unused_col = Dataset._drop_unused_col
        _grouped_index = Dataset._grouped_index
        _split_index_by_leave_one_out = Dataset._split_index_by_leave_one_out
        copy = staticmethod(lambda part: part)


    theirs = Dataset.leave_one_out(Split(), "user", mode)
    ours = TextSequentialDataset.leave_one_out(Split(), "user", mode)
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["place"].tolist() == other["place"].tolist()


def test_ragged_arrays():
    ragged = Ragged.of([np.array([3, 4]), np.array([], dtype=np.int64), np.array([5])])
    assert [array.tolist() for array in ragged] == [[3, 4], [], [5]] and len(ragged) == 3
    assert ragged.lengths.tolist() == [2, 0, 1] and ragged[-1].tolist() == [5] and ragged[np.int64(0)].tolist() == [3, 4]
    assert [array.tolist() for array in ragged[1:]] == [[], [5]]
    with pytest.raises(IndexError):
        ragged[3]
    assert Ragged.of([]).bounds.tolist() == [0]
