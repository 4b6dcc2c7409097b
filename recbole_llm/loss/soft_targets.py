"""A teacher's distribution over the candidates as the target (Hinton et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_target_loss(scores: Tensor, teacher_scores: Tensor) -> Tensor:
    r"""Cross-entropy of the student's distribution over the candidates under the teacher's.

    .. math::
        L = - \frac{1}{B} \sum_b \sum_j p_b(j) \log q_b(j),
            \qquad p_b = \mathrm{softmax}(t_b), \quad q_b = \mathrm{softmax}(s_b)

    The KL divergence of both, but for the entropy of p, which no gradient moves. Also known as knowledge distillation with a
    temperature of 1.

    Args:
        scores: s, ``[B, C]``; -inf where a candidate does not count.
        teacher_scores: t, ``[B, C]``; -inf in the same places.

    Returns:
        scalar.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_shares = torch.log_softmax(scores, dim=1)
    shares = torch.softmax(teacher_scores, dim=1)
    return -(shares * log_shares.where(shares > 0, 0.0)).sum(dim=1).mean()
