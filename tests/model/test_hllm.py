"""HLLM: its two LLMs, its loss against single forward passes, and what each part sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError

SMALL = {"n_negatives": 6, "history_length": 4, "protocol": "retrieval"}


@pytest.fixture
def make(make_model):
    return lambda **settings: make_model("HLLM", **{**SMALL, **settings})[1].eval()


def plain_vector(model, item):
    """The item LLM's last state at [ITEM], of one prompt alone."""
    llm = model.backbone
    ids = encode_text(llm.tokenizer, ["Compress the following sentence into embedding:", " " + model._dataset.item_texts[item]])
    inputs = torch.cat([llm.embedding(torch.tensor([*llm.prefix_ids, *ids[0], *ids[1]])), model.item_token])
    return llm.causal_lm.get_decoder()(inputs_embeds=inputs[None]).last_hidden_state[0, -1]


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_loss_is_that_of_single_passes(make, threshold):
    """Every item and every prefix by itself: no word embedding in the user LLM, the next item's vector at each position."""
    model = make(same_item_cosine=threshold)
    rows = model._dataset.inter_feat[torch.arange(3)]
    model.seed_step(2)
    (loss,) = model.calculate_loss(rows)
    model.seed_step(2)
    drawn = model.draw_negatives()
    negatives = [plain_vector(model, item) for item in drawn]
    assert len(negatives) == 6
    losses = []
    for row in range(3):
        length = int(rows["item_length"][row])
        items = [*rows["item_id_list"][row, :length].tolist(), int(rows["item_id"][row])][-5:]
        vectors = [plain_vector(model, item) for item in items]

        def near(end, other, vectors=vectors):
            return threshold is not None and functional.cosine_similarity(vectors[end], other, dim=0) > threshold

        for end in range(1, len(items)):
            state = model.user_backbone.causal_lm.get_decoder()(inputs_embeds=torch.stack(vectors[:end])[None])
            state, cosine = state.last_hidden_state[0, -1], functional.cosine_similarity
            kept = [other for item, other in zip(drawn, negatives, strict=True) if item != items[end] and not near(end, other)]
            scores = torch.stack([cosine(state, vector, dim=0) for vector in [vectors[end], *kept]]) / 0.07
            losses.append(scores.logsumexp(0) - scores[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_scores_are_cosines_of_the_last_state_and_the_items_vectors(make):
    model = make()
    rows = model._dataset.splits["test"].inter_feat[torch.arange(2)]
    scores = model.score(rows, torch.tensor([[3, 8], [5, 1]]))
    for row, items in enumerate(([3, 8], [5, 1])):
        length = int(rows["item_length"][row])
        history = rows["item_id_list"][row, :length].tolist()[-4:]
        vectors = torch.stack([plain_vector(model, item) for item in history])
        state = model.user_backbone.causal_lm.get_decoder()(inputs_embeds=vectors[None]).last_hidden_state[0, -1]
        expected = [functional.cosine_similarity(state, plain_vector(model, item), dim=0) for item in items]
        torch.testing.assert_close(scores[row], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_item(make):
    model = make()
    torch.manual_seed(0)
    vectors = torch.randn(2, 5, model.backbone.hidden_size)
    other = vectors.clone()
    other[:, 3:] = torch.randn(2, 2, model.backbone.hidden_size)
    states, changed = model.history_states(vectors), model.history_states(other)
    torch.testing.assert_close(states[:, :3], changed[:, :3])
    assert (states[:, 3:] - changed[:, 3:]).abs().max() > 1e-3


def test_the_two_llms_are_trained_apart_and_the_user_llm_reads_no_words(make):
    model = make(user_backbone_layers=1)
    names = model.trained_parameters()
    assert model.backbone.layers == 2 and model.user_backbone.layers == 1
    assert list(model.backbones) == ["backbone", "user_backbone"]
    assert not [name for name in names if name.startswith("user_backbone") and "embed" in name]
    assert [name for name in names if name.startswith("encoder") and "embed" in name]
    assert not {id(part) for part in model.backbone.parameters()} & {id(part) for part in model.user_backbone.parameters()}
    assert model.log_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_lora_in_both(make):
    names = make(tuning="lora").trained_parameters()
    assert {name.split(".")[0] for name in names if "lora_" in name} == {"encoder", "user_backbone"}
    assert {name for name in names if "lora_" not in name} == {"item_token", "log_scale"}


def test_the_temperature_stays_in_its_bounds(make):
    model = make()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.calculate_loss(model._dataset.inter_feat[torch.arange(2)])
    assert model.log_scale.item() == pytest.approx(math.log(100))


def test_a_long_text_is_cut_before_the_out_token(make):
    model = make(max_item_tokens=38)
    batch = model.item_prompts(np.array([1, 2]))
    assert batch.lengths.max() == 39 and (batch.tokens[batch.offsets[1:] - 1] == -2).all()
    with pytest.raises(UserError, match="max_item_tokens: 2 leaves no room"):
        make(max_item_tokens=2)


def test_more_items_than_the_user_llm_has_positions(make):
    with pytest.raises(UserError, match="history_length: 1000000 items are more than"):
        make(history_length=1000000)
