"""Histories and training sequences in another order: what moves, what stays, and that a seed gives the same again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.analysis.order import perturbed
from recbole_llm.data.perturbation import KINDS, perturb_histories
from recbole_llm.data.sequences import user_sequences
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError


def histories():
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 9, size=200)
    items = np.where(np.arange(8) < lengths[:, None], rng.integers(1, 7, size=(200, 8)), 0)
    return items, lengths, np.arange(200) * 3


@pytest.mark.parametrize("kind", KINDS)
def test_items_stay_and_order_moves(kind):
    items, lengths, names = histories()
    order, changed = perturb_histories(items, lengths, names, kind, 7, most=5)
    moved = np.take_along_axis(items, order, axis=1)
    assert (np.sort(order, axis=1) == np.arange(8)).all()
    for row, length in enumerate(lengths):
        start = max(0, length - 5)
        assert (moved[row, :start] == items[row, :start]).all() and (moved[row, length:] == 0).all()
        assert sorted(moved[row, start:length]) == sorted(items[row, start:length])
    assert ((moved != items).any(axis=1) == changed).all() and changed.mean() > 0.5
    assert (order[~changed] == np.arange(8)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_whoever_else_is_there(kind):
    items, lengths, names = histories()
    order, changed = perturb_histories(items, lengths, names, kind, 7)
    again = perturb_histories(items, lengths, names, kind, 7)
    part = perturb_histories(items[50:60], lengths[50:60], names[50:60], kind, 7)
    assert (again[0] == order).all() and (again[1] == changed).all() and (part[0] == order[50:60]).all()
    if kind != "reverse":
        assert (perturb_histories(items, lengths, names, kind, 8)[0] != order).any()


def test_reverse_reverses():
    order, changed = perturb_histories(np.array([[4, 5, 6, 0], [7, 8, 7, 0]]), np.array([3, 3]), np.array([1, 2]), "reverse", 0)
    assert order.tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]] and changed.tolist() == [True, False]


@pytest.fixture
def splits_of(make_job):
    def build(**settings):
        [(_, config)] = make_job(**settings).configs()
        return SharedData().splits(config)

    return build


def test_dates_stay_and_all_else_moves_with_the_item(splits_of):
    test = splits_of()["test"]
    rows = test.inter_feat
    # A field that belongs to the item, with an axis of its own.
    pairs = torch.stack([rows["item_id_list"] * 10, rows["item_id_list"] * 10 + 1], dim=2)
    rows.update(Interaction({"size_list": pairs}))
    other, changed = perturbed(test, "whole", seed=3)
    moved = other.inter_feat
    for field in ("user_id", "item_id", "timestamp", "timestamp_list", "item_length"):
        assert torch.equal(rows[field], moved[field]), field
    assert torch.equal(moved["size_list"][:, :, 0], moved["item_id_list"] * 10)
    assert torch.equal(moved["size_list"][:, :, 1], moved["item_id_list"] * 10 + 1)
    differ = (rows["item_id_list"] != moved["item_id_list"]).any(dim=1).numpy()
    assert (differ == changed).all() and changed.all()
    assert torch.equal(perturbed(test, "whole", seed=3)[0].inter_feat["item_id_list"], moved["item_id_list"])
    for change in ({"draw": 1}, {"seed": 4}):
        repeated = perturbed(test, "whole", **{"seed": 3, **change})[0].inter_feat["item_id_list"]
        assert not torch.equal(repeated, moved["item_id_list"])


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_training_leaves_validation_and_test_alone(splits_of, kind):
    plain, shuffled = splits_of(), splits_of(shuffle_training=kind)
    for phase in ("valid", "test"):
        for field in plain[phase].inter_feat.columns:
            assert torch.equal(plain[phase].inter_feat[field], shuffled[phase].inter_feat[field]), (phase, field)
    assert plain["train"].fingerprint != shuffled["train"].fingerprint
    before, after = user_sequences(plain["train"]), user_sequences(shuffled["train"])
    assert [sorted(sequence) for sequence in before] == [sorted(sequence) for sequence in after]
    same = np.mean([np.array_equal(a, b) for a, b in zip(before, after, strict=True)])
    assert same < 0.02  # a user with one or two equal training items has no other order
    if kind == "reverse":
        assert all(np.array_equal(a[::-1], b) for a, b in zip(before, after, strict=True))
    for field in ("timestamp", "timestamp_list", "item_length", "user_id"):
        assert torch.equal(plain["train"].inter_feat[field], shuffled["train"].inter_feat[field]), field


def test_rows_of_shuffled_training_are_prefixes_of_one_sequence(splits_of):
    train = splits_of(shuffle_training="whole")["train"]
    rows = train.inter_feat
    sequences = dict(zip(np.unique(rows["user_id"].numpy()).tolist(), user_sequences(train), strict=True))
    histories, lengths = rows["item_id_list"].numpy(), rows["item_length"].numpy()
    for row, (user, target) in enumerate(zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True)):
        length = lengths[row]
        assert [*histories[row, :length], target] == sequences[user][: length + 1].tolist()


def test_the_seed_draws_the_training_order(splits_of):
    first, again, other = (splits_of(shuffle_training="whole", seed=seed)["train"] for seed in (1, 1, 2))
    assert torch.equal(first.inter_feat["item_id"], again.inter_feat["item_id"]) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.inter_feat["item_id"], other.inter_feat["item_id"]) and first.fingerprint != other.fingerprint
    plain = [splits_of(seed=seed)["train"].fingerprint for seed in (1, 2)]
    assert plain[0] == plain[1]


def test_seeds_of_one_run_get_their_own_order(make_job):
    data = SharedData()
    configs = [make_job(shuffle_training="whole", seed=seed).configs()[0][1] for seed in (1, 2)]
    rows = [data.splits(config)["train"].inter_feat["item_id"] for config in configs]
    assert not torch.equal(*rows)


def test_other_splits_are_refused(splits_of):
    with pytest.raises(UserError, match="shuffle_training needs the split"):
        splits_of(shuffle_training="whole", eval_args={"split": {"RS": [0.8, 0.1, 0.1]}})
