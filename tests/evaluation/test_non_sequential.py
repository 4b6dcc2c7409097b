"""Models without sequences (Pop, ItemKNN, BPR) as rows of a comparison, on the same interactions, users and candidates."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.config.settings import make_config
from recbole_llm.data.sequences import single_interactions
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare


@pytest.fixture
def settings(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = ("data_path", "use_gpu", "topk", "valid_metric", "eval_args", "checkpoint_dir")
    return {**{key: tiny_settings[key] for key in keys if key in tiny_settings}, "show_progress": False, "epochs": 1}


def test_single_interactions_are_all_but_the_held_out(settings):
    splits = SharedData().splits(make_config("SASRec", "chain", config_dict={"protocol": "retrieval", **settings}))
    train = splits["train"]
    plain = single_interactions(train)
    users, items = (plain.inter_feat[field].numpy() for field in (train.uid_field, train.iid_field))
    for user, owned in enumerate(train.user_items):
        if user:
            held_out = [
                split.inter_feat[train.iid_field][split.inter_feat[train.uid_field] == user].tolist()
                for split in (splits["valid"], splits["test"])
            ]
            history = splits["test"].inter_feat[train.config["ITEM_LIST_LENGTH_FIELD"]][
                splits["test"].inter_feat[train.uid_field] == user
            ]
            assert len(items[users == user]) == int(history) - 1  # the test's history without the validation target
            assert set(items[users == user]) | set(sum(held_out, [])) == set(owned.tolist())
    assert plain.inter_matrix().sum() == len(users) and train.inter_feat is not plain.inter_feat


@pytest.mark.slow
def test_popularity_ranks_by_counts_of_training(settings):
    rows = compare(["SASRec", "Pop", "BPR", "ItemKNN"], "chain", settings=settings)
    assert [row["model"] for row in rows] == ["SASRec", "Pop", "BPR", "ItemKNN"] and not any("error" in row for row in rows)
    assert len({row["test_set"] for row in rows}) == 1
    again = compare(["Pop", "ItemKNN", "BPR"], "chain", settings=settings)
    for row, other in zip(again, [rows[1], rows[3], rows[2]], strict=True):
        assert np.array_equal(row["ranks"], other["ranks"])


def test_models_of_features_are_refused(settings):
    with pytest.raises(UserError, match="model: FM reads features or knowledge"):
        compare(["SASRec", "FM"], "chain", settings=settings)
