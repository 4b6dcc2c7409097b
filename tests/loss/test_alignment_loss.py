"""The losses of A-LLMRec's stage 1 against values computed by hand."""

import math

import pytest
import torch

from recbole_llm.loss.alignment import (
    AlignmentLosses,
    alignment_loss,
    matching_loss,
    recommendation_loss,
    reconstruction_loss,
)

# Two users, columns next item and negative, two dimensions.
ITEM = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]]])
OTHER = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])


def softplus(value: float) -> float:
    return math.log(1.0 + math.exp(value))


def test_matching_is_the_mean_of_each_column_summed():
    # column 0: (1 + 0 + 0 + 4) / 4, column 1: (0 + 4 + 0 + 0) / 4
    assert matching_loss(ITEM, OTHER).item() == pytest.approx(1.25 + 1.0)


def test_matching_moves_both_sides():
    item, text = ITEM.clone().requires_grad_(), OTHER.clone().requires_grad_()
    matching_loss(item, text).backward()
    # d/de of the mean over 2 users x 2 dimensions: (e - q) / 2
    assert torch.allclose(item.grad, (ITEM - OTHER) / 2)
    assert torch.allclose(text.grad, (OTHER - ITEM) / 2)


def test_reconstruction_is_the_same_distance_but_does_not_move_its_target():
    reconstructed, original = OTHER.clone().requires_grad_(), ITEM.clone().requires_grad_()
    loss = reconstruction_loss(reconstructed, original)
    loss.backward()
    assert loss.item() == pytest.approx(2.25)
    assert reconstructed.grad.abs().sum() > 0 and original.grad is None


@pytest.mark.parametrize(("score", "divisor"), [("dot", 1.0), ("mean", 2.0)])
def test_recommendation_is_a_cross_entropy_by_column(score, divisor):
    user = torch.tensor([[2.0, 1.0], [3.0, -1.0]])
    # dot products: next items 2 and 0, negatives 2 and 2
    positive = softplus(-2.0 / divisor) + softplus(0.0)
    negative = softplus(2.0 / divisor) + softplus(2.0 / divisor)
    assert recommendation_loss(user, ITEM, score).item() == pytest.approx((positive + negative) / 2)


def test_recommendation_takes_column_0_as_the_next_item():
    user = torch.tensor([[5.0, 0.0]])
    good = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert recommendation_loss(user, good) < recommendation_loss(user, good.flip(1))


def test_recommendation_with_more_negatives_adds_each():
    user, items = torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.0, -1.0]]])
    expected = softplus(-1.0) + softplus(3.0) + softplus(-1.0)
    assert recommendation_loss(user, items, "dot").item() == pytest.approx(expected)


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match="score must be mean or dot, not 'cosine'"):
        recommendation_loss(torch.ones(1, 2), ITEM[:1], "cosine")


def parts(**settings) -> AlignmentLosses:
    return alignment_loss(
        user=torch.tensor([[2.0, 1.0], [3.0, -1.0]]),
        item=ITEM,
        item_latent=ITEM,
        item_reconstructed=OTHER,
        text=OTHER[:, :, :1],
        text_latent=OTHER,
        text_reconstructed=ITEM[:, :, :1],
        **settings,
    )


def test_the_whole_has_the_paper_s_weights():
    losses = parts()
    assert losses.matching.item() == pytest.approx(2.25)
    assert losses.item_reconstruction.item() == pytest.approx(0.5 * 2.25)
    # one dimension: column 0 (1 + 0) / 2, column 1 (0 + 0) / 2
    assert losses.text_reconstruction.item() == pytest.approx(0.2 * 0.5)
    # reconstructed: user 0 scores 0 and 0; user 1 -2 / 2 and (3 - 1) / 2
    recommendation = (2 * softplus(0.0) + softplus(1.0) + softplus(1.0)) / 2
    assert losses.recommendation.item() == pytest.approx(recommendation)
    assert sum(losses).item() == pytest.approx(2.25 + 1.125 + 0.1 + recommendation)


def test_weights_are_arguments():
    weighted = parts(
        matching_weight=2.0, item_reconstruction_weight=1.0, text_reconstruction_weight=0.0, recommendation_weight=3.0
    )
    factors = [2.0, 2.0, 0.0, 3.0]
    assert [loss.item() for loss in weighted] == pytest.approx(
        [factor * loss.item() for factor, loss in zip(factors, parts(), strict=True)]
    )
