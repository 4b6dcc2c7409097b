"""Answers in words: the loss of target titles, greedy and constrained decoding, log-probabilities of candidate titles.

A prompt is a row of a :class:`PromptBatch` without out tokens; titles are token ids from :func:`encode_text`. What is
expensive is done no more than needed:

* Vocabulary logits (100 thousand numbers a position) are computed where a token is predicted and nowhere else.
* A prompt's keys and values are computed once. When titles are scored, all candidates of a prompt stand behind it in
  one row and share them; a mask keeps the candidates from seeing each other::

      prompt      p p p p p p                     once
      candidates              a a a b b c c c     attends to  p p p p p p  and to its own candidate
      position    0 1 2 3 4 5 6 7 8 6 7 6 7 8

* A row whose answer is complete leaves the batch; a constrained answer is complete as soon as one candidate is left.

Positions and masks are those of each row, so that neither padding nor the other rows of a batch reach a result, beyond
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import cache_of, layers_of
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch, cut_into_micro_batches

__all__ = ["TitleFeatures", "TitleTrie", "greedy", "logits", "pooled_states", "score_titles", "title_features", "title_loss"]

_Node = dict[int, Any]  # token -> what may follow it; nothing follows the stop token
_LOGITS_AT_ONCE = 2**25  # 128 MiB in float32
# Candidates of one prompt are compared with each other and then masked: beyond this many tokens that waste outgrows
# another copy of the prompt's keys and values.
_CANDIDATE_TOKENS_A_ROW = 512
_DROPPED_WHEN_DONE = 0.25  # share of a batch's rows; copying the others' keys and values costs about a step


# ---- Logits


class _Decoded(tuple):
    """What a decoder stack returns: the hidden states, and None for all else that a causal LM passes on."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_returns(hidden: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Within the context, the decoder stack computes nothing and returns ``hidden``."""
    decoder.forward = lambda *arguments, **options: _Decoded([hidden])
    try:
        yield
    finally:
        del decoder.forward


