"""The loss of the RQ-VAE, by hand."""

import pytest
import torch

from recbole_llm.loss.quantization import quantization_loss


def test_by_hand():
    residuals = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], requires_grad=True)
    codes = torch.tensor([[[0.0, 2.0], [3.0, 1.0]]], requires_grad=True)
    loss = quantization_loss(residuals, codes, commitment_weight=0.25)
    assert loss.item() == pytest.approx(1.25 * (1 + 9))
    loss.backward()
    torch.testing.assert_close(codes.grad, 2 * (codes - residuals).detach())  # codes move towards residuals,
    torch.testing.assert_close(residuals.grad, 0.5 * (residuals - codes).detach())  # and these a quarter as fast to them
