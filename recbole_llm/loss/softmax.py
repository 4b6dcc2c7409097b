r"""Softmax over a whole catalogue: the loss of an item head, and ranking by it, in bounded memory.

An item head ``logits = W h`` (ST2SI, Zhai et al. 2025, equation 5) gives each position one logit per item. With a million
items and 512 positions these are 2 GB in float32, and a loss needs them several times over. Here:

* :func:`full_softmax_loss` is the exact cross-entropy, with the logits of one chunk of items at a time;
* :func:`sampled_softmax_loss` with :class:`NegativeSampler` is cheaper and has the same optimum;
* :func:`top_items` and :func:`target_counts` rank without a table of users x items.

Everything speaks of rows of ``W``, 0 to N - 1. A dataset's item 0 is padding, so that row r is its item r + 1: who calls
shifts ids by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LAST_ROW = 2**32 - 1  # of those that half a sort key can count


def _slices(length: int, size: int | None) -> Iterator[slice]:
    """``range(length)`` in slices of ``size`` (None: in one)."""
    size = size or max(1, length)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _own_column(targets: Tensor, items: slice) -> tuple[Tensor, Tensor]:
    """Each row's target as a column of a chunk, int64 ``[P, 1]``, and whether it lies in there at all, bool ``[P]``."""
    inside = (targets >= items.start) & (targets < items.stop)
    return (targets - items.start).clamp(0, items.stop - items.start - 1)[:, None], inside


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def full_softmax_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_items: int | None, chunk_positions: int = 1024
) -> Tensor:
    r"""Cross-entropy of each position's next item over the whole catalogue (ST2SI, equations 5 and 7).

    .. math::
        L_p = \log \sum_{j=1}^{N} e^{w_j \cdot h_p} - w_{t_p} \cdot h_p

    In chunks the sum is built up as Milakov and Gimelshein ("Online normalizer calculation for softmax", 2018) do, and the
    backward pass computes the logits again: at most ``chunk_items * chunk_positions`` of them exist at a time. The price
    is one more matrix product on the three of the plain loss.

    Args:
        hidden: h, ``[P, d]``, in any floating type; logits are computed in that of ``weight``.
        weight: W, ``[N, d]``.
        targets: rows of W, int64 ``[P]``.
        chunk_items: logits of how many items to hold at a time; None: of all (the plain loss).
        chunk_positions: of how many positions at a time, where ``chunk_items`` is given.

    Returns:
        ``[P]`` in the type of ``weight``. In chunks, a target that is no row of W has the loss NaN.

    References:
        Zhai et al., "Learning Transition Patterns by Large Language Models for Sequential Recommendation", 2025.
    """
    hidden = hidden.to(weight.dtype)
    if chunk_items is None:
        return functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_items, chunk_positions)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """:func:`full_softmax_loss` in chunks; hidden and weight are of one type."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_items: int, chunk_positions: int) -> Tensor:
        log_partition = hidden.new_full((len(hidden),), float("-inf"))
        target_logits = hidden.new_full((len(hidden),), float("nan"))
        for items in _slices(len(weight), chunk_items):
            for positions in _slices(len(hidden), chunk_positions):
                logits = hidden[positions] @ weight[items].T
                log_partition[positions] = torch.logaddexp(log_partition[positions], logits.logsumexp(dim=1))
                column, inside = _own_column(targets[positions], items)
                own = logits.gather(1, column)[:, 0]
                target_logits[positions] = torch.where(inside, own, target_logits[positions])
        ctx.save_for_backward(hidden, weight, targets, log_partition)
        ctx.chunks = chunk_items, chunk_positions
        return log_partition - target_logits

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_partition = ctx.saved_tensors
        chunk_items, chunk_positions = ctx.chunks
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden) if hidden_wanted else None
        weight_gradient = torch.zeros_like(weight) if weight_wanted else None
        for items in _slices(len(weight), chunk_items):
            for positions in _slices(len(hidden), chunk_positions):
                # dL/dlogits = upstream * (softmax - one-hot), written over the logits.
                logits = hidden[positions] @ weight[items].T
                gradient = logits.sub_(log_partition[positions, None]).exp_()
                column, inside = _own_column(targets[positions], items)
                gradient.scatter_add_(1, column, -inside[:, None].to(gradient.dtype))
                gradient.mul_(upstream[positions, None])
                if hidden_gradient is not None:
                    hidden_gradient[positions].addmm_(gradient, weight[items])
                if weight_gradient is not None:
                    weight_gradient[items].addmm_(gradient.T, hidden[positions])
        return hidden_gradient, weight_gradient, None, None, None


class NegativeSampler:
    r"""Draws the negatives of a training step, shared by all its positions.

    A draw picks item j with probability q_j, and a Poisson number of draws, ``draws`` on average, is made; negatives are
    the distinct items among them. So each item is a negative independently of all others, with a probability that is
    known exactly and is its expected count:

    .. math::
        c_j = 1 - e^{-draws \cdot q_j}

    (Draws of a fixed number have no such simple counts without repeats, and with repeats spend the logits on the most
    popular items.) The number of negatives varies from step to step.

    Args:
        counts: ``[N]`` how often each row of W is a target in training; q is proportional to
            ``(counts + 1) ** smoothing``, so that an item without interactions can be drawn too. None: q is uniform.
        items: N.
        draws: mean number of draws. Some repeat, so that negatives are fewer, ``exp(log_expected_counts).sum()`` on average.
        smoothing: 1 draws by popularity, 0 uniformly; 0.75 is word2vec's (Mikolov et al. 2013).

    Attributes:
        log_expected_counts: log c, float32 ``[N]``, for :func:`sampled_softmax_loss`.
    """

    def __init__(self, counts: np.ndarray | None, items: int, draws: int, smoothing: float = 0.75) -> None:
        self.draws = draws
        popularity = np.ones(items) if counts is None else (np.asarray(counts) + 1.0) ** smoothing
        cumulative = np.cumsum(popularity)
        self._up_to = cumulative / cumulative[-1]
        expected = -np.expm1(-draws * popularity / cumulative[-1])
        self.log_expected_counts = torch.from_numpy(np.log(expected)).float()

    def draw(self, rng: np.random.Generator) -> Tensor:
        """The negatives of one step: distinct rows of W, ascending, int64 ``[K]`` on the CPU."""
        places = rng.random(rng.poisson(self.draws))
        return torch.from_numpy(np.unique(np.searchsorted(self._up_to, places, side="right")))


def sampled_softmax_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, negatives: Tensor, log_expected_counts: Tensor
) -> Tensor:
    r"""Cross-entropy of each position's next item against shared negatives, corrected for how they were drawn.

    .. math::
        L_p = \log \Big( e^{s_p(t_p)} + \sum_{j \in S, j \ne t_p} e^{s_p(j)} \Big) - s_p(t_p), \qquad
            s_p(j) = w_j \cdot h_p - \log c_j

    c_j is the expected count of j in S. Without the correction popular items, which are drawn often as negatives, would be
    pushed down for it. With it, and with items that get into S independently (:class:`NegativeSampler`), the expected loss
    is smallest exactly where softmax(W h) is the distribution of the next item, for S of any size; where S is the
    whole catalogue it is :func:`full_softmax_loss`. Otherwise its value is no estimate of the full loss, whose
    target meets all other items.

    Args:
        hidden: h, ``[P, d]``, in any floating type; logits are computed in that of ``weight``.
        weight: W, ``[N, d]``.
        targets: rows of W, int64 ``[P]``.
        negatives: S, distinct rows of W, int64 ``[K]``. One that is a position's own target is left out there.
        log_expected_counts: log c, ``[N]``.

    Returns:
        ``[P]`` in the type of ``weight``.

    References:
        Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
        2008. Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL 2015. Yi et al.,
        "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.
    """
    # One look-up: each has a gradient of the size of W.
    target_rows, negative_rows = functional.embedding(torch.cat([targets, negatives]), weight).split(
        [len(targets), len(negatives)]
    )
    hidden = hidden.to(weight.dtype)
    target_scores = (hidden * target_rows).sum(dim=1) - log_expected_counts[targets]
    scores = hidden @ negative_rows.T - log_expected_counts[negatives]
    scores = scores.masked_fill(targets[:, None] == negatives, float("-inf"))
    return functional.cross_entropy(
        torch.cat([target_scores[:, None], scores], dim=1), torch.zeros_like(targets), reduction="none"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ranking
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def top_items(hidden: Tensor, weight: Tensor, k: int, chunk_items: int | None) -> tuple[Tensor, Tensor]:
    """The k best rows of W for each user; among equal scores the lower row comes first.

    Args:
        hidden: h, ``[B, d]``, in any floating type; scores are computed in float32.
        weight: W, float32 ``[N, d]``.
        k: how many, at most N.
        chunk_items: scores of how many items to hold at a time; None: of all.

    Returns:
        scores: float32 ``[B, k]``, descending.
        index: rows of W, int64 ``[B, k]``.
    """
    hidden = hidden.to(weight.dtype)
    best = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    for items in _slices(len(weight), chunk_items):
        keys = _sort_keys(hidden @ weight[items].T, items.start)
        keys = torch.cat([best, keys.topk(min(k, keys.shape[1]), dim=1).values], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return _flip_negative((best >> 32).int()).view(torch.float32), _LAST_ROW - (best & _LAST_ROW)


def _sort_keys(scores: Tensor, first_row: int) -> Tensor:
    """Distinct int64 keys in the order of (score, then lower row), because ``topk`` takes any of several equal values.

    The upper half of a key is the score's bit pattern, the lower half counts rows from the end.
    """
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, which has the same rank
    return (_flip_negative(bits).long() << 32) | (_LAST_ROW - rows)


def _flip_negative(bits: Tensor) -> Tensor:
    """Between bit patterns of float32 and int32 in the same order (its own inverse): more negative floats have larger bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@torch.no_grad()
