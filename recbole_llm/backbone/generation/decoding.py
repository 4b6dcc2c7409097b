"""Greedy decoding of titles, free or constrained to candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import cache_of, layers_of
from recbole_llm.backbone.generation.inputs import check_inputs, check_masks, check_tokens, prefill, to_device
from recbole_llm.backbone.generation.vocabulary import logits
from recbole_llm.processes import group as processes
from recbole_llm.processes import tensors
from recbole_llm.prompt.batch import PromptBatch, cut_into_micro_batches

_Node = dict[int, Any]  # token -> the node after it; the stop token's is empty
_DROPPED_WHEN_DONE = 0.25  # share of a batch's rows; copying the others' keys and values costs about a step


class TitleTrie:
    """The candidate titles of a prompt as a trie of tokens.

    Args:
        sequences: tokens of each candidate, without the stop token. One may be a prefix of another, or occur twice.
        stop_id: the token that ends an answer.

    Attributes:
        stop_id: see above.
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

    def ending(self, node: _Node) -> list[int] | None:
        """Tokens from ``node`` to the end of the only candidate left, without the stop token; None if several are left."""
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
    """Answer each prompt by the most likely token at each step.

    Args:
        backbone: the LLM, in evaluation mode.
        batch: N prompts, each of at least 1 token.
        vectors: the input vectors of the slots, ``[V, input_size]``; row order as in ``PromptBatch.vector_index``.
        max_new_tokens: the most tokens of a free answer, the stop token among them; at least 1, for all prompts or for
            each. A constrained answer is as long as its candidate.
        stop_ids: tokens that end a free answer.
        micro_batch_tokens: the most padded tokens, prompts and answers, in one call of the LLM and in its cache.
        call_cost: the fixed cost of a call, in tokens; affects cost, not results.
        tries: for each prompt its candidates, None for a free answer; None: all answers are free. At each step the
            most likely token that leads to a candidate is taken, so that the answer is one of them.

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
    check_masks(backbone)
    for trie in {id(trie): trie for trie in tries if trie is not None}.values():
        check_tokens(backbone, _tokens_of_nodes(trie.root))
    longest = np.array([most if trie is None else trie.depth for most, trie in zip(limits, tries, strict=True)], dtype=np.int64)
    vectors = check_inputs(backbone, batch, vectors, longest - 1)
    answers: list[list[int]] = [[] for _ in tries]
    # An answer takes a call for each of its tokens.
    calls = 1 + int(longest.max(initial=0))
    divided = tensors.shares(batch.lengths + longest)
    mine = np.arange(len(batch)) if divided is None else divided[processes.rank()]
    for part in cut_into_micro_batches((batch.lengths + longest)[mine], micro_batch_tokens, calls * call_cost):
        group = mine[part]
        decoded = _decode(backbone, batch, group, vectors, longest[group], set(stop_ids), [tries[row] for row in group])
        for prompt, answer in zip(group, decoded, strict=True):
            answers[prompt] = answer
    return tensors.gather_lists([answers[prompt] for prompt in mine], divided, backbone.device)


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

    A row's keys and values are in the cache at their positions, followed by padding::

        p p p p p p a a .        p = prompt, a = answer, . = padding, of a shorter prompt
        p p p a a . . . .
    """
    hidden, cache, position = prefill(backbone, batch, group, vectors)
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
            remaining, width = to_device(backbone, alive), int(position.max())
            cache = cache_of(
                [(keys[remaining, :, :width], values[remaining, :, :width]) for keys, values in layers_of(cache)]
            )
            tokens = tokens[remaining]
        hidden = _step(backbone, tokens, position, cache)
        # A complete answer that is still in the batch does not advance: it might exceed the LLM's positions.
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
    where = to_device(backbone, position)[:, None]
    seen = torch.arange(cache.get_seq_length(), device=backbone.device) < where
    mask = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)[:, None, None]
    hidden, _ = backbone(backbone.embedding(tokens[:, None]), where, mask, cache, use_cache=True)
    # The cache appends new keys and values after the padding of shorter rows. Move them to their positions: sliding windows
    # count columns, and the next token is written after them.
    row = torch.arange(len(tokens), device=backbone.device)
    for keys_values in layers_of(cache):
        for stored in keys_values:
            stored[row, :, where[:, 0]] = stored[:, :, -1].clone()
    return hidden[:, 0]


def _choose(scores: Tensor, nodes: list[_Node | None]) -> Tensor:
    """The best token of each row, int64 ``[B]``, among those that its node of a trie allows; None: among all."""
    best = scores.argmax(dim=1)
    constrained = [row for row, node in enumerate(nodes) if node is not None]
    if constrained:
        allowed = [sorted(nodes[row]) for row in constrained]
        most = max(map(len, allowed))
        # Rows are padded by repeating a token that they allow, so that no other can win, whatever the scores.
        padded = np.array([tokens + tokens[:1] * (most - len(tokens)) for tokens in allowed], dtype=np.int64)
        tokens = torch.from_numpy(padded).to(scores.device)
        rows = torch.tensor(constrained, device=scores.device)
        choice = scores[rows].gather(1, tokens).argmax(dim=1, keepdim=True)
        best[rows] = tokens.gather(1, choice)[:, 0]
    return best


def _tokens_of_nodes(root: _Node) -> list[list[int]]:
    """The tokens at each node of a trie."""
    tokens, nodes = [], [root]
    while nodes:
        node = nodes.pop()
        tokens.append(list(node))
        nodes += node.values()
    return tokens
