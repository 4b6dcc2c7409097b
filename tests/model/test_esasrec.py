"""eSASRec: its layers and loss against the published formulas, and its place among the stock models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from recbole.quick_start import run_recbole
from recbole.utils import get_model, init_seed

from recbole_llm import cli
from recbole_llm.config.settings import make_config
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.model.esasrec import ESASRecSettings, LiGRLayer
from recbole_llm.recommend import load
from recbole_llm.registry import is_ours, stock_models
from recbole_llm.teacher.stock import all_positions, all_positions_loss

SIZES = {"hidden_size": 8, "inner_size": 12, "n_layers": 2, "n_heads": 2}


@pytest.fixture
def make(chain_data, tmp_path):
    """A function (**settings) -> the model, in evaluation mode, and its splits."""

    def build(**settings):
        given = {"data_path": str(chain_data), "checkpoint_dir": str(tmp_path), "protocol": "retrieval", "use_gpu": False}
        config = make_config("eSASRec", "chain", config_dict={**given, **SIZES, **settings})
        splits = SharedData().splits(config)
        init_seed(1, True)
        return get_model("eSASRec")(config, splits["train"]).eval(), splits

    return build


def reference_attention(layer, states, seen):
    """Softmax attention with PyTorch's packed weights, head by head; ``seen`` bool ``[B, L, L]``."""
    heads, width = layer.attention.num_heads, layer.attention.head_dim
    query, key, value = (states @ layer.attention.in_proj_weight.T + layer.attention.in_proj_bias).chunk(3, dim=-1)
    results = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        results.append(scores.masked_fill(~seen, -1e30).softmax(-1) @ value[..., part])
    return torch.cat(results, -1) @ layer.attention.out_proj.weight.T + layer.attention.out_proj.bias


def reference_layer(layer, states, seen):
    """LiGR: pre-norm, the residual gated by a sigmoid of the layer's own input, SwiGLU without biases."""
    attended = reference_attention(layer, layer.attention_norm(states), seen)
    states = states + torch.sigmoid(layer.attention_gate(states)) * attended
    normed = layer.feed_forward_norm(states)
    gate = normed @ layer.gate.weight.T
    fed = (gate * torch.sigmoid(gate) * (normed @ layer.up.weight.T)) @ layer.down.weight.T
    return states + torch.sigmoid(layer.feed_forward_gate(states)) * fed


def test_a_layer_is_the_published_one():
    torch.manual_seed(0)
    settings = ESASRecSettings(8, 12, 1, 2, 0.5, 0.5, "from_end", 4)
    layer, states = LiGRLayer(settings).eval(), torch.randn(3, 5, 8)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(states, hidden), reference_layer(layer, states, ~hidden.expand(3, 5, 5)))
    names = dict(layer.named_parameters())
    assert names["gate.weight"].shape == (12, 8) and "gate.bias" not in names and "attention_gate.bias" in names


