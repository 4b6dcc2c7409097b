"""Next item retrieval loss (LLM-SRec, Kim et al. 2025, equation 1; LLM-STAR equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def retrieval_loss(scores: Tensor) -> Tensor:
    r"""Negative log-probability of the target among its candidates.

    .. math::
        L_{retrieval} = - \frac{1}{B} \sum_u \log \frac{e^{s(u, i_u)}}{\sum_{k \in C_u} e^{s(u, k)}}

    Also known as sampled softmax cross-entropy; with in-batch candidates it would be InfoNCE.

    Args:
        scores: ``[B, C]``, the target's score in column 0, its negatives' behind.

    Returns:
        scalar.

    References:
        Kim et al., "Lost in Sequence: Do Large Language Models Understand Sequential Recommendation?", equation 1.
    """
    return functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
