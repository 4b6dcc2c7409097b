"""Log-probabilities of candidate titles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import cache_of, layers_of
from recbole_llm.backbone.generation.inputs import check_inputs, check_masks, check_tokens, prefill, to_device
from recbole_llm.backbone.generation.vocabulary import log_probabilities
from recbole_llm.processes import group as processes
from recbole_llm.processes import tensors
from recbole_llm.prompt.batch import PromptBatch, cut_into_micro_batches

# Candidates of one prompt are compared with each other and then masked: beyond this number of tokens that costs more than
# another copy of the prompt's keys and values.
_CANDIDATE_TOKENS_A_ROW = 512


@torch.no_grad()
def score_titles(
    backbone: Backbone,
    batch: PromptBatch,
    vectors: Tensor,
    titles: Sequence[Sequence[Sequence[int]]],
    micro_batch_tokens: int,
    call_cost: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probabilities of candidate titles as answers to their prompts.

    For prompt x and candidate y: ``sum_t log P(y_t | x, y_1 .. y_{t-1})``.

    Args:
        backbone: the LLM, in evaluation mode.
        batch: N prompts, each of at least 1 token.
        vectors: the input vectors of the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        titles: for each prompt the tokens of its candidates, each of at least 1 and scored as given, with an end token
            where it is to count. Prompts may differ in their number of candidates, and have none.
        micro_batch_tokens: the most padded tokens in one call of the LLM (one prompt, or one row of its candidates,
            may exceed it); affects cost, not results.
        call_cost: the fixed cost of a call, in tokens; affects cost, not results.

    Returns:
        for each prompt the log-probabilities of its candidates in nats, float64 ``[candidates]``, and their numbers of
        tokens, int64 ``[candidates]``, to normalize by length.

    Raises:
        UserError: the attention kernel takes no mask.
        ValueError: arguments that do not fit each other, or more tokens than the LLM has positions.
    """
    if len(titles) != len(batch) or not all(len(title) for candidates in titles for title in candidates):
        raise ValueError(f"{len(batch)} prompts need as many lists of candidates, each of a token or more.")
    check_masks(backbone)
    check_tokens(backbone, [title for candidates in titles for title in candidates])
    counts = [np.array([len(title) for title in candidates], dtype=np.int64) for candidates in titles]
    vectors = check_inputs(backbone, batch, vectors, np.array([count.max(initial=1) - 1 for count in counts]))
    scores = [np.zeros(len(count)) for count in counts]
    with_candidates = np.flatnonzero([len(count) for count in counts])
    divided = tensors.shares(batch.lengths[with_candidates])
    mine = with_candidates if divided is None else with_candidates[divided[processes.rank()]]
    for micro_batch in cut_into_micro_batches(batch.lengths[mine], micro_batch_tokens, call_cost):
        group = mine[micro_batch]
        hidden, cache, lengths = prefill(backbone, batch, group, vectors)

        # First tokens: all candidates of a prompt are predicted at its last token.
        first = np.zeros((len(group), max(len(titles[prompt]) for prompt in group)), dtype=np.int64)
        for row, prompt in enumerate(group):
            first[row, : len(titles[prompt])] = [title[0] for title in titles[prompt]]
        values = log_probabilities(backbone, hidden, to_device(backbone, first)).cpu().numpy()
        for row, prompt in enumerate(group):
            scores[prompt] += values[row, : len(titles[prompt])]

        # The other tokens, a row of candidates at a time.
        parts = [(row, part) for row, prompt in enumerate(group) for part in _rows_of_candidates(counts[prompt] - 1)]
        widths = np.array([(counts[group[row]][part] - 1).sum() for row, part in parts], dtype=np.int64)
        layers = layers_of(cache)
        for indices in cut_into_micro_batches(widths, micro_batch_tokens, call_cost):
            rows = np.array([parts[index][0] for index in indices])
            prompts, chosen = group[rows], [parts[index][1] for index in indices]
            candidates = [
                [titles[prompt][title] for title in part] for prompt, part in zip(prompts, chosen, strict=True)
            ]
            sums = _score_rows(backbone, candidates, rows, lengths[rows], layers)
            for prompt, part, values in zip(prompts, chosen, sums, strict=True):
                scores[prompt][part] += values
    if divided is not None:
        table = np.zeros((len(mine), max(len(scores[prompt]) for prompt in with_candidates)))
        for row, prompt in enumerate(mine):
            table[row, : len(scores[prompt])] = scores[prompt]
        every = tensors.gather(to_device(backbone, table), divided).cpu().numpy()
        for prompt, row in zip(with_candidates, every, strict=True):
            scores[prompt] = row[: len(scores[prompt])]
    return scores, counts