def logits(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Vocabulary logits of final hidden states, as the architecture's own causal LM computes them.

    What stands behind the output head is the architecture's own code too: configurations do not tell it. Gemma 2 caps
    its logits; ``logits_scaling`` divides in Granite, multiplies in HyperCLOVA X and scales the hidden state in
    MiniCPM 3; ``logit_scale`` multiplies in Cohere and is ignored in MPT.

    Args:
        backbone: the LLM.
        hidden: last hidden states ``[..., hidden_size]``, as :class:`Backbone` returns them (after the final norm);
            cast to the weights' type. Pass the positions where a token is predicted, not whole sequences.

    Returns:
        float32 ``[..., vocabulary]``, differentiable in ``hidden`` and in the head's weights where they are trained.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1]).to(backbone.dtype)
    with _decoder_returns(flat, backbone.model):
        output = backbone.causal_lm(inputs_embeds=flat, use_cache=False)
    return output.logits.float().reshape(*hidden.shape[:-1], -1)


def _log_probabilities(backbone: Backbone, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of ``tokens`` ``[P, C]`` where the last hidden state is ``hidden`` ``[P, hidden_size]``.

    No more than ``_LOGITS_AT_ONCE`` logits exist at a time: for the backward pass they are computed again.
    """

    def of(hidden: Tensor, tokens: Tensor) -> Tensor:
        scores = logits(backbone, hidden)
        return scores.gather(1, tokens) - scores.logsumexp(dim=1, keepdim=True)

    positions = max(1, _LOGITS_AT_ONCE // backbone.embedding.weight.shape[0])
    parts = []
    for some_hidden, some_tokens in zip(hidden.split(positions), tokens.split(positions), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(of, some_hidden, some_tokens, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(of(some_hidden, some_tokens))
    return torch.cat(parts)


# ---- The loss


class TitleFeatures(NamedTuple):
    """What one pass over prompts and their target titles gives.

    Attributes:
        losses: per prompt the sum of its target's negative log-likelihoods in nats, float32 ``[N]``.
        counts: tokens of each target, int64 ``[N]``.
        pooled: mean last hidden state over each prompt's pooled part, float32 ``[N, hidden_size]``.
        answers: mean last hidden state over each target's tokens, its end token left out, float32 ``[N, hidden_size]``.
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
    """Next-token loss on the target titles alone: the prompts themselves are not learned.

    For prompt n, its target y and the tokens x before it::

        loss_n = - sum_t log P(y_t | x, y_1 .. y_{t-1})

    Args:
        backbone: the LLM, in training mode where its dropout is wanted.
        batch: N prompts, each of at least 1 token.
        vectors: what goes into the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        targets: tokens of each prompt's title with the end token, at least 1; the end token is learned like the rest.
        micro_batch_tokens: the most padded tokens in one call of the LLM; affects cost, not results.
        call_cost: what a call costs however few tokens it has, in tokens; affects cost, not results.
        recompute: keep no activations between forward and backward, run the forward again (memory against time).

    Returns:
        per prompt the sum of its target's negative log-likelihoods in nats, float32 ``[N]``, differentiable in
        ``vectors`` and in the LLM's weights where they are trained; and the number of its tokens, int64 ``[N]``.

    Raises:
        ValueError: arguments that do not fit each other, or more tokens than the LLM has positions.
    """
    found = title_features(backbone, batch, vectors, targets, micro_batch_tokens, call_cost, recompute, pool=False)
    return found.losses, found.counts


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
        pool: False leaves the pooled states out; they are empty then, and nothing is asked of ``batch`` and ``targets``.

    The other arguments are those of :func:`title_loss`.
    """
    counts = np.array([len(target) for target in targets], dtype=np.int64)
    if len(targets) != len(batch) or (counts == 0).any():
        raise ValueError(f"{len(batch)} prompts need as many targets, each of a token or more.")
    _check_tokens(backbone, targets)
    vectors = _checked(backbone, batch, vectors, counts - 1)

    def of(group: np.ndarray, vectors: Tensor) -> tuple[Tensor, ...]:
        # The last token predicts nothing that is asked for.
        embeddings, lengths = _embed(backbone, batch, group, vectors, [targets[prompt][:-1] for prompt in group])
        column = np.arange(embeddings.shape[1])
        first = batch.lengths[group, None] - 1
        predicts = (column >= first) & (column < first + counts[group, None])
        parts = [_between(column, batch.pooled[group]), (column > first) & (column < lengths[:, None])] if pool else []
        read = np.logical_or.reduce([predicts, *parts])
        hidden = _states(backbone, embeddings, read)
        tokens = _on(backbone, np.concatenate([np.asarray(targets[prompt], dtype=np.int64) for prompt in group]))
        found = -_log_probabilities(backbone, hidden[_on(backbone, predicts)], tokens[:, None])[:, 0]
        rows = _on(backbone, np.repeat(np.arange(len(group)), counts[group]))
        losses = torch.zeros(len(group), device=backbone.device).index_add(0, rows, found)
        return losses, *(_mean(backbone, hidden, part) for part in parts)

    found = _by_groups(backbone, batch.lengths + counts - 1, of, vectors, micro_batch_tokens, call_cost, recompute)
    losses, *pooled = found or [torch.zeros(0, device=backbone.device)]
    return TitleFeatures(losses, _on(backbone, counts), *(pooled or (losses[:0], losses[:0])))


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
    vectors = _checked(backbone, batch, vectors, np.zeros(len(batch), dtype=np.int64))

    def of(group: np.ndarray, vectors: Tensor) -> tuple[Tensor]:
        embeddings, _ = _embed(backbone, batch, group, vectors)
        read = _between(np.arange(embeddings.shape[1]), batch.pooled[group])
        return (_mean(backbone, _states(backbone, embeddings, read), read),)

    return _by_groups(backbone, batch.lengths, of, vectors, micro_batch_tokens, call_cost, recompute)[0]


def _by_groups(
    backbone: Backbone,
    lengths: np.ndarray,
    of: Callable[[np.ndarray, Tensor], tuple[Tensor, ...]],
    vectors: Tensor,
    micro_batch_tokens: int,
    call_cost: int,
    recompute: bool,
) -> list[Tensor]:
    """Call ``of(group, vectors)`` on each micro-batch of prompts, and put what it returns row by row in their order."""
    groups = cut_into_micro_batches(lengths, micro_batch_tokens, call_cost)
    if recompute and torch.is_grad_enabled():
        options = {"use_reentrant": False, "preserve_rng_state": not backbone.frozen}
        found = [checkpoint(of, group, vectors, **options) for group in groups]
    else:
        found = [of(group, vectors) for group in groups]
    if not groups:
        return []
    order = _on(backbone, np.argsort(np.concatenate(groups), kind="stable"))
    return [torch.cat(parts)[order] for parts in zip(*found, strict=True)]


def _states(backbone: Backbone, embeddings: Tensor, read: np.ndarray) -> Tensor:
    """Last hidden states of right-padded prompts at the positions ``read`` ``[B, W]``; elsewhere they mean nothing."""
    positions = torch.arange(embeddings.shape[1], device=backbone.device)[None]
    return backbone(embeddings, positions, read=_on(backbone, read))[0]


def _between(column: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which of the columns lie in each row's span: boolean ``[B, W]`` of spans ``[B, 2]``."""
    return (column >= spans[:, :1]) & (column < spans[:, 1:])


def _mean(backbone: Backbone, hidden: Tensor, where: np.ndarray) -> Tensor:
    """Mean over the positions ``where`` ``[B, W]`` of each row of ``hidden`` ``[B, W, hidden_size]``, in float32."""
    share = _on(backbone, (where / where.sum(axis=1, keepdims=True)).astype(np.float32))
    return torch.einsum("bw,bwh->bh", share, hidden.float())


# ---- Decoding


class TitleTrie:
    """The candidate titles of a prompt as a trie of tokens: what may come next.

    Args:
        sequences: tokens of each candidate, without the stop token. One may begin another, or occur twice.
        stop_id: the token that ends an answer.

    Attributes:
        stop_id: as given.
        depth: tokens of the longest candidate with its stop token.

    Raises:
        ValueError: no candidate, or one that holds the stop token.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], stop_id: int) -> None:
        if not sequences:
            raise ValueError("a TitleTrie needs a candidate.")
        self.stop_id = int(stop_id)
        self.depth = 1 + max(len(sequence) for sequence in sequences)
        self.root: _Node = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                if token == stop_id:
                    raise ValueError(f"a candidate holds the stop token {stop_id}.")
                node = node.setdefault(int(token), {})
            node[self.stop_id] = {}

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow the beginning of an answer, the stop token among them where it may end; ascending.

        Raises:
            ValueError: no candidate begins so.
        """
        node = self.root
        for token in prefix:
            if token not in node:
                raise ValueError(f"no candidate begins with {list(prefix)}.")
            node = node[token]
        return sorted(node)

    def ending(self, node: _Node) -> list[int] | None:
        """Tokens from ``node`` to the end of the one candidate that is left, without the stop token; None: several."""
        tokens: list[int] = []
        while len(node) == 1:
            ((token, node),) = node.items()
            if token == self.stop_id:
                return tokens
            tokens.append(token)
        return None


@torch.no_grad()
def greedy(
    backbone: Backbone,
    batch: PromptBatch,
    vectors: Tensor,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    micro_batch_tokens: int,
    call_cost: int,
    tries: Sequence[TitleTrie | None] | None = None,
) -> list[list[int]]:
    """Answer each prompt by the likeliest token at each step.

    Args:
        backbone: the LLM, in evaluation mode.
        batch: N prompts, each of at least 1 token.
        vectors: what goes into the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        max_new_tokens: the most tokens of a free answer, the stop token among them; at least 1, for all prompts or for
            each. A constrained answer is as long as its candidate.
        stop_ids: tokens that end a free answer.
        micro_batch_tokens: the most padded tokens, prompts and answers, in one call of the LLM and in its cache.
        call_cost: what a call costs however few tokens it has, in tokens; affects cost, not results.
        tries: for each prompt its candidates, None for a free answer; None: all answers are free. At each step the
            likeliest token that leads to a candidate is taken, so that the answer is one of them.

    Returns:
        tokens of each answer, without the stop token.

    Raises:
        UserError: the attention kernel takes no mask.
        ValueError: arguments that do not fit each other, or more tokens than the LLM has positions.
    """
    tries = [None] * len(batch) if tries is None else list(tries)
    limits = np.broadcast_to(max_new_tokens, len(batch))
    if len(tries) != len(batch) or (limits < 1).any():
        raise ValueError(f"{len(batch)} prompts need as many tries, and answers a token or more.")
    _check_masks(backbone)
    for trie in {id(trie): trie for trie in tries if trie is not None}.values():
        _check_tokens(backbone, _steps(trie.root))
    longest = np.array([most if trie is None else trie.depth for most, trie in zip(limits, tries, strict=True)], dtype=np.int64)
    vectors = _checked(backbone, batch, vectors, longest - 1)
    answers: list[list[int]] = [[] for _ in tries]
    # An answer takes a call for each of its tokens.
    calls = 1 + int(longest.max(initial=0))
    for group in cut_into_micro_batches(batch.lengths + longest, micro_batch_tokens, calls * call_cost):
        found = _decode(backbone, batch, group, vectors, longest[group], set(stop_ids), [tries[row] for row in group])
        for prompt, answer in zip(group, found, strict=True):
            answers[prompt] = answer
    return answers


def _decode(
    backbone: Backbone,
    batch: PromptBatch,
    group: np.ndarray,
    vectors: Tensor,
    longest: np.ndarray,
    stop_ids: set[int],
    tries: list[TitleTrie | None],
) -> list[list[int]]:
    """Answer one micro-batch of prompts; see :func:`greedy`.

    A row's keys and values stand in the cache at their positions, what is behind them is padding::

        p p p p p p a a .        p = prompt, a = answer, . = padding, of a shorter prompt
        p p p a a . . . .
    """
    hidden, cache, position = _prefill(backbone, batch, group, vectors)
    answers: list[list[int]] = [[] for _ in group]
    nodes = [None if trie is None else trie.root for trie in tries]
    rows = np.arange(len(group))  # the prompt of each row of the cache
    done = np.zeros(len(group), dtype=bool)
    while True:
        tokens = _choose(logits(backbone, hidden), [nodes[row] for row in rows])
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if done[row]:
                continue
            trie, answer = tries[row], answers[row]
            if token == trie.stop_id if trie is not None else token in stop_ids:
                done[row] = True
                continue
            answer.append(token)
            if trie is None:
                done[row] = len(answer) == longest[row]
            else:
                nodes[row] = nodes[row][token]
                ending = trie.ending(nodes[row])
                if ending is not None:
                    answer += ending
                    done[row] = True
        alive = np.flatnonzero(~done[rows])
        if len(alive) == 0:
            return answers
        if len(alive) <= (1 - _DROPPED_WHEN_DONE) * len(rows):
            rows, position = rows[alive], position[alive]
            kept, width = _on(backbone, alive), int(position.max())
            cache = cache_of([(keys[kept, :, :width], values[kept, :, :width]) for keys, values in layers_of(cache)])
            tokens = tokens[kept]
        hidden = _step(backbone, tokens, position, cache)
        # A complete answer that is still in the batch stays where it is, or it might leave the LLM's positions.
        position = position + ~done[rows]


def _step(backbone: Backbone, tokens: Tensor, position: np.ndarray, cache: DynamicCache) -> Tensor:
    """Feed a token to each row at its position.

    Args:
        backbone: the LLM.
        tokens: int64 ``[B]``.
        position: int64 ``[B]``.
        cache: is extended in place.

    Returns:
        last hidden states ``[B, hidden_size]``.
    """
    where = _on(backbone, position)[:, None]
    seen = torch.arange(cache.get_seq_length(), device=backbone.device) < where
    mask = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)[:, None, None]
    hidden, _ = backbone(backbone.embedding(tokens[:, None]), where, mask, cache, use_cache=True)
    # Shorter rows get their new keys and values behind padding: sliding windows count columns, and the next token of
    # these rows is to be written there.
    row = torch.arange(len(tokens), device=backbone.device)
    for keys_values in layers_of(cache):
        for stored in keys_values:
            stored[row, :, where[:, 0]] = stored[:, :, -1].clone()
    return hidden[:, 0]


def _choose(scores: Tensor, nodes: list[_Node | None]) -> Tensor:
    """The best token of each row, int64 ``[B]``, among those that its node of a trie allows; None: among all."""
    best = scores.argmax(dim=1)
    bound = [row for row, node in enumerate(nodes) if node is not None]
    if bound:
        allowed = [sorted(nodes[row]) for row in bound]
        most = max(map(len, allowed))
        # Rows are padded by repeating a token that they allow: whatever the scores, no other can win.
        padded = np.array([tokens + tokens[:1] * (most - len(tokens)) for tokens in allowed], dtype=np.int64)
        tokens = torch.from_numpy(padded).to(scores.device)
        rows = torch.tensor(bound, device=scores.device)
        choice = scores[rows].gather(1, tokens).argmax(dim=1, keepdim=True)
        best[rows] = tokens.gather(1, choice)[:, 0]
    return best


# ---- Scoring


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
        vectors: what goes into the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        titles: for each prompt the tokens of its candidates, each of at least 1 and scored as given: with an end token
            where that is to count. Prompts may differ in how many they have, and have none.
        micro_batch_tokens: the most padded tokens in one call of the LLM (one prompt, or one row of its candidates,
            may exceed it); affects cost, not results.
        call_cost: what a call costs however few tokens it has, in tokens; affects cost, not results.

    Returns:
        for each prompt the log-probabilities of its candidates in nats, float64 ``[candidates]``, and their numbers of
        tokens, int64 ``[candidates]``, by which longer titles can be compared with shorter ones.

    Raises:
        UserError: the attention kernel takes no mask.
        ValueError: arguments that do not fit each other, or more tokens than the LLM has positions.
    """
    if len(titles) != len(batch) or not all(len(title) for candidates in titles for title in candidates):
        raise ValueError(f"{len(batch)} prompts need as many lists of candidates, each of a token or more.")
    _check_masks(backbone)
    _check_tokens(backbone, [title for candidates in titles for title in candidates])
    counts = [np.array([len(title) for title in candidates], dtype=np.int64) for candidates in titles]
    vectors = _checked(backbone, batch, vectors, np.array([count.max(initial=1) - 1 for count in counts]))
    scores = [np.zeros(len(count)) for count in counts]
    asked = np.flatnonzero([len(count) for count in counts])
    for micro_batch in cut_into_micro_batches(batch.lengths[asked], micro_batch_tokens, call_cost):
        group = asked[micro_batch]
        hidden, cache, lengths = _prefill(backbone, batch, group, vectors)

        # First tokens: all candidates of a prompt are predicted at its last token.
        first = np.zeros((len(group), max(len(titles[prompt]) for prompt in group)), dtype=np.int64)
        for row, prompt in enumerate(group):
            first[row, : len(titles[prompt])] = [title[0] for title in titles[prompt]]
        found = _log_probabilities(backbone, hidden, _on(backbone, first)).cpu().numpy()
        for row, prompt in enumerate(group):
            scores[prompt] += found[row, : len(titles[prompt])]

        # The others, a row of candidates at a time.
        parts = [(row, part) for row, prompt in enumerate(group) for part in _rows_of_candidates(counts[prompt] - 1)]
        widths = np.array([(counts[group[row]][part] - 1).sum() for row, part in parts], dtype=np.int64)
        layers = layers_of(cache)
        for some in cut_into_micro_batches(widths, micro_batch_tokens, call_cost):
            rows = np.array([parts[index][0] for index in some])
            prompts, chosen = group[rows], [parts[index][1] for index in some]
            candidates = [
                [titles[prompt][title] for title in part] for prompt, part in zip(prompts, chosen, strict=True)
            ]
            found = _score_rows(backbone, candidates, rows, lengths[rows], layers)
            for prompt, part, values in zip(prompts, chosen, found, strict=True):
                scores[prompt][part] += values
    return scores, counts


def _rows_of_candidates(lengths: np.ndarray) -> list[np.ndarray]:
    """Cut a prompt's candidates, of which ``lengths`` tokens are to be fed, into rows; those with none are left out."""
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

    candidate = _on(backbone, owner)
    causal = torch.ones(width, width, dtype=torch.bool, device=backbone.device).tril()
    own = (candidate[:, :, None] == candidate[:, None]) & causal
    prompt = torch.arange(longest, device=backbone.device) < _on(backbone, lengths)[:, None]
    mask = torch.cat([prompt[:, None].expand(-1, width, -1), own], dim=2)[:, None]
    kept = _on(backbone, rows)
    past = cache_of([(keys[kept, :, :longest], values[kept, :, :longest]) for keys, values in layers])
    read = candidate >= 0
    embeddings = backbone.embedding(_on(backbone, tokens))
    hidden, _ = backbone(embeddings, _on(backbone, position), mask, past, read=read)
    found = _log_probabilities(backbone, hidden[read], _on(backbone, targets)[read][:, None])[:, 0].cpu().numpy()
    every = np.concatenate(sizes)
    sums = np.add.reduceat(found.astype(np.float64), np.cumsum(every) - every)
    return np.split(sums, np.cumsum([len(size) for size in sizes])[:-1])


# ---- What they share


def _prefill(
    backbone: Backbone, batch: PromptBatch, group: np.ndarray, vectors: Tensor
) -> tuple[Tensor, DynamicCache, np.ndarray]:
    """Run prompts through the LLM.

    Returns:
        the last hidden state of each, ``[B, hidden_size]``; their keys and values, right padded; their lengths.
    """
    embeddings, lengths = _embed(backbone, batch, group, vectors)
    read = _on(backbone, np.arange(embeddings.shape[1]) == lengths[:, None] - 1)
    positions = torch.arange(embeddings.shape[1], device=backbone.device)[None]
    hidden, cache = backbone(embeddings, positions, use_cache=True, read=read)
    return hidden[read], cache, lengths


def _embed(
    backbone: Backbone,
    batch: PromptBatch,
    group: np.ndarray,
    vectors: Tensor,
    tails: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Input vectors of prompts, each followed by its tail, right padded ``[B, longest, input_size]``; their lengths."""
    tails = [()] * len(group) if tails is None else tails
    lengths = batch.lengths[group] + np.array([len(tail) for tail in tails], dtype=np.int64)
    tokens = np.zeros((len(group), int(lengths.max())), dtype=np.int64)
    which = np.full(tokens.shape, -1, dtype=np.int64)
    for row, (prompt, tail) in enumerate(zip(group, tails, strict=True)):
        here = slice(batch.offsets[prompt], batch.offsets[prompt + 1])
        end = here.stop - here.start
        tokens[row, :end], which[row, :end] = batch.tokens[here], batch.vector_index[here]
        tokens[row, end : lengths[row]] = tail
    embeddings = backbone.embedding(_on(backbone, tokens.clip(min=0))).to(backbone.dtype)
    slots = np.nonzero(which >= 0)
    if len(slots[0]):
        places = tuple(_on(backbone, index) for index in slots)
        embeddings = embeddings.index_put(places, vectors[_on(backbone, which[slots])])
    return embeddings, lengths


def _checked(backbone: Backbone, batch: PromptBatch, vectors: Tensor, fed: np.ndarray) -> Tensor:
    """Check prompts and vectors, ``fed`` tokens being fed after each prompt; return the vectors in the LLM's type."""
    if (batch.lengths < 1).any():
        raise ValueError("a prompt has no token.")
    needed = int(batch.vector_index.max(initial=-1)) + 1
    if vectors.dim() != 2 or len(vectors) < needed or vectors.shape[1] != backbone.input_size:
        raise ValueError(f"vectors must be [{needed}, {backbone.input_size}], not {list(vectors.shape)}.")
    longest = int((batch.lengths + fed).max(initial=0))
    if longest > backbone.context_length:
        raise ValueError(
            f"a prompt with its answer has {longest} tokens, and the LLM {backbone.context_length} positions; "
            "shorten the prompts."
        )
    return vectors.to(backbone.device, backbone.dtype)


def _check_tokens(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse tokens without an embedding: a tokenizer may know more than its model has rows for."""
    rows = backbone.embedding.weight.shape[0]
    for sequence in sequences:
        if len(sequence) and not (0 <= min(sequence) and max(sequence) < rows):
            raise ValueError(f"a title holds a token outside the LLM's vocabulary of {rows}: {list(sequence)}.")


def _check_masks(backbone: Backbone) -> None:
    if not backbone.supports_masks:
        raise UserError(
            f"attn_implementation: {backbone.attn_implementation} takes no attention mask, as titles that are decoded "
            "or scored in batches need; use sdpa."
        )


def _steps(root: _Node) -> list[list[int]]:
    """The tokens at each node of a trie."""
    steps, nodes = [], [root]
    while nodes:
        node = nodes.pop()
        steps.append(list(node))
        nodes += node.values()
    return steps


def _on(backbone: Backbone, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(backbone.device)
