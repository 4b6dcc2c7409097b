"""The loss of target titles, and mean hidden states of parts of prompts and titles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.generation.inputs import check_inputs, check_tokens, embed, to_device
from recbole_llm.backbone.generation.vocabulary import log_probabilities
from recbole_llm.processes import group as processes
from recbole_llm.processes import tensors
from recbole_llm.prompt.batch import PromptBatch, cut_into_micro_batches


class TitleFeatures(NamedTuple):
    """Results of one pass over prompts and their target titles.

    Attributes:
        losses: per prompt the sum of its target's negative log-likelihoods in nats, float32 ``[N]``.
        counts: tokens of each target, int64 ``[N]``.
        pooled: mean last hidden state over each prompt's pooled part, float32 ``[N, hidden_size]``.
        answers: mean last hidden state over each target's tokens without its end token, float32 ``[N, hidden_size]``.
    """

    losses: Tensor
    counts: Tensor
    pooled: Tensor
    answers: Tensor


def title_loss(
    backbone: Backbone,
    batch: PromptBatch,
    vectors: Tensor,
    targets: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    call_cost: int,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Next-token loss on the target titles; the tokens of the prompts are not predicted.

    For prompt n, its target y and the tokens x before it::

        loss_n = - sum_t log P(y_t | x, y_1 .. y_{t-1})

    Args:
        backbone: the LLM, in training mode for dropout.
        batch: N prompts, each of at least 1 token.
        vectors: the input vectors of the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        targets: tokens of each prompt's title with the end token, at least 1; the end token is predicted, too.
        micro_batch_tokens: the most padded tokens in one call of the LLM; affects cost, not results.
        call_cost: the fixed cost of a call, in tokens; affects cost, not results.
        recompute: recompute activations in the backward pass instead of storing them, which saves memory and costs time.

    Returns:
        per prompt the sum of its target's negative log-likelihoods in nats, float32 ``[N]``, differentiable in
        ``vectors`` and in the LLM's weights where they are trained; and the number of its tokens, int64 ``[N]``.

    Raises:
        ValueError: arguments that do not fit each other, or more tokens than the LLM has positions.
    """
    features = title_features(backbone, batch, vectors, targets, micro_batch_tokens, call_cost, recompute, pool=False)
    return features.losses, features.counts


def title_features(
    backbone: Backbone,
    batch: PromptBatch,
    vectors: Tensor,
    targets: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    call_cost: int,
    recompute: bool = False,
    pool: bool = True,
) -> TitleFeatures:
    """:func:`title_loss` together with the pooled hidden states of the same pass.

    Args:
        batch: as there, each with a part to pool (``PromptBatch.pooled``).
        targets: as there, each of a token or more beside the end token.
        pool: False omits the pooled states: they are empty then, and ``batch`` and ``targets`` need nothing to pool.

    The other arguments are those of :func:`title_loss`.
    """
    counts = np.array([len(target) for target in targets], dtype=np.int64)
    if len(targets) != len(batch) or (counts == 0).any():
        raise ValueError(f"{len(batch)} prompts need as many targets, each of a token or more.")
    check_tokens(backbone, targets)
    vectors = check_inputs(backbone, batch, vectors, counts - 1)

    def compute(group: np.ndarray, vectors: Tensor) -> tuple[Tensor, ...]:
        # No token is predicted from the last one.
        embeddings, lengths = embed(backbone, batch, group, vectors, [targets[prompt][:-1] for prompt in group])
        column = np.arange(embeddings.shape[1])
        first = batch.lengths[group, None] - 1
        predicts = (column >= first) & (column < first + counts[group, None])
        parts = [_between(column, batch.pooled[group]), (column > first) & (column < lengths[:, None])] if pool else []
        read = np.logical_or.reduce([predicts, *parts])
        hidden = _states(backbone, embeddings, read)
        tokens = to_device(backbone, np.concatenate([np.asarray(targets[prompt], dtype=np.int64) for prompt in group]))
        values = -log_probabilities(backbone, hidden[to_device(backbone, predicts)], tokens[:, None])[:, 0]
        rows = to_device(backbone, np.repeat(np.arange(len(group)), counts[group]))
        losses = torch.zeros(len(group), device=backbone.device).index_add(0, rows, values)
        return losses, *(_mean(backbone, hidden, part) for part in parts)

    lengths = batch.lengths + counts - 1
    results = _by_micro_batches(backbone, lengths, compute, vectors, micro_batch_tokens, call_cost, recompute)
    losses, *pooled = results or [torch.zeros(0, device=backbone.device)]
    return TitleFeatures(losses, to_device(backbone, counts), *(pooled or (losses[:0], losses[:0])))