def _rows_of_candidates(lengths: np.ndarray) -> list[np.ndarray]:
    """Cut a prompt's candidates, with ``lengths`` tokens to feed to the LLM, into rows; those with none are left out."""
    fed = np.flatnonzero(lengths)
    if len(fed) == 0:
        return []
    row = (np.cumsum(lengths[fed]) - 1) // _CANDIDATE_TOKENS_A_ROW
    return np.split(fed, np.flatnonzero(np.diff(row)) + 1)


def _score_rows(
    backbone: Backbone,
    candidates: list[list[Sequence[int]]],
    rows: np.ndarray,
    lengths: np.ndarray,
    layers: list[tuple[Tensor, Tensor]],
) -> list[np.ndarray]:
    """Log-probabilities of candidates after their first token, all candidates of a row in one sequence.

    Args:
        backbone: the LLM.
        candidates: for each row its candidates, each of at least 2 tokens.
        rows: the row of ``layers`` that holds each row's prompt, int64 ``[B]``.
        lengths: tokens of each row's prompt, int64 ``[B]``.
        layers: keys and values of the prompts, right padded.

    Returns:
        for each row the sums of its candidates, float64.
    """
    sizes = [np.array([len(title) - 1 for title in row]) for row in candidates]
    width, longest = max(int(size.sum()) for size in sizes), int(lengths.max())
    tokens, targets = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    position = np.repeat(lengths[:, None], width, axis=1)
    owner = np.full((len(rows), width), -1)  # the candidate of each token; -1 = padding
    for row, (titles, size) in enumerate(zip(candidates, sizes, strict=True)):
        end = int(size.sum())
        tokens[row, :end] = np.concatenate([title[:-1] for title in titles])
        targets[row, :end] = np.concatenate([title[1:] for title in titles])
        owner[row, :end] = np.repeat(np.arange(len(size)), size)
        position[row, :end] += np.arange(end) - np.repeat(np.cumsum(size) - size, size)

    candidate = to_device(backbone, owner)
    causal = torch.ones(width, width, dtype=torch.bool, device=backbone.device).tril()
    own = (candidate[:, :, None] == candidate[:, None]) & causal
    prompt = torch.arange(longest, device=backbone.device) < to_device(backbone, lengths)[:, None]
    mask = torch.cat([prompt[:, None].expand(-1, width, -1), own], dim=2)[:, None]
    prompt_rows = to_device(backbone, rows)
    past = cache_of([(keys[prompt_rows, :, :longest], values[prompt_rows, :, :longest]) for keys, values in layers])
    read = candidate >= 0
    embeddings = backbone.embedding(to_device(backbone, tokens))
    hidden, _ = backbone(embeddings, to_device(backbone, position), mask, past, read=read)
    values = log_probabilities(backbone, hidden[read], to_device(backbone, targets)[read][:, None])[:, 0].cpu().numpy()
    every = np.concatenate(sizes)
    sums = np.add.reduceat(values.astype(np.float64), np.cumsum(every) - every)
    return np.split(sums, np.cumsum([len(size) for size in sizes])[:-1])
