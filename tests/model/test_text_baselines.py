"""ZESRec, CTRL and UniSRec: their formulas computed by hand, and their places among the stock models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recbole_llm import preflight
from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.loading import load_data_and_model
from recbole_llm.model.unisrec import MixtureOfWhitening, UniSRecSettings, without_some_items
from recbole_llm.teacher import stock
from recbole_llm.teacher.item_embedding import catalogue_vectors, use_item_vectors

SIZES = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 2}


@pytest.fixture
def configure(chain_data, tmp_path):
    """A function (model, **settings) -> its configuration, with vectors of a file."""
    file = tmp_path / "vectors.npy"
    np.save(file, np.random.default_rng(5).normal(size=(40, 12)))
    given = {
        "protocol": "retrieval", "data_path": str(chain_data), "checkpoint_dir": str(tmp_path / "saved"), "epochs": 1,
        "eval_args": {"mode": "uni9"}, "topk": [5], "valid_metric": "Hit@5", "show_progress": False, "use_gpu": False,
        "MAX_ITEM_LIST_LENGTH": 6, "item_vectors": str(file),
    }  # fmt: skip
    return lambda name, **settings: make_config(name, "chain", config_dict={**given, **SIZES, **settings})


@pytest.fixture
def build(configure):
    """A function (model, **settings) -> the model in evaluation mode with its vectors, and 5 training rows."""
    from recbole.utils import get_model, init_seed

    def make(name, **settings):
        config = configure(name, **settings)
        train = SharedData().splits(config)["train"]
        init_seed(1, True)
        model = get_model(name)(config, train)
        use_item_vectors(model, config, catalogue_vectors(config, train).vectors)
        return model.eval(), train.inter_feat[slice(0, 5)]

    return make


def settings_of(**changed):
    values = dict(
        hidden_size=3, initializer_range=0.5, experts=2, adaptor_dropout_prob=0.0, temperature=0.07, finetuning="inductive",
        pretrain_epochs=0, sequence_weight=1e-3, item_drop_ratio=0.2, fixed_encoder=True,
    )  # fmt: skip
    return UniSRecSettings(**{**values, **changed})


def test_the_adaptor_is_a_gated_sum_of_shifted_linear_maps():
    torch.manual_seed(0)
    adaptor, vectors = MixtureOfWhitening(4, settings_of()).eval(), torch.randn(5, 4)
    for parameter in (adaptor.biases, adaptor.gate, adaptor.noise):
        torch.nn.init.normal_(parameter)
    for row, vector in enumerate(vectors):
        logits = [float((vector @ adaptor.gate[:, expert]).detach()) for expert in range(2)]
        gates = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        expected = sum(gates[k] * ((vector - adaptor.biases[k]) @ adaptor.weights[k]) for k in range(2))
        torch.testing.assert_close(adaptor(vectors)[row], expected)
    assert not torch.equal(adaptor.train()(vectors), adaptor(vectors))  # the gates' noise


@pytest.mark.parametrize("finetuning", ["inductive", "transductive"])
def test_fine_tuning_is_cross_entropy_of_cosines_over_the_temperature(build, finetuning):
    model, rows = build("UniSRec", finetuning=finetuning)
    table = model.item_embedding.projection(model.item_embedding.vectors)
    if finetuning == "transductive":
        table = table + model.item_embedding.numbers
    assert (model.item_embedding.numbers is None) == (finetuning == "inductive")
    table = torch.cat([model.item_embedding.own, table])
    torch.testing.assert_close(model.item_embedding(rows["item_id_list"]), table[rows["item_id_list"]])
    states = model.forward(rows["item_id_list"], rows["item_length"])
    cosines = states @ table.T / states.norm(dim=1, keepdim=True) / table.norm(dim=1)
    torch.testing.assert_close(model.full_sort_predict(rows), cosines)
    torch.testing.assert_close(model.predict(rows), cosines[torch.arange(5), rows["item_id"]])
    chances = (cosines / 0.07).exp()
    expected = -(chances[torch.arange(5), rows["item_id"]] / chances.sum(dim=1)).log().mean()
    torch.testing.assert_close(model.calculate_loss(rows), expected)
    windows = torch.cat([rows["item_id_list"][:1, :1], rows["item_id"][:1, None]], dim=1)
    assert rows["item_length"][0] == 1
    torch.testing.assert_close(stock.all_positions_loss(model, windows), model.calculate_loss(rows[slice(0, 1)]))


def test_pre_training_contrasts_a_sequence_with_its_next_item_and_with_a_part_of_itself(build, monkeypatch):
    from recbole_llm.model import unisrec

    model, rows = build("UniSRec", pretrain_epochs=1, sequence_weight=0.5)
    rows["item_id"][1] = rows["item_id"][0]  # the same next item: no negative
    shortened = rows["item_id_list"].clone(), rows["item_length"].clone()
    shortened[0][4, 1:] = 0
    shortened[1][4] = 1
    monkeypatch.setattr(unisrec, "without_some_items", lambda histories, ratio: shortened)

    def contrast(left, right):
        left, right = left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)
        chances = (left @ right.T / 0.07).exp()
        rest = [sum(chances[i, j] for j in range(5) if i == j or {i, j} != {0, 1}) for i in range(5)]
        return -sum(torch.log(chances[i, i] / rest[i]) for i in range(5)) / 5

    states = model.forward(rows["item_id_list"], rows["item_length"])
    items = model.item_embedding.projection(model.item_embedding.vectors)[rows["item_id"] - 1]  # without their own embeddings
    expected = contrast(states, items) + 0.5 * contrast(states, model.forward(*shortened))
    torch.testing.assert_close(model.calculate_loss(rows), expected)


def test_items_are_left_out_in_order_and_never_the_first():
    torch.manual_seed(0)
    histories = torch.tensor([[7, 3, 9, 4, 0, 0], [5, 0, 0, 0, 0, 0]]).repeat(200, 1)
    left, lengths = without_some_items(histories, 0.4)
    assert torch.equal((left > 0).sum(dim=1), lengths) and lengths.min() == 1
    seen = {tuple(row[:length]) for row, length in zip(left.tolist(), lengths.tolist(), strict=True)}
    assert seen == {(5,), (7,), (7, 3), (7, 9), (7, 4), (7, 3, 9), (7, 3, 4), (7, 9, 4), (7, 3, 9, 4)}
    assert abs(float(lengths[::2].float().mean()) - 2.8) < 0.2
    assert torch.equal(without_some_items(histories, 0.0)[0], histories)


def test_a_pre_trained_model_is_fine_tuned_with_its_encoder_fixed_and_read_as_it_was_trained(configure):
    config = configure("UniSRec", pretrain_epochs=1, learning_rate=0.1)
    run = stock.train_or_load(config, SharedData().splits(config), "causal")
    assert [point.get("stage") for point in run.curve] == ["pretrain", None]
    assert not any(parameter.requires_grad for parameter in run.model.trm_encoder.parameters())
    assert run.model.item_embedding.numbers.requires_grad
    _, model, train, *_ = load_data_and_model(run.folder)
    rows = train.splits["test"].inter_feat[slice(0, 4)]
    torch.testing.assert_close(model.full_sort_predict(rows), run.model.full_sort_predict(rows))
    assert stock.train_or_load(configure("UniSRec", pretrain_epochs=1, learning_rate=0.1), run.splits, "causal").loaded


@pytest.mark.parametrize("name, trained", [("ZESRec", "projection"), ("CTRL", "weight")])
def test_zesrec_knows_texts_alone_and_ctrl_starts_from_them(build, configure, name, trained):
    model, _ = build(name)
    names = {name for name, _ in model.item_embedding.named_parameters()}
    assert names == ({"weight"} if name == "CTRL" else {"own", "projection.weight", "projection.bias"})
    if name == "CTRL":
        items = model.item_embedding.weight.detach()[1:]
        assert torch.allclose((items - items.mean(dim=0)).std(dim=0), items.std(), rtol=0.05)  # whitened
    else:
        plain, _ = build("SASRec")
        shared = {n: v for n, v in plain.state_dict().items() if not n.startswith("item_embedding")}
        assert shared.keys() <= model.state_dict().keys()
    config = configure(name)
    run = stock.train_or_load(config, SharedData().splits(config), "causal")
    _, loaded, *_ = load_data_and_model(run.folder)
    assert torch.equal(loaded.item_embedding.weight, run.model.item_embedding.weight)


def test_they_are_nothing_without_vectors(configure):
    for name in ("ZESRec", "UniSRec", "CTRL"):
        with pytest.raises(UserError, match=f"{name} is made of them"):
            preflight.check([configure(name, item_vectors=None)], SharedData())
