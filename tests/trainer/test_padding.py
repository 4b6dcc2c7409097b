"""Histories without their padding: the same scores, losses and gradients as with it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import get_model, init_seed

from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.data import padding
from recbole_llm.data.padding import can_trim, groups_by_length, loss_without_padding, parts_by_length
from recbole_llm.data.sequences import cut_windows, user_sequences
from recbole_llm.data.shared import SharedData
from recbole_llm.evaluation import stock_scores as scoring
from recbole_llm.evaluation.evaluate import _rows_without_targets
from recbole_llm.teacher import stock

WITHOUT_DROPOUT = {
    "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0, "dropout_probs": [0.0, 0.0], "dropout": 0.0,
    "sess_dropout": 0.0, "item_dropout": 0.0,
}  # fmt: skip
COLUMNS = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
OF_FEATURES = {
    **dict.fromkeys(("FDSA", "GRU4RecF", "SASRecF"), {"selected_features": ["title"], "load_col": COLUMNS}),
    "S3Rec": {"item_attribute": "title", "load_col": COLUMNS},
}


@pytest.fixture(scope="module")
def build(chain_data):
    """A function (model, **settings) -> (model without dropout, a training batch, splits)."""

    optional = {*WITHOUT_DROPOUT, "loss_type"}

    def make(name, **settings):
        given = {
            "data_path": str(chain_data), "protocol": "retrieval", "use_gpu": False, "train_batch_size": 96,
            "eval_args": {"mode": "uni9"}, "MAX_ITEM_LIST_LENGTH": 30,
            **WITHOUT_DROPOUT, **OF_FEATURES.get(name, {}), **settings,
        }  # fmt: skip
        given = {key: value for key, value in given.items() if key in known_keys(name) or key not in optional}
        config = make_config(name, "chain", config_dict=given)
        splits = SharedData().splits(config)
        init_seed(3, reproducibility=True)
        train = splits["train"]
        samplers = create_samplers(config, train, list(splits.values()))
        batch = next(iter(get_dataloader(config, "train")(config, train, samplers[0], shuffle=True)))
        return get_model(name)(config, train), batch, splits

    return make


def cheapest(lengths, cost):
    """The least cost of groups of sorted lengths, by trying all cuts."""
    ordered, best = sorted(lengths), np.inf
    for cuts in product([False, True], repeat=len(ordered) - 1):
        bounds = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(ordered)]
        groups = [ordered[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]
        best = min(best, sum(len(group) * group[-1] + cost for group in groups))
    return best


@pytest.mark.parametrize("cost", [0, 1, 5, 1000])
def test_groups_have_the_least_cost(cost):
    rng = np.random.default_rng(cost)
    for _ in range(8):
        lengths = torch.from_numpy(rng.integers(1, 12, size=int(rng.integers(1, 9))))
        groups = groups_by_length(lengths, cost)
        rows = torch.cat([places for places, _ in groups])
        assert sorted(rows.tolist()) == list(range(len(lengths)))
        assert all(lengths[places].max() == longest for places, longest in groups)
        assert sum(len(places) * longest + cost for places, longest in groups) == cheapest(lengths.tolist(), cost)


def test_an_empty_history_keeps_one_place():
    assert [(places.tolist(), longest) for places, longest in groups_by_length(torch.tensor([0, 1]), 5)] == [([0, 1], 1)]


@pytest.mark.parametrize("name", padding.MODELS)
def test_loss_gradient_and_scores_are_those_of_the_padded_batch(build, name, monkeypatch):
    settings = {} if name == "CORE" else {"loss_type": "CE", "train_neg_sample_args": None}
    monkeypatch.setattr(padding, "_COST_OF_GROUP", {"cpu": 4})  # many groups
    model, batch, _ = build(name, **settings)
    model.train_stage = "finetune"  # S3Rec
    if name == "S3Rec":
        model.loss_fct = torch.nn.CrossEntropyLoss()
    assert can_trim(type(model)) and len(list(parts_by_length(model, batch))) > 3
    init_seed(1, reproducibility=True)
    plain = model.calculate_loss(batch)
    plain.backward()
    expected = [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    loss = loss_without_padding(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=2e-6)
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        assert (weight.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-6)

    model.eval()
    scores = model.full_sort_predict(batch)[:, : model.n_items]
    torch.testing.assert_close(scoring.stock_scores(model)(batch, None), scores, rtol=0, atol=1e-5)
    candidates = torch.randint(1, scores.shape[1], (len(batch), 7))
    got = scoring.stock_scores(model)(batch, candidates)
    torch.testing.assert_close(got, scores.gather(1, candidates), rtol=0, atol=1e-5)


def test_a_group_whose_masked_items_do_not_count_is_no_nan(build):
    """BERT4Rec's loss leaves out the first item of a history: histories of one item have no target."""
    model, batch, _ = build("BERT4Rec")
    short = torch.tensor([0, 1, 2])
    batch[model.ITEM_SEQ_LEN][short] = 1
    batch[model.MASK_INDEX][short] = 0
    for field in (model.ITEM_SEQ, model.MASK_ITEM_SEQ):
        batch[field][short, 1:] = 0
    plain = model.calculate_loss(batch)
    assert loss_without_padding(model, batch).item() == pytest.approx(plain.item(), abs=2e-6)


