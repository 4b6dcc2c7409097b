"""The loss of a residual-quantized auto-encoder (TIGER, Rajput et al. 2023)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def quantization_loss(residuals: Tensor, codes: Tensor, commitment_weight: float) -> Tensor:
    r"""Codes towards the residuals that they stand for, and residuals towards their codes.

    .. math::
        L_{rqvae} = \sum_d ||sg[r_d] - e_{c_d}||^2 + \beta ||r_d - sg[e_{c_d}]||^2

    sg stops the gradient. Squares are summed over dimensions and levels, and averaged over rows.

    Args:
        residuals: r, ``[B, levels, d]``.
        codes: e, the code vectors chosen for them, ``[B, levels, d]``.
        commitment_weight: beta.

    Returns:
        scalar.

    References:
        Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023, section 3.1.
    """
    rows = len(residuals)
    of_codes = functional.mse_loss(codes, residuals.detach(), reduction="sum")
    of_residuals = functional.mse_loss(residuals, codes.detach(), reduction="sum")
    return (of_codes + commitment_weight * of_residuals) / rows