def pooled_states(
    backbone: Backbone,
    batch: PromptBatch,
    vectors: Tensor,
    micro_batch_tokens: int,
    call_cost: int,
    recompute: bool = False,
) -> Tensor:
    """Mean last hidden state over each prompt's pooled part.

    Args:
        batch: N prompts with a part to pool (``PromptBatch.pooled``).

    The other arguments are those of :func:`title_loss`.

    Returns:
        float32 ``[N, hidden_size]``, differentiable in ``vectors`` and in the LLM's weights where they are trained.
    """
    vectors = check_inputs(backbone, batch, vectors, np.zeros(len(batch), dtype=np.int64))

    def compute(group: np.ndarray, vectors: Tensor) -> tuple[Tensor]:
        embeddings, _ = embed(backbone, batch, group, vectors)
        read = _between(np.arange(embeddings.shape[1]), batch.pooled[group])
        return (_mean(backbone, _states(backbone, embeddings, read), read),)

    return _by_micro_batches(backbone, batch.lengths, compute, vectors, micro_batch_tokens, call_cost, recompute)[0]


def _by_micro_batches(
    backbone: Backbone,
    lengths: np.ndarray,
    compute: Callable[[np.ndarray, Tensor], tuple[Tensor, ...]],
    vectors: Tensor,
    micro_batch_tokens: int,
    call_cost: int,
    recompute: bool,
) -> list[Tensor]:
    """Call ``compute(group, vectors)`` on each micro-batch of prompts, and return its rows in the order of the prompts.

    Of several processes each computes some of the prompts, and all get all rows.
    """
    divided = tensors.shares(lengths)
    mine = np.arange(len(lengths)) if divided is None else divided[processes.rank()]
    groups = [mine[group] for group in cut_into_micro_batches(lengths[mine], micro_batch_tokens, call_cost)]
    if recompute and torch.is_grad_enabled():
        options = {"use_reentrant": False, "preserve_rng_state": not backbone.frozen}
        results = [checkpoint(compute, group, vectors, **options) for group in groups]
    else:
        results = [compute(group, vectors) for group in groups]
    if not groups:
        return []
    order = to_device(backbone, np.argsort(np.concatenate(groups), kind="stable"))
    return [tensors.gather(torch.cat(parts)[order], divided) for parts in zip(*results, strict=True)]


def _states(backbone: Backbone, embeddings: Tensor, read: np.ndarray) -> Tensor:
    """Last hidden states of right-padded prompts; they are valid at the positions ``read`` ``[B, W]`` only."""
    positions = torch.arange(embeddings.shape[1], device=backbone.device)[None]
    return backbone(embeddings, positions, read=to_device(backbone, read))[0]


def _between(column: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which of the columns lie in each row's span: boolean ``[B, W]`` of spans ``[B, 2]``."""
    return (column >= spans[:, :1]) & (column < spans[:, 1:])


def _mean(backbone: Backbone, hidden: Tensor, where: np.ndarray) -> Tensor:
    """Mean over the positions ``where`` ``[B, W]`` of each row of ``hidden`` ``[B, W, hidden_size]``, in float32."""
    share = to_device(backbone, (where / where.sum(axis=1, keepdims=True)).astype(np.float32))
    return torch.einsum("bw,bwh->bh", share, hidden.float())
