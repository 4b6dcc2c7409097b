"""One cut in time for all users: rows and histories by hand, nothing of the future in training."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import single_interactions
from recbole_llm.errors import UserError
from recbole_llm.quick_start import compare
from recbole_llm.results.run import read_run
from recbole_llm.teacher.teacher import teacher_config

DAY = 86_400
START = 1_600_000_000 // DAY * DAY  # 2020-09-13

# user: (item, day) in the order of the file; the cuts are at day 10 and day 20
SEQUENCES = {
    "u1": [("a", 1), ("b", 2), ("c", 3), ("d", 12), ("e", 13), ("f", 22), ("g", 23)],
    "u2": [("a", 5), ("c", 10), ("b", 20)],  # at the very cuts
    "u3": [("b", 4), ("d", 8), ("a", 9)],
    "u4": [("c", 11), ("a", 25)],  # unseen
    "u5": [("e", 6), ("f", 7), ("z", 15), ("a", 21)],  # z is unseen
    "u6": [("g", 9)],
}
CUTS = {"valid_from": "2020-09-23", "test_from": START + 20 * DAY}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data" / "cut"
    place.mkdir(parents=True)
    lines = [f"{user}\t{item}\t{START + day * DAY}" for user, rows in SEQUENCES.items() for item, day in rows]
    place.joinpath("cut.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n")
    items = sorted({item for rows in SEQUENCES.values() for item, _ in rows})
    titles = ["item_id:token\ttitle:token_seq", *(f"{item}\tThe {item}" for item in items)]
    place.joinpath("cut.item").write_text("\n".join(titles) + "\n")
    return place.parent


@pytest.fixture
def mixed(tmp_path):
    """50 users of 8 to 19 interactions each at any time of a hundred days, 20 items."""
    place = tmp_path / "mixed" / "cut"
    place.mkdir(parents=True)
    rng, lines = np.random.default_rng(3), ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(50):
        lines += [f"{user}\t{item}\t{START + rng.integers(100) * DAY}" for item in rng.integers(20, size=rng.integers(8, 20))]
    place.joinpath("cut.inter").write_text("\n".join(lines) + "\n")
    place.joinpath("cut.item").write_text("item_id:token\ttitle:token_seq\n0\tThe 0\n")
    return place.parent


def dataset(folder, **settings):
    given = {"data_path": str(folder), "protocol": "temporal", **CUTS, **settings}
    return TextSequentialDataset(make_config("SASRec", "cut", config_dict=given))


def rows_of(split) -> set[tuple[str, str, str]]:
    """(user, history, target) of each row."""
    rows = split.inter_feat
    users = split.id2token("user_id", rows["user_id"].numpy())
    targets = split.id2token("item_id", rows["item_id"].numpy())
    histories = [
        "".join(split.id2token("item_id", np.array(items[:length])))
        for items, length in zip(rows["item_id_list"].tolist(), rows["item_length"].tolist(), strict=True)
    ]
    return set(zip(users, histories, targets, strict=True))


def test_rows_by_hand(folder):
    train, valid, test = dataset(folder).build()
    assert rows_of(train.all_rows) == {
        ("u1", "a", "b"), ("u1", "ab", "c"), ("u3", "b", "d"), ("u3", "bd", "a"), ("u5", "e", "f"),
    }  # fmt: skip
    assert rows_of(valid) == {("u1", "abc", "d"), ("u2", "a", "c")}
    assert rows_of(test) == {("u1", "abcde", "f"), ("u2", "ac", "b"), ("u5", "ef", "a")}
    assert train.item_num - 1 == 7 and train.user_num - 1 == 5, "z and u4 are left out, of the catalogue too"
    lone = train.lone_interactions
    assert set(train.id2token("user_id", lone[0].numpy())) == {"u2", "u6"}
    assert set(train.id2token("item_id", lone[1].numpy())) == {"a", "g"}
    plain = single_interactions(train.all_rows).inter_feat
    in_training = sum(day < 10 for rows in SEQUENCES.values() for _, day in rows)
    assert len(plain) == in_training and (plain["item_id"] == train.token2id("item_id", "a")).sum() == 3


def test_all_later_items_are_targets_and_histories_end_at_the_cut(folder):
    _, valid, test = dataset(folder, test_targets="all").build()
    assert rows_of(valid) == {("u1", "abc", "d"), ("u1", "abc", "e"), ("u2", "a", "c")}
    assert rows_of(test) == {("u1", "abcde", "f"), ("u1", "abcde", "g"), ("u2", "ac", "b"), ("u5", "ef", "a")}
    _, valid, _ = dataset(folder, test_targets="all", MAX_ITEM_LIST_LENGTH=2).build()
    assert rows_of(valid) == {("u1", "bc", "d"), ("u1", "bc", "e"), ("u2", "a", "c")}


def test_the_unseen_are_kept(folder, caplog):
    caplog.set_level("INFO")
    _, valid, test = dataset(folder, unseen="keep").build()
    assert rows_of(valid) == {("u1", "abc", "d"), ("u2", "a", "c"), ("u5", "ef", "z")}
    assert rows_of(test) == {("u1", "abcde", "f"), ("u2", "ac", "b"), ("u4", "c", "a"), ("u5", "efz", "a")}
    assert "3 of 10 interactions have one of 1 users or 1 items that are not in training: kept" in caplog.text


def test_nothing_of_the_future_in_training_or_histories(mixed):
    data = dataset(mixed, valid_from=0.6, test_from=0.8, test_targets="all")
    train, valid, test = data.build()
    cuts = data.cuts
    parts = (train.all_rows, cuts.valid, cuts.valid), (valid, cuts.valid, cuts.test), (test, cuts.test, np.inf)
    for place, (split, history_end, end) in enumerate(parts):
        times, lengths = split.inter_feat["timestamp_list"].numpy(), split.inter_feat["item_length"].numpy()
        real = np.arange(times.shape[1]) < lengths[:, None]
        targets = split.inter_feat["timestamp"].numpy()
        assert len(split) > 20 and lengths.min() > 0
        assert (times[real] < history_end).all() and (targets < end).all()
        assert place == 0 or (targets >= history_end).all()


def test_ties_at_a_share_all_come_after_the_cut(folder):
    # 20 interactions; the 8 earliest lie before day 9, which is the time of the 9th and the 10th
    assert dataset(folder, valid_from=0.45).cuts.valid == START + 9 * DAY


def test_the_identity_has_the_cuts(folder):
    one = dataset(folder)
    assert one.fingerprint == dataset(folder, valid_from=START + 10 * DAY).fingerprint
    for changed in ({"valid_from": "2020-09-22"}, {"test_from": "2020-10-02"}, {"test_targets": "all"}, {"unseen": "keep"}):
        assert dataset(folder, **changed).fingerprint != one.fingerprint
    given = {"data_path": str(folder), "protocol": "temporal", "backbone": "tiny", **CUTS, "unseen": "keep"}
    of_teacher = teacher_config(make_config("LLMSRec", "cut", config_dict=given))
    assert of_teacher["valid_from"] == CUTS["valid_from"] and of_teacher["unseen"] == "keep"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"valid_from": "soon"}, "valid_from: 'soon' is no date"),
        ({"valid_from": "2030-01-01"}, "without interactions; choose two times in this order between .*2020-09-14"),
        ({"valid_from": 1628643414042, "test_from": 1658002729837}, "leave validation without interactions"),
        ({"valid_from": 0.9, "test_from": 0.5}, "without interactions"),
        ({"timestamp_format": "none"}, "2020-09-23 is a date, and the timestamps of this data set are none"),
        ({"protocol": "full"}, "valid_from needs protocol: temporal"),
        ({"unseen": "drop"}, "unseen must be"),
        ({"valid_from": -1}, "valid_from must be"),
    ],
)
def test_cuts_that_cannot_be(folder, settings, said):
    with pytest.raises(UserError, match=said):
        dataset(folder, **settings)


def test_stock_models_are_compared(mixed):
    settings = {
        "data_path": str(mixed), "protocol": "temporal", "epochs": 1, "hidden_size": 8, "inner_size": 16, "n_layers": 1,
        "use_gpu": False, "show_progress": False, "valid_from": 0.5, "test_from": 0.7, "checkpoint_dir": "saved",
    }  # fmt: skip
    rows = compare(["SASRec", "Pop"], "cut", settings=settings)
    assert [row.get("error") for row in rows] == [None, None]
    assert rows[0]["test_set"] == rows[1]["test_set"] and rows[0]["users"] > 10
    assert read_run(rows[0]["checkpoint"]).record["settings"]["valid_from"] == 0.5
