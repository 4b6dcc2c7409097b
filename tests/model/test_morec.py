"""MoRec: its losses against the public code's formulas, what it trains, and what it reads."""

import math

import numpy as np
import pytest
import torch
from recbole.utils import get_trainer
from torch.nn import functional

from recbole_llm.errors import UserError
from recbole_llm.loss.in_batch import popularity_debiased_loss


@pytest.fixture
def make(make_model, text_encoder):
    settings = {"sentence_encoder": text_encoder, "hidden_size": 8, "n_layers": 1, "history_length": 6}
    return lambda **given: make_model("MoRec", **{**settings, **given})


def occurrence_loss(vectors, users, items, log_popularity):
    """The public code's loss: one column for each place of the batch, padding and the row's own items masked."""
    rows, width = items.shape
    losses = []
    columns = items.reshape(-1)
    for row in range(rows):
        for place in range(width - 1):
            if items[row, place] == 0:
                continue
            logits = users[row, place] @ vectors.reshape(rows * width, -1).T - log_popularity[columns]
            masked = np.isin(columns, items[row]) | (columns == 0)
            own = row * width + place + 1
            masked[own] = False
            logits = logits.masked_fill(torch.from_numpy(masked), -math.inf)
            losses.append(-logits.log_softmax(0)[own])
    return torch.stack(losses).mean()


def test_debiased_loss_by_hand():
    """Two candidates beside the target: one twice in the batch; the third is the user's own."""
    scores = torch.tensor([[1.0, 0.5, 2.0, 9.0]])
    popularity = torch.tensor([0.4, 0.3, 0.2, 0.1])
    left_out = torch.tensor([[True, False, False, True]])
    loss = popularity_debiased_loss(scores, torch.tensor([0]), left_out, popularity.log(), torch.tensor([3.0, 2.0, 1.0, 1.0]))
    target, others = math.e / 0.4, 2 * math.exp(0.5) / 0.3 + math.exp(2.0) / 0.2
    assert loss.item() == pytest.approx(-math.log(target / (target + others)), rel=1e-6)
    assert loss.item() == pytest.approx(2.0862, abs=1e-4)  # 6.796 of 54.732


@pytest.mark.parametrize("loss", ["in_batch", "bce"])
def test_loss_is_that_of_the_public_code(make, loss):
    _, model, _ = make(training_loss=loss)
    model.eval()  # without dropout
    rows = model._dataset.inter_feat[torch.arange(5)]
    items = model.latest_items(rows, with_target=True)
    assert items.shape[1] == 7 and (items == 0).any()
    for row in range(5):  # the row's latest items, oldest first, and its target
        sequence = [*rows["item_id_list"][row, : rows["item_length"][row]].tolist(), int(rows["item_id"][row])][-7:]
        assert items[row].tolist() == [0] * (7 - len(sequence)) + sequence
    vectors = torch.zeros(*items.shape, 8)
    for place in np.argwhere(items):
        vectors[tuple(place)] = model.represent_items(items[tuple(place)][None])[0]
    inside = torch.from_numpy(items[:, :-1] != 0)
    users = model.represent_positions(vectors[:, :-1], inside)
    if loss == "in_batch":
        expected = occurrence_loss(vectors, users, items, model.log_popularity)
    else:
        model.seed_step(3)
        negatives = model._negatives(items)
        assert not any(set(drawn) & set(row) for drawn, row in zip(negatives.tolist(), items.tolist(), strict=True))
        drawn = model.represent_items(negatives.reshape(-1)).reshape(5, 6, 8)
        liked, others = (users * vectors[:, 1:]).sum(-1)[inside], (users * drawn).sum(-1)[inside]
        expected = functional.binary_cross_entropy_with_logits(liked, torch.ones_like(liked))
        expected += functional.binary_cross_entropy_with_logits(others, torch.zeros_like(others))
    model.seed_step(3)
    torch.testing.assert_close(model.calculate_loss(rows)[0], expected, rtol=1e-4, atol=1e-5)


def test_popularity_is_that_of_the_training_data(make):
    """Targets of validation and test are not counted."""
    _, model, splits = make()
    rows = splits["train"].inter_feat
    counts = np.bincount(rows["item_id"].numpy(), minlength=model.n_items).astype(float)
    for user in rows["user_id"].unique().tolist():
        first = int((rows["user_id"] == user).nonzero()[0])
        counts[int(rows["item_id_list"][first, 0])] += 1
    np.testing.assert_allclose(model.log_popularity.exp().numpy(), counts / counts.sum(), rtol=1e-5)


def test_a_position_sees_itself_and_those_before_it(make):
    _, model, _ = make()
    model.eval()
    vectors, inside = torch.randn(1, 6, 8), torch.tensor([[False, True, True, True, True, True]])
    before = model.represent_positions(vectors, inside)
    for place in range(6):
        changed = vectors.clone()
        changed[0, place] = torch.randn(8)
        moved = (model.represent_positions(changed, inside) - before).abs().sum(dim=2)[0] > 1e-6
        assert moved[1:].tolist() == [place != 0 and other >= place for other in range(1, 6)]
    # A short history has the latest positions, whatever stands to its left.
    alone = model.represent_positions(vectors[:, 1:], inside[:, 1:])
    torch.testing.assert_close(alone, before[:, 1:])


def test_the_encoder_has_a_learning_rate_of_its_own(make):
    config, model, _ = make(learning_rate=1e-3, encoder_learning_rate=2e-4)
    trainer = get_trainer(config["MODEL_TYPE"], "MoRec")(config, model)
    of_encoder = {id(parameter) for parameter in model.encoder.parameters()}
    for group in trainer.optimizer.param_groups:
        assert {id(parameter) in of_encoder for parameter in group["params"]} == {group["factor"] == pytest.approx(0.2)}
    names = model.trained_parameters()
    assert any("attention" in name for name in names) and not any("pooler" in name for name in names)


def test_pooling_and_length_of_texts(make, text_encoder):
    _, model, _ = make(max_item_tokens=5)
    assert {len(ids) for ids in model.item_ids} <= {2, 3, 4, 5}
    _, mean, _ = make(max_item_tokens=5, text_pooling="mean")
    model.eval(), mean.eval()
    ids = torch.from_numpy(np.stack([model.item_ids[3]]))
    hidden = model.backbone.causal_lm(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(model.encoder([model.item_ids[3]])[0], hidden[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.encoder([model.item_ids[3], model.item_ids[0]])[0], hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_none_is_one_sentence(make):
    with pytest.raises(UserError, match="sentence_encoder: there is no folder no/such/folder"):
        make(sentence_encoder="no/such/folder")
