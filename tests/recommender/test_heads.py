"""Heads that read standardized states."""

import pytest
import torch

from recbole_llm.recommender.heads import Standardize, standardized_projection


def nearly_constant(rows=64, size=12, seed=0):
    """States as an LLM gives them: a large vector that all share, and small differences."""
    generator = torch.Generator().manual_seed(seed)
    return 20 * torch.randn(size, generator=generator) + 0.03 * torch.randn(rows, size, generator=generator)


def test_states_are_centered_and_scaled_as_each_batch_has_them():
    layer, first = Standardize(2, "each"), torch.tensor([[9.0, 100.0], [11.0, 104.0]])
    standard = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    torch.testing.assert_close(layer.train()(first), standard)
    torch.testing.assert_close(layer.eval()(first), standard)
    torch.testing.assert_close(layer.train()(3 * first + 7), standard)


def test_or_as_the_first_batch_has_them():
    layer, first = Standardize(2), torch.tensor([[9.0, 100.0], [11.0, 104.0]])
    torch.testing.assert_close(layer.train()(first), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    torch.testing.assert_close(layer(first + 1.0), torch.tensor([[0.0, -0.5], [2.0, 1.5]]), msg="later batches do not count")
    torch.testing.assert_close(layer.eval()(first), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_afterwards_moving_averages_hold():
    """Centers 10 and 20, deviations 1 and 5: the newer counts for 3 in 10."""
    layer = Standardize(1, "each")
    for batch in ([[9.0], [11.0]], [[15.0], [25.0]]):
        layer.train()(torch.tensor(batch))
    layer.eval()
    torch.testing.assert_close(layer(torch.tensor([[13.0], [15.2]])), torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(layer.train()(torch.tensor([[15.2]])), torch.tensor([[1.0]]), msg="of one row")
    torch.testing.assert_close(layer.center, torch.tensor([13.0]))


def test_before_the_training_states_pass_as_they_are():
    layer, states = Standardize(12).eval(), nearly_constant()
    assert torch.equal(layer(states), states) and not layer.scale.any()


def test_a_common_move_of_the_states_is_neither_seen_nor_asked_for():
    layer, states = Standardize(12, "each"), nearly_constant().requires_grad_()
    (layer(states) * torch.randn(64, 12)).sum().backward()
    assert states.grad.abs().max() > 1e-3
    torch.testing.assert_close(states.grad.sum(dim=0), torch.zeros(12), rtol=0, atol=1e-3 * states.grad.abs().max().item() * 64)


def test_what_was_measured_is_kept_with_the_parameters_and_no_gradient_moves_it():
    layer, states = Standardize(12, "each"), nearly_constant()
    layer(states).square().sum()
    layer(states.requires_grad_()).square().sum().backward()
    assert layer.center.grad is None and layer.scale.grad is None
    again = Standardize(12, "each")
    with torch.no_grad():
        for parameter, other in zip(again.parameters(), layer.parameters(), strict=True):
            parameter.copy_(other)
    torch.testing.assert_close(again.eval()(states), layer.eval()(states))
    more = nearly_constant(seed=1)
    torch.testing.assert_close(again.train()(more), layer.train()(more))
    torch.testing.assert_close(again.center, layer.center, msg="a resumed training goes on with the averages")


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