def target_counts(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_items: int | None) -> tuple[Tensor, Tensor]:
    """How many other rows of W score higher than each user's target, and how many the same: its rank without a table.

    Args:
        hidden: h, ``[B, d]``, in any floating type; scores are computed in the type of ``weight``.
        weight: W, ``[N, d]``.
        targets: rows of W, int64 ``[B]``.
        chunk_items: scores of how many items to hold at a time; None: of all.

    Returns:
        greater: int64 ``[B]``.
        equal: int64 ``[B]``, without the target itself; -1 where a score of the user is NaN.
    """
    hidden = hidden.to(weight.dtype)
    chunks = list(_slices(len(weight), chunk_items))
    # A target's score comes from the very product that is counted below: another one may round it differently.
    target_scores = hidden.new_empty(len(hidden), 1)
    for chunk in (targets // (chunk_items or len(weight))).unique().tolist():
        column, inside = _own_column(targets, chunks[chunk])
        own = (hidden @ weight[chunks[chunk]].T).gather(1, column)
        target_scores = torch.where(inside[:, None], own, target_scores)
    greater = torch.zeros_like(targets)
    equal = torch.full_like(targets, -1)
    invalid = torch.zeros_like(targets, dtype=torch.bool)
    for items in chunks:
        scores = hidden @ weight[items].T
        greater += (scores > target_scores).sum(dim=1)
        equal += (scores == target_scores).sum(dim=1)
        invalid |= scores.isnan().any(dim=1)
    return greater, equal.masked_fill(invalid, -1)
