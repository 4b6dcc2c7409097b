"""Groups of users: they part the users, and are those of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_sequences import sequences_of

from recbole_llm.analysis.groups import GroupSettings, analyze, compare_groups, format_result, group_users, t_scores
from recbole_llm.analysis.job import write_columns
from recbole_llm.analysis.order import OrderSettings
from recbole_llm.errors import UserError

histories = st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=12), min_size=1, max_size=25)


@given(sequences=histories, data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_grouping_parts_the_users(sequences, data):
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(sequences), max_size=len(sequences))), dtype=bool)
    for members in (None, chosen):
        groups = group_users(sequences_of(*sequences), members)
        assert set(groups) == {"transition", "target", "length", "popularity", "memorized"}
        for grouping, parts in groups.items():
            count = len(sequences) if members is None else members.sum()
            assert (np.sum(list(parts.values()), axis=0) == np.ones(count)).all(), grouping


def test_t_score_by_hand():
    # Training parts: [1, 2, 3], [1, 2], [2, 3]: (1, 2) twice, (2, 3) twice; and [4] alone.
    data = sequences_of([1, 2, 3, 9, 9], [1, 2, 9, 9], [2, 3, 9, 9], [5, 6, 5, 8, 8], [4, 4, 4])
    assert t_scores(data).tolist() == [2.0, 2.0, 2.0, 1.0, 0.0]
    assert group_users(data)["transition"]["bottom half"].tolist() == [False, False, False, True, True]


def test_groups_by_hand():
    # 35 % of five items is one item: the most and the least frequent one.
    data = sequences_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 1], [1, 2, 3, 4, 2], [1, 2, 3], [5, 1, 1])
    assert np.bincount(data.items).tolist() == [0, 7, 5, 4, 3, 2]
    found = group_users(data)
    assert found["target"]["warm"].tolist() == [False, True, False, False, True]
    assert found["target"]["cold"].tolist() == [True, False, False, False, False]
    assert found["length"]["up to 5"].all()
    long = group_users(sequences_of([1] * 7, [1] * 6, [1] * 52))
    assert long["length"]["6 to 10"].tolist() == [True, False, False]
    assert long["length"]["over 50"].tolist() == [False, False, True]


def test_memorized_is_what_training_holds():
    data = sequences_of([1, 2, 3, 7, 7], [5, 5, 1, 2], [5, 5, 2, 1])
    assert group_users(data)["memorized"]["memorized"].tolist() == [False, True, False]


@pytest.mark.slow
def test_means_of_groups_make_the_mean_of_all(make_job, in_folder, tmp_path):
    job = make_job("ordered")
    order = OrderSettings(inference=("whole",), draws=1)
    result = in_folder(lambda: analyze(job, GroupSettings(bootstrap=200), order))
    by_grouping = {}
    for group in result["groups"]:
        by_grouping.setdefault(group["grouping"], []).append(group)
    totals = {
        grouping: sum(group["users"] * group["metrics"]["ndcg@10"] for group in groups) / 250
        for grouping, groups in by_grouping.items()
    }
    assert all(sum(group["users"] for group in groups) == 250 for groups in by_grouping.values())
    assert max(totals.values()) == pytest.approx(min(totals.values()), abs=1e-6)
    # Nine of ten items follow the chain, which a memorized transition is a part of.
    memorized, new = (next(g for g in by_grouping["memorized"] if g["group"] == name) for name in ("memorized", "new"))
    assert memorized["metrics"]["ndcg@10"] > new["metrics"]["ndcg@10"] + 0.2
    assert memorized["conditions"]["inference whole"]["ndcg@10"]["change"] < -0.4
    assert "memorized" in format_result(result, "ndcg@10")
    assert in_folder(lambda: analyze(job, GroupSettings(bootstrap=200), order))["read"]


def test_results_in_any_order_and_of_some_users(tmp_path):
    data = sequences_of(*[[1, 2, 3, 1 + user % 3] for user in range(8)])
    columns = {
        "model": ["A"] * 6,
        "seed": ["1"] * 6,
        "condition": ["original", "other"] * 3,
        "user": ["u7", "u2", "u2", "u5", "u5", "u7"],
        "hit@1": [0.7, 0.02, 0.2, 0.05, 0.5, 0.07],
    }
    found = compare_groups(data, {name: np.array(values) for name, values in columns.items()}, draws=50)
    alone = [group for group in found if group["users"] == 1]
    assert alone
    for group in found:
        other = group["conditions"]["other"]["hit@1"]
        assert other["perturbed"] == pytest.approx(other["original"] / 10)
    columns["user"][0] = "nobody"
    with pytest.raises(UserError, match="no user 'nobody'"):
        compare_groups(data, {name: np.array(values) for name, values in columns.items()})


def test_a_file_of_another_kind_is_refused(make_job, in_folder, tmp_path):
    file = tmp_path / "other.tsv"
    write_columns(file, {"model": ["A"], "user": ["u1"], "hit@1": [1.0]})
    with pytest.raises(UserError, match="holds no results by user"):
        in_folder(lambda: analyze(make_job("ordered"), GroupSettings(results=str(file)), OrderSettings()))