@pytest.mark.parametrize("name", ["Caser", "HRM", "LightSANs", "NextItNet", "STAMP", "SHAN", "SINE", "GRU4RecCPR"])
def test_models_that_padding_is_part_of_keep_it(name):
    assert not can_trim(get_model(name))


def test_a_model_of_ones_own_says_whether_it_ignores_padding():
    sasrec = get_model("SASRec")
    assert not can_trim(type("SASRec", (sasrec,), {"__module__": "mine"}))  # its loss may be another
    assert can_trim(type("Mine", (sasrec,), {"ignores_padding": True}))


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_windows_without_padding_train_the_same(build, name, monkeypatch):
    model, _, splits = build(name, loss_type="CE", train_neg_sample_args=None)
    windows = torch.from_numpy(cut_windows(user_sequences(splits["train"]), 30, np.random.default_rng(0)))
    results = []
    for cost in (1 << 40, 4):  # one group, many
        monkeypatch.setattr(padding, "_COST_OF_GROUP", {"cpu": cost})
        loss = stock.all_positions_loss(model, windows)
        loss.backward()
        results.append((loss.item(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]))
        model.zero_grad()
    inputs, targets = windows[:, :-1], windows[:, 1:]
    with stock.all_positions(model):
        states = model.forward(inputs, (inputs > 0).sum(dim=1))
    real = targets > 0
    whole = torch.nn.functional.cross_entropy(states[real] @ model.item_embedding.weight.T, targets[real])
    assert results[0][0] == pytest.approx(whole.item(), abs=2e-6)
    assert results[1][0] == pytest.approx(whole.item(), abs=2e-6)
    for one, many in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", scoring.SCORED_BY_VECTORS)
def test_candidates_scored_by_their_vectors_alone(build, name, monkeypatch):
    model, _, splits = build(name)
    rows = _rows_without_targets(splits["valid"], np.arange(12))
    candidates = torch.randint(1, model.n_items, (12, 5))
    monkeypatch.setattr(scoring, "_VECTORS_PAY", 10**9)
    by_catalogue = scoring.stock_scores(model)(rows, candidates)
    monkeypatch.setattr(scoring, "_VECTORS_PAY", 0)
    monkeypatch.setattr(model, "full_sort_predict", lambda rows: pytest.fail("the whole catalogue was scored"))
    torch.testing.assert_close(scoring.stock_scores(model)(rows, candidates), by_catalogue, rtol=0, atol=1e-6)


def test_the_rows_of_a_group_keep_what_is_no_history():
    histories = torch.tensor([[1, 2, 0], [3, 0, 0]])
    rows = Interaction({"item_id_list": histories, "item_length": torch.tensor([2, 1]), "user_id": torch.tensor([7, 8])})
    model = type("Model", (), {"ITEM_SEQ": "item_id_list", "ITEM_ID": "item_id", "ITEM_SEQ_LEN": "item_length"})()
    (places, part), = parts_by_length(model, rows)
    assert places.tolist() == [1, 0]
    assert part["item_id_list"].tolist() == [[3, 0], [1, 2]] and part["user_id"].tolist() == [8, 7]


def test_a_run_without_padding_has_a_folder_of_its_own(build, chain_data, tmp_path, monkeypatch):
    """An older run of the same settings, whose numbers differ by rounding, is not taken for it."""
    given = {"data_path": str(chain_data), "protocol": "retrieval", "checkpoint_dir": str(tmp_path), "use_gpu": False}
    folders = {}
    monkeypatch.setattr(stock, "_train_or_load", lambda config, splits, training, folder, settings, *_: (folder, settings))
    for trims in (True, False):
        monkeypatch.setattr(stock, "can_trim", lambda kind, trims=trims: trims)
        config = make_config("SASRec", "chain", config_dict=given)
        folders[trims] = stock.train_or_load(config, SharedData().splits(config), "prefix")
    assert folders[True][0] != folders[False][0]
    assert folders[True][1] == {**folders[False][1], "padding": "none"}
