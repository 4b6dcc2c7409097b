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
    return functional.cross_entropy(corrected_scores(scores, targets, left_out, log_expected_counts), targets)


def corrected_scores(scores: Tensor, targets: Tensor, left_out: Tensor, log_expected_counts: Tensor) -> Tensor:
    """s_b(j), ``[B, C]``, -inf for what is no candidate of the row; arguments as of :func:`in_batch_loss`."""
    own = torch.zeros_like(left_out).scatter(1, targets[:, None], True)
    return (scores - log_expected_counts).masked_fill(left_out & ~own, float("-inf"))


def popularity_debiased_loss(
    scores: Tensor, targets: Tensor, left_out: Tensor, log_popularity: Tensor, occurrences: Tensor
) -> Tensor:
    r"""In-batch softmax over every occurrence of an item in a batch, debiased by the items' popularity (MoRec's public code).

    .. math::
        L = - \frac{1}{P} \sum_p \log \frac{e^{s_p(t_p)}}{e^{s_p(t_p)} + \sum_{j \notin I_p} n_j e^{s_p(j)}},
            \qquad s_p(j) = s(u_p, j) - \log p_j

    An item of the batch that occurs :math:`n_j` times is as many candidates; the target is one, however often it occurs.

    Args:
        scores: s(u, j) of distinct items, ``[P, C]``.
        targets: column of each row's target, int64 ``[P]``.
        left_out: where an item is in I_p, the row's own sequence, bool ``[P, C]``; the target's column is not asked.
        log_popularity: log of each item's share of the training interactions, ``[C]``.
        occurrences: n, how often each item occurs in the batch, ``[C]``.

    Returns:
        scalar.

    References:
        Yuan et al., "Where to Go Next for Recommender Systems? ID- vs. Modality-based Recommender Models Revisited", SIGIR
        2023; the loss is that of https://github.com/westlake-repl/IDvs.MoRec, inbatch_sasrec_e2e_text.
    """
    own = torch.zeros_like(left_out).scatter(1, targets[:, None], True)
    return in_batch_loss(scores, targets, left_out, log_popularity - torch.where(own, 0.0, occurrences.log()))
