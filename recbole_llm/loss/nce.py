"""Noise-contrastive loss by cosine with a learned temperature (HLLM, Chen et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def nce_loss(states: Tensor, targets: Tensor, negatives: Tensor, log_scale: Tensor, left_out: Tensor) -> Tensor:
    r"""Negative log-probability of each position's target among the negatives that all positions share.

    .. math::
        L = - \frac{1}{P} \sum_p \log \frac{e^{\tau \cos(h_p, t_p)}}
            {e^{\tau \cos(h_p, t_p)} + \sum_{j \in S_p} e^{\tau \cos(h_p, n_j)}}

    S_p are the negatives that are not the position's target itself. Also known as InfoNCE.

    Args:
        states: h, ``[P, d]``.
        targets: t, ``[P, d]``.
        negatives: n, ``[K, d]``.
        log_scale: log of the inverse temperature tau, a scalar.
        left_out: which negatives are not in S_p, bool ``[P, K]``.

    Returns:
        scalar.

    References:
        Chen et al., "HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models for Item and User
        Modeling", 2024, equation 1.
    """
    states, targets, negatives = (functional.normalize(vectors, dim=-1) for vectors in (states, targets, negatives))
    scale = log_scale.exp()
    own = scale * (states * targets).sum(dim=-1, keepdim=True)
    others = (scale * (states @ negatives.T)).masked_fill(left_out, float("-inf"))
    logits = torch.cat([own, others], dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