def test_states_are_those_of_left_padded_sequences_with_places_from_the_end(make):
    """The public code pads on the left, masks the padding, and counts places backwards over the whole width."""
    model, _ = make()
    history, width = torch.tensor([[5, 3, 9, 2]]), model.max_seq_length
    left = torch.zeros(1, width, dtype=torch.long)
    left[:, -4:] = history
    states = model.item_embedding(left) + model.position_embedding(torch.arange(width - 1, -1, -1))
    real = torch.zeros(1, width, dtype=torch.bool)
    real[:, -4:] = True
    seen = (torch.ones(width, width, dtype=torch.bool).tril() & real[:, None]) | torch.eye(width, dtype=torch.bool)
    for layer in model.layers:
        states = reference_layer(layer, states, seen)
    right = torch.zeros(1, 10, dtype=torch.long)
    right[:, :4] = history
    torch.testing.assert_close(model.forward(right, torch.tensor([4])), states[:, -1], rtol=1e-4, atol=1e-5)
    with all_positions(model):
        torch.testing.assert_close(model.forward(right, torch.tensor([4]))[:, :4], states[:, -4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["from_end", "from_start"])
def test_no_position_sees_a_later_item(make, positions):
    model, _ = make(positions=positions)
    history = torch.tensor([[5, 3, 9, 2, 7]])
    other = history.clone()
    other[:, 3:] = torch.tensor([1, 4])
    with all_positions(model):
        states = [model.forward(items, torch.tensor([5]))[0] for items in (history, other)]
    torch.testing.assert_close(states[0][:3], states[1][:3])
    assert (states[0][3] - states[1][3]).abs().max() > 1e-3
    behind = torch.cat([history, torch.tensor([[8, 8]])], dim=1)  # not of the history: its length says so
    torch.testing.assert_close(model.forward(behind, torch.tensor([5]))[0], states[0][4])


def test_places_from_the_start_are_the_same_for_a_prefix(make):
    model, _ = make(positions="from_start")
    assert model.is_prefix_stable and not make()[0].is_prefix_stable
    history = torch.tensor([[5, 3, 9, 2, 7]])
    with all_positions(model):
        states = model.forward(history, torch.tensor([5]))[0]
    torch.testing.assert_close(model.forward(history[:, :3], torch.tensor([3]))[0], states[2])


def test_the_loss_by_hand(make, monkeypatch):
    """-log(e^s+ / (e^s+ + sum of e^s-)): negatives uniform, each position its own, uncorrected, the target not left out."""
    model, _ = make(n_negatives=2)
    asked = {}

    def draw(low, high, size, device=None):
        asked.update(low=low, high=high, size=size)
        return torch.tensor([[4, 4], [2, 7]])

    monkeypatch.setattr(torch, "randint", draw)
    with torch.no_grad():
        model.item_embedding.weight[:] = 0
        model.item_embedding.weight[:, 0] = torch.arange(model.n_items).float()
    states = torch.zeros(2, 8)
    states[0, 0], states[1, 0] = 1.0, 0.5
    # Scores of row 0: target 3, negatives 4, 4. Of row 1: target 2 / 2 = 1, negatives 1 (the target itself) and 3.5.
    by_hand = (math.log(1 + 2 * math.e) + math.log(math.e + math.e + math.exp(3.5)) - 1) / 2
    assert model.next_item_loss(states, torch.tensor([3, 2])).item() == pytest.approx(by_hand, rel=1e-6)
    assert asked == {"low": 1, "high": model.n_items, "size": (2, 2)}


def test_without_sampling_it_is_the_softmax_over_the_catalogue(make):
    model, _ = make(n_negatives=None)
    torch.manual_seed(0)
    states, targets = torch.randn(4, 8), torch.tensor([1, 5, model.n_items - 1, 2])
    scores = (states @ model.item_embedding.weight.T)[:, 1:]
    expected = (scores.logsumexp(1) - scores[torch.arange(4), targets - 1]).mean()
    torch.testing.assert_close(model.next_item_loss(states, targets), expected)


def test_every_position_of_a_window_is_a_target(make):
    model, splits = make(n_negatives=None, positions="from_start")
    rows = splits["train"].inter_feat
    last = int((rows["user_id"] == rows["user_id"][0]).nonzero()[-1])
    length = int(rows["item_length"][last])
    window = torch.cat([rows["item_id_list"][last, :length], rows["item_id"][[last]]])[None]
    losses = model.calculate_loss(rows[torch.arange(last + 1)])
    torch.testing.assert_close(all_positions_loss(model, window), losses)


def test_heads_must_divide_the_width(make):
    with pytest.raises(UserError, match="n_heads: 3 heads do not divide hidden_size 8"):
        make(n_heads=3)


def test_it_is_a_stock_model_with_keys_of_its_own(chain_data):
    assert "eSASRec" in stock_models() and not is_ours("eSASRec")
    config = make_config("eSASRec", "chain", config_dict={"data_path": str(chain_data), "protocol": "full", "n_layers": 3})
    assert (config["n_layers"], config["n_negatives"], config["epochs"]) == (3, 256, 200)
    assert config["train_neg_sample_args"]["distribution"] == "none" and config["eval_args"]["mode"]["test"] == "full"
    with pytest.raises(UserError, match="positions must be one of from_end, from_start"):
        make_config("eSASRec", "chain", config_dict={"data_path": str(chain_data), "protocol": "full", "positions": "no"})


@pytest.fixture
def comparison(chain_data, tmp_path):
    """A function (models, **settings) that runs a small comparison and returns its results."""

    def run(models, **settings):
        given = {
            "model": models, "dataset": "chain", "data_path": chain_data, "checkpoint_dir": tmp_path / "saved",
            "SASRec.epochs": 1, "eSASRec.epochs": 1, "SASRec.hidden_size": 8, "SASRec.inner_size": 12, "SASRec.n_layers": 1,
            **{f"eSASRec.{key}": value for key, value in SIZES.items()}, "use_gpu": False, "show_progress": False,
            "topk": "[1,5]", "valid_metric": "Hit@5", "eval_args": "{mode: uni9}", "results_file": tmp_path / "results.json",
            **settings,
        }  # fmt: skip
        assert cli.main(["run", *(f"--{key}={value}" for key, value in given.items())]) == 0
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_it_stands_in_a_table_beside_sasrec_and_is_kept(comparison, tmp_path):
    first = comparison("SASRec,eSASRec")
    text = json.dumps(first)
    assert "eSASRec" in text and "SASRec" in text
    folder = next(path for path in (tmp_path / "saved").iterdir() if path.name.startswith("eSASRec"))
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    comparison("SASRec,eSASRec")
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights, "it is found, not trained anew"
    (found,) = load(folder).recommend(users=load(folder).dataset.field2id_token["user_id"][3], topk=3)
    assert len(found) == 3 and np.isfinite([item.score for item in found]).all()


@pytest.mark.parametrize("positions", ["from_end", "from_start"])
def test_it_teaches(make_model, positions):
    """Its user representations of a window's positions are those of the single histories, however places are counted."""
    given = {**SIZES, "epochs": 1, "positions": positions}
    _, model, _ = make_model("LLMSRec", teacher="eSASRec", teacher_settings=given)
    assert model.teacher.name == "eSASRec" and model.teacher.size == 8
    rows = model._dataset.splits["train"].inter_feat[torch.arange(3)]  # one user's, each an item longer than the one before
    expected = model.teacher.represent(rows)
    torch.testing.assert_close(model.teacher.represent_windows(rows, np.array([2, 2, 2])), expected, rtol=1e-4, atol=1e-5)


def test_recboles_own_entry_point_knows_it(chain_data):
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    settings = {
        "data_path": str(chain_data), "epochs": 1, "load_col": columns, "train_neg_sample_args": None, "topk": [5],
        "show_progress": False, "valid_metric": "MRR@5", "use_gpu": False, **SIZES,
    }  # fmt: skip
    found = run_recbole(model="eSASRec", dataset="chain", config_dict=settings, saved=False)
    assert 0 <= found["test_result"]["mrr@5"] <= 1
