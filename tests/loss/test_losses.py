"""Losses against values computed by hand."""

import math

import pytest
import torch

from recbole_llm.loss.distillation import distillation_loss
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.sequence_anchor import sequence_anchor_loss, teacher_confidence
from recbole_llm.loss.uniformity import uniformity_loss


def test_retrieval_is_the_mean_negative_log_probability_of_column_0():
    scores = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # softmax puts 3/4 and 1/2 on the targets
    assert retrieval_loss(scores).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)


def test_retrieval_sees_column_0_as_the_target():
    better = retrieval_loss(torch.tensor([[5.0, 0.0, 0.0]]))
    worse = retrieval_loss(torch.tensor([[0.0, 5.0, 0.0]]))
    assert better < worse


def test_distillation_mse_is_over_unit_vectors():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 5.0], [0.0, 7.0]])
    # first row: |(1,0)-(0,1)|^2 = 2, second row equal directions: 0
    assert distillation_loss(student, teacher, reduction="sum").item() == pytest.approx(1.0)
    assert distillation_loss(student, teacher, reduction="mean").item() == pytest.approx(0.5)


def test_distillation_infonce():
    student, teacher = torch.eye(2), torch.eye(2)
    expected = -math.log(math.exp(2.0) / (math.exp(2.0) + 1.0))
    assert distillation_loss(student, teacher, kind="infonce", temperature=0.5).item() == pytest.approx(expected)


def test_uniformity_of_two_users():
    # unit vectors at right angles: squared distance 2, the pair's potential exp(-4)
    assert uniformity_loss(torch.tensor([[2.0, 0.0], [0.0, 9.0]])).item() == pytest.approx(math.exp(-4.0))
    assert uniformity_loss(torch.tensor([[1.0, 1.0], [2.0, 2.0]])).item() == pytest.approx(1.0)


def test_uniformity_of_one_user_is_zero_with_gradient():
    lonely = torch.ones(1, 3, requires_grad=True)
    loss = uniformity_loss(lonely)
    loss.backward()
    assert loss.item() == 0.0 and lonely.grad.abs().sum() == 0


def test_sequence_anchor_by_hand_with_ragged_negatives():
    user = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    positive = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    negatives = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, -1.0]])
    parents = torch.tensor([0, 1, 0])
    # user 0: cosine 1 to the anchor, 0 and 0 to its negatives; user 1: 0 and 1; user 2 has no negative
    first = -math.log(math.e / (math.e + 2.0))
    second = -math.log(1.0 / (1.0 + math.e))
    assert sequence_anchor_loss(user, positive, negatives, parents).item() == pytest.approx((first + second) / 3)
    weighted = sequence_anchor_loss(user, positive, negatives, parents, torch.tensor([0.5, 0.0, 1.0]))
    assert weighted.item() == pytest.approx(0.5 * first / 3)


def test_sequence_anchor_dot_and_temperature():
    user, positive = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    negatives, parents = torch.tensor([[3.0, 0.0]]), torch.tensor([0])
    loss = sequence_anchor_loss(user, positive, negatives, parents, kind="dot", temperature=2.0)
    assert loss.item() == pytest.approx(-math.log(math.exp(1.0) / (math.exp(1.0) + math.exp(3.0))))


def test_sequence_anchor_without_any_negative_is_zero():
    user = torch.ones(2, 3, requires_grad=True)
    none = torch.zeros(0, 3)
    loss = sequence_anchor_loss(user, torch.ones(2, 3), none, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.6, 0.0]),
        ("shifted", [0.8, 0.0]),
        ("raw", [3.0, -4.0]),
        ("none", [1.0, 1.0]),
        ("probability", [1 / (1 + math.exp(-3.0)), 1 / (1 + math.exp(4.0))]),
    ],
)
def test_teacher_confidence(kind, expected):
    user = torch.tensor([[5.0, 0.0], [2.0, 0.0]])
    target = torch.tensor([[0.6, 0.8], [-2.0, 0.0]])
    candidates = torch.stack([target, torch.tensor([[0.0, 1.0], [0.0, 3.0]])], dim=1)
    assert teacher_confidence(user, candidates, kind).tolist() == pytest.approx(expected, abs=1e-6)


def test_in_batch_by_hand():
    from recbole_llm.loss.in_batch import in_batch_loss

    # Candidates a, b, c, which are there with probabilities 1/2, 1/4 and 1. Row 0: target a, b is left out: e^s / c is
    # 3 / (1/2) = 6 for a and 2 for c. Row 1: target c, itself among what is known: 4 for a, 4 for b, 2 for c.
    scores = torch.log(torch.tensor([[3.0, 99.0, 2.0], [2.0, 1.0, 2.0]]))
    left_out = torch.tensor([[True, True, False], [False, False, True]])
    log_counts = torch.log(torch.tensor([0.5, 0.25, 1.0]))
    loss = in_batch_loss(scores, torch.tensor([0, 2]), left_out, log_counts)
    assert loss.item() == pytest.approx(-(math.log(6 / 8) + math.log(2 / 10)) / 2)
    assert in_batch_loss(scores[:1], torch.tensor([0]), torch.ones(1, 3, dtype=torch.bool), log_counts).item() == 0.0


def test_confidence_leaves_out_candidates():
    user, candidates = torch.ones(1, 1), torch.log(torch.tensor([[[3.0], [1.0], [50.0]]]))
    left_out = torch.tensor([[False, False, True]])
    assert teacher_confidence(user, candidates, "probability", left_out).item() == pytest.approx(3 / 4)


def test_soft_targets_by_hand():
    """Teacher: 3/4 and 1/4; student: 1/2 each, so that each item costs log 2. The third item is no candidate."""
    from recbole_llm.loss.soft_targets import soft_target_loss

    teacher = torch.tensor([[math.log(3.0), 0.0, -math.inf]])
    scores = torch.tensor([[1.0, 1.0, -math.inf]], requires_grad=True)
    loss = soft_target_loss(scores, teacher)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert scores.grad.tolist() == [pytest.approx([0.5 - 0.75, 0.5 - 0.25, 0.0])], "student's share less teacher's"
