"""Next item retrieval among candidates that a batch shares, corrected for how they came there (Yi et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def in_batch_loss(scores: Tensor, targets: Tensor, left_out: Tensor, log_expected_counts: Tensor) -> Tensor:
    r"""Negative log-probability of each row's target among the candidates S of the whole batch.

    .. math::
        L = - \frac{1}{B} \sum_b \log \frac{e^{s_b(t_b)}}{e^{s_b(t_b)} + \sum_{j \in S, j \ne t_b, j \notin K_b} e^{s_b(j)}},
            \qquad s_b(j) = s(u_b, j) - \log c_j

    S holds the batch's targets, in which popular items are frequent, and items drawn at random; c_j is how likely item j is
    to be in it. Without the correction popular items, which are often candidates, would be pushed down for it. K_b is what
    the row's user is known to like: no candidate of that row.

    Also known as in-batch sampled softmax with logQ correction. Where each row has candidates of its own, drawn uniformly, it
    is :func:`recbole_llm.loss.retrieval.retrieval_loss`.

    Args:
        scores: s(u, j), ``[B, C]``.
        targets: column of each row's target, int64 ``[B]``.
        left_out: where an item is in K_b, bool ``[B, C]``; the target's column is not asked.
        log_expected_counts: log c, ``[C]``.

    Returns:
        scalar.

    References:
        Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.
    """
    own = torch.zeros_like(left_out).scatter(1, targets[:, None], True)
    corrected = (scores - log_expected_counts).masked_fill(left_out & ~own, float("-inf"))
    return functional.cross_entropy(corrected, targets)
