"""What makes a test easier or harder than it looks is counted, said, and left out where asked for."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.config.identity import deciding_settings
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.guards import GuardSettings, guarded
from recbole_llm.errors import UserError

# user: (item, time); validation is the last but one, the test the last
SEQUENCES = {
    "plain": [("a", 1), ("b", 2), ("c", 3), ("d", 4)],
    "again": [("b", 1), ("a", 2), ("c", 3), ("a", 4)],  # the test asks for a of its history
    "twin": [("a", 1), ("c", 2), ("d", 3), ("A", 4)],  # A has the title of a, and nobody has it in training
    "tied": [("d", 1), ("c", 2), ("b", 3), ("c", 3)],  # c is known, and has the time of b
    "twice": [("a", 1), ("b", 2), ("b", 2), ("c", 3), ("b", 4)],
}
TITLES = {"a": "Dune", "A": "Dune", "b": "Emma", "c": "Ulysses", "d": "Dracula"}


@pytest.fixture
def build(tmp_path, caplog):
    place = tmp_path / "data" / "guarded"
    place.mkdir(parents=True)
    lines = [f"{user}\t{item}\t{time}" for user, rows in SEQUENCES.items() for item, time in rows]
    place.joinpath("guarded.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *lines]) + "\n")
    titles = [f"{item}\t{title}" for item, title in TITLES.items()]
    place.joinpath("guarded.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *titles]) + "\n")
    caplog.set_level("INFO")

    def build(**settings):
        caplog.clear()
        given = {"data_path": str(place.parent), "protocol": "full", **settings}
        dataset = TextSequentialDataset(make_config("SASRec", "guarded", config_dict=given))
        _, valid, test = dataset.build()
        users = [set(split.id2token("user_id", split.inter_feat["user_id"].numpy()).tolist()) for split in (valid, test)]
        return dataset, users, caplog.text

    return build


def test_all_is_counted_and_kept(build):
    _, (valid, test), said = build()
    assert valid == test == set(SEQUENCES)
    for sentence in (
        "1 of 21 interactions repeat the user, item and time of another: kept (repeated_rows: leave_out leaves them out)",
        "2 of 5 items share their text with another: kept (shared_texts: number numbers them)",
        "0 of 5 valid rows and 3 of 5 test rows have the item that they ask for in their own history: kept "
        "(target_in_history: leave_out_item leaves them out)",
        "0 of 5 valid rows and 1 of 5 test rows have an item with the target's text in their own history: kept",
        "0 of 5 valid rows and 1 of 5 test rows ask for an item that nobody has in training: kept",
        "0 of 5 valid rows and 1 of 5 test rows ask for an item of the same time as the one before it: kept",
    ):
        assert sentence in said


@pytest.mark.parametrize(
    "settings, left_out",
    [
        ({"target_in_history": "leave_out_item"}, {"again", "tied", "twice"}),
        ({"target_in_history": "leave_out_text"}, {"again", "tied", "twice", "twin"}),
        ({"unseen_targets": "leave_out"}, {"twin"}),
        ({"tied_targets": "leave_out"}, {"tied"}),
        ({"tied_targets": "leave_out", "unseen_targets": "leave_out"}, {"tied", "twin"}),
    ],
)
def test_rows_are_left_out(build, settings, left_out):
    plain, _, _ = build()
    dataset, (valid, test), said = build(**settings)
    assert test == set(SEQUENCES) - left_out and valid == set(SEQUENCES)
    assert dataset.fingerprint != plain.fingerprint
    assert all(f"{key}: {value}" in said for key, value in settings.items())


def test_repeated_lines_are_left_out(build):
    plain, _, _ = build()
    dataset, _, said = build(repeated_rows="leave_out")
    assert dataset.interactions == 20 and plain.interactions == 21 and "another: repeated_rows: leave_out" in said
    assert dataset.fingerprint != plain.fingerprint


def test_shared_texts_are_numbered(build):
    plain, _, _ = build()
    dataset, _, _ = build(shared_texts="number")
    ids = dataset.field2id_token["item_id"].tolist()
    texts = dict(zip(ids, dataset.item_texts, strict=True))
    assert {texts["a"], texts["A"]} == {"Dune", "Dune (2)"} and texts["b"] == "Emma" and dataset.item_texts[0] == ""
    assert sorted(plain.item_texts).count("Dune") == 2
    assert dataset.fingerprint == plain.fingerprint and dataset.text_fingerprint != plain.text_fingerprint


def test_nothing_published_changes(build):
    config = make_config("SASRec", "ml-100k", config_dict={"protocol": "full"})
    keys = {"repeated_rows", "target_in_history", "unseen_targets", "tied_targets", "shared_texts"}
    assert not keys & deciding_settings(config).keys()
    given = {"protocol": "full", "tied_targets": "leave_out", "shared_texts": "number"}
    decided = deciding_settings(make_config("SASRec", "ml-100k", config_dict=given))
    assert keys & decided.keys() == {"tied_targets"}, "texts decide nothing for a model of ids"


def test_no_row_is_left(build):
    with pytest.raises(UserError, match="target_in_history must be"):
        build(target_in_history="leave_out")
    dataset, _, _ = build()
    train, valid, test = TextSequentialDataset(dataset.config).build()
    tied = test.copy(test.inter_feat[np.flatnonzero(test.inter_feat["timestamp"].numpy() == 3)])
    settings = GuardSettings(None, None, None, "leave_out", None)
    with pytest.raises(UserError, match="tied_targets: no test row is left"):
        guarded(train.all_rows, {"valid": valid, "test": tied}, dataset.item_texts, settings, dataset.logger)
