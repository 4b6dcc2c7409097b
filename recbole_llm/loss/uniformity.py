"""Uniformity on the unit sphere, against over-smoothing (LLM-SRec, Kim et al. 2025, equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def uniformity_loss(representations: Tensor) -> Tensor:
    r"""Mean Gaussian potential between the representations of different users.

    .. math::
        L_{uniform} = \frac{1}{B (B - 1)} \sum_{u \ne v} e^{-2 \| \hat x_u - \hat x_v \|^2}

    It is 1 where all users look the same and falls as they spread. Pairs of a user with itself are left out, as in the
    public code (in the paper's formula they add a constant).

    Args:
        representations: ``[B, d']``; normalised here.

    Returns:
        scalar; 0 for a batch of one user, which has no pair.

    References:
        Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", 2020 (there the logarithm is taken as well).
    """
    if len(representations) < 2:
        return representations.sum() * 0.0
    unit = functional.normalize(representations, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return torch.exp(-2.0 * (unit[first] - unit[second]).square().sum(dim=-1)).mean()
