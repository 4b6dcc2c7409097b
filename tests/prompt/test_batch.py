"""Micro-batches: every prompt once, within the budget, at the least cost."""

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.prompt.batch import cut_into_micro_batches


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 300), call_cost=st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_partition_within_budget(lengths, budget, call_cost):
    lengths = np.array(lengths, dtype=np.int64)
    parts = cut_into_micro_batches(lengths, budget, call_cost)
    assert sorted(np.concatenate(parts).tolist() if parts else []) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * lengths[part].max() <= budget


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), call_cost=st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_cost_is_the_least_of_all_partitions_of_the_sorted_prompts(lengths, call_cost):
    ordered = sorted(lengths)

    @cache
    def least(end):
        if end == 0:
            return 0
        return min(least(start) + (end - start) * ordered[end - 1] + call_cost for start in range(end))

    parts = cut_into_micro_batches(np.array(lengths), 10**6, call_cost)
    cost = sum(len(part) * max(lengths[index] for index in part) + call_cost for part in parts)
    assert cost == least(len(lengths))


def test_longest_prompts_come_first():
    parts = cut_into_micro_batches(np.array([1, 100, 2, 90]), 200, 0)
    assert set(parts[0].tolist()) <= {1, 3}
