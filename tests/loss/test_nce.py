"""HLLM's loss, by hand and against the public code's steps."""

import math

import pytest
import torch
from torch.nn import functional

from recbole_llm.loss.nce import nce_loss


def test_by_hand():
    states = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosines 1 and .8
    negatives = torch.tensor([[0.0, 5.0], [4.0, 3.0]])  # with row 0: 0, .8; with row 1: 1, .6
    first = -math.log(math.exp(2.0) / (math.exp(2.0) + math.exp(0.0) + math.exp(1.6)))
    second = -math.log(math.exp(1.6) / (math.exp(1.6) + math.exp(2.0) + math.exp(1.2)))
    loss = nce_loss(states, targets, negatives, torch.tensor(math.log(2.0)), torch.zeros(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_a_negative_that_is_the_target_is_left_out_there_alone():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    negatives = torch.tensor([[7.0, 0.0], [1.0, 1.0]])  # the first is the first row's target
    left_out = torch.tensor([[True, False], [False, False]])
    loss = nce_loss(targets, targets, negatives, torch.tensor(0.0), left_out)
    root = math.sqrt(0.5)
    first = math.log(math.e + math.exp(root)) - 1
    second = math.log(math.e + math.exp(0.0) + math.exp(root)) - 1
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_value_and_gradients_are_those_of_the_public_steps():
    """Normalize, product, mask by the smallest number, scale, cross-entropy at column 0, as the public code goes."""
    torch.manual_seed(0)
    states, targets, negatives = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 5, 7))
    scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    inputs = (states, targets, negatives, scale)
    unit, to, away = (vectors / vectors.norm(dim=-1, keepdim=True) for vectors in (states, targets, negatives))
    others = unit @ away.T
    same = (to @ away.T) > 0.3
    assert same.any() and not same.all()
    ours = torch.autograd.grad(nce_loss(*inputs, same), inputs)
    others = torch.where(same, torch.finfo(others.dtype).min, others)
    logits = torch.cat([functional.cosine_similarity(unit, to, dim=-1)[:, None], others], dim=-1) * scale.exp()
    loss = functional.cross_entropy(logits.clamp_min(torch.finfo(logits.dtype).min / 2), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(nce_loss(*inputs, same), loss)
    for found, expected in zip(ours, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(found, expected)
