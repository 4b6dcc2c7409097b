"""Sequence-teacher-anchored loss with adaptive regularization (LLM-STAR, equations 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def similarity(first: Tensor, second: Tensor, kind: str = "cosine") -> Tensor:
    """Row-wise similarity of two ``[N, d]`` tensors, ``[N]``: ``cosine`` or ``dot``."""
    if kind == "cosine":
        return functional.cosine_similarity(first, second, dim=-1)
    return (first * second).sum(dim=-1)


def sequence_anchor_loss(
    user: Tensor,
    positive: Tensor,
    negatives: Tensor,
    parents: Tensor,
    confidence: Tensor | None = None,
    kind: str = "cosine",
    temperature: float = 1.0,
) -> Tensor:
    r"""Pull a user towards the teacher's anchor, push it from the same history in other orders.

    .. math::
        L_{seq} = - \frac{1}{B} \sum_u c_u \log \frac{e^{s(u, u^{pos}) / \tau}}
            {e^{s(u, u^{pos}) / \tau} + \sum_i e^{s(u, u_i^{neg}) / \tau}}

    A user without negatives (a history too short or too uniform to perturb) has the loss 0, as the formula says, and
    counts in the mean.

    Args:
        user: u, ``[B, d']``.
        positive: u_pos = f_user-adapter(u_cf), ``[B, d']``.
        negatives: representations of perturbed histories, ``[P, d']``.
        parents: the user each negative belongs to, int64 ``[P]``.
        confidence: c_u, ``[B]``; None means 1 for everyone (equation 2).
        kind: the similarity s, ``cosine`` or ``dot`` (the paper does not fix it).
        temperature: tau.

    Returns:
        scalar.
    """
    to_positive = similarity(user, positive, kind) / temperature
    to_negatives = similarity(user[parents], negatives, kind) / temperature
    # log(1 + sum_i exp(neg_i - pos)) per user, over a ragged set of negatives: scatter the margins into a padded table.
    count = torch.bincount(parents, minlength=len(user))
    start = count.cumsum(0) - count
    order = torch.argsort(parents, stable=True)
    column = torch.arange(len(parents), device=parents.device) - start[parents[order]]
    margins = to_positive.new_full((len(user), int(count.max()) + 1 if len(parents) else 1), float("-inf"))
    margins[:, 0] = 0.0
    margins = margins.index_put(
        (parents[order], column + 1), to_negatives[order] - to_positive[parents[order]]
    )
    loss = torch.logsumexp(margins, dim=1)
    if confidence is not None:
        loss = confidence * loss
    return loss.mean()


def bounded_anchor(positive: Tensor, user: Tensor) -> Tensor:
    """Cut each positive anchor to the length of its user: a dot product could else be raised by its length alone.

    Args:
        positive: u_pos, ``[B, d']``.
        user: u, ``[B, d']``; its length is a constant here.

    Returns:
        ``[B, d']``.
    """
    length = positive.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return positive * (user.detach().norm(dim=-1, keepdim=True) / length).clamp(max=1.0)


def teacher_confidence(
    user: Tensor, candidates: Tensor, kind: str = "cosine", left_out: Tensor | None = None
) -> Tensor:
    """c_u = s(u_cf, t_cf): how sure the teacher is of the true next item (LLM-STAR section 3.3).

    The paper does not fix s, and a loss weight should not be negative, so that by default a cosine below 0 counts as 0.

    Args:
        user: the teacher's user representation u_cf, ``[B, d]``.
        candidates: the teacher's item vectors of the candidates, the target first, ``[B, C, d]``.
        kind: ``cosine`` (cut at 0), ``shifted`` ((1 + cosine) / 2), ``probability`` (softmax of the dot products over the
            candidates), ``raw`` (the dot product itself, unbounded), ``none`` (1).
        left_out: candidates that do not count, bool ``[B, C]``; None: all count.

    Returns:
        ``[B]``, without gradient; in [0, 1] for every kind but ``raw``.
    """
    with torch.no_grad():
        target = candidates[:, 0]
        if kind == "none":
            return torch.ones(len(user), device=user.device)
        if kind == "raw":
            return similarity(user, target, "dot")
        if kind == "probability":
            scores = torch.einsum("bd,bcd->bc", user, candidates)
            if left_out is not None:
                scores = scores.masked_fill(left_out, float("-inf"))
            return torch.softmax(scores, dim=-1)[:, 0]
        cosine = similarity(user, target, "cosine")
        return cosine.clamp(min=0.0) if kind == "cosine" else (1.0 + cosine) / 2.0
