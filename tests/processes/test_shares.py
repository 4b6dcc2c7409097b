"""How rows are divided among processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_llm.processes import group, tensors


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_row_has_one_process(count, monkeypatch):
    monkeypatch.setattr(tensors, "size", lambda: count)
    lengths = np.random.default_rng(count).integers(1, 500, 100)
    divided = tensors.shares(lengths)
    assert divided is not None and sorted(np.concatenate(divided).tolist()) == list(range(100))
    assert all((np.diff(share) > 0).all() for share in divided)
    totals = [lengths[share].sum() for share in divided]
    assert max(totals) - min(totals) <= lengths.max()  # which no division can promise to be below


def test_fewer_rows_than_processes_are_computed_by_each(monkeypatch):
    monkeypatch.setattr(tensors, "size", lambda: 4)
    assert tensors.shares(np.ones(3)) is None
    assert [len(share) for share in tensors.shares(np.ones(4))] == [1, 1, 1, 1]
    assert tensors.shares(np.zeros(0)) is None


def test_one_process_does_everything():
    rows, weights = torch.arange(3.0), [torch.nn.Parameter(torch.ones(2))]
    assert tensors.shares(np.ones(5)) is None
    assert tensors.gather(rows, None) is rows
    assert tensors.gather_lists([(1, 2), ()], None, rows.device) == [[1, 2], []]
    tensors.mean_gradients(weights)
    assert weights[0].grad is None
    assert group.size() == 1 and group.is_main() and group.decide([1]) == [1] and not group.leave()
    with group.main_first(), group.main_only(group.main_first()):
        assert group.lost_processes() is None
