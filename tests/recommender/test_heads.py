"""Heads that read standardized states."""

import pytest
import torch

from recbole_llm.recommender.heads import Standardize, standardized_projection


def nearly_constant(rows=64, size=12):
    """States as an LLM gives them: a large vector that all share, and small differences."""
    generator = torch.Generator().manual_seed(0)
    return 20 * torch.randn(size, generator=generator) + 0.03 * torch.randn(rows, size, generator=generator)


def test_states_are_centered_and_scaled_as_the_first_batch_has_them():
    layer, first = Standardize(2), torch.tensor([[9.0, 100.0], [11.0, 104.0]])
    assert torch.equal(layer.train()(first), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert torch.equal(layer(first + 1.0), torch.tensor([[0.0, -0.5], [2.0, 1.5]])), "later batches do not count"
    assert torch.equal(layer.eval()(first), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_before_the_training_states_pass_as_they_are():
    layer, states = Standardize(12).eval(), nearly_constant()
    assert torch.equal(layer(states), states) and not layer.scale.any()


def test_what_was_measured_is_kept_with_the_parameters_and_no_gradient_moves_it():
    layer, states = Standardize(12), nearly_constant().requires_grad_()
    expected = layer(states)
    expected.square().sum().backward()
    assert layer.center.grad is None and layer.scale.grad is None and states.grad.abs().sum() > 0
    again = Standardize(12)
    with torch.no_grad():
        for parameter, other in zip(again.parameters(), layer.parameters(), strict=True):
            parameter.copy_(other)
    torch.testing.assert_close(again.train()(states), expected)


def test_a_dimension_that_does_not_vary_does_not_outweigh_the_others():
    states = nearly_constant(rows=8)
    states[:, 3] = 5.0
    found = Standardize(12)(states)
    assert torch.isfinite(found).all() and found[:, 3].abs().max() == 0 and found.abs().max() < 4
    alone = Standardize(12)(states[:1])
    assert torch.isfinite(alone).all()


@pytest.mark.parametrize("size", [16, 128])
def test_scores_begin_with_a_deviation_of_about_1(size):
    torch.manual_seed(0)
    users, items = (standardized_projection(48, 256, size)(nearly_constant(200, 48)) for _ in range(2))
    assert 0.3 < (users @ items.T).std() < 3
