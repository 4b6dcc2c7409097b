"""A ragged batch of prompts: token ids, positions of the input vectors, positions whose hidden states are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Placeholders among the token ids, by what replaces them:
SLOT_TOKEN = -1  # an item's vector
OUT_TOKEN = -2  # a learned vector; the hidden state at its position is read
USER_TOKEN = -3  # the vector of the prompt's user
MARKER_TOKEN = -4  # a learned vector that announces an item's vector


@dataclass(frozen=True)
class PromptBatch:
    """N concatenated prompts, without padding::

        tokens       7 7 4 4 4 -1 8 -2 | 7 7 5 5 -1 8 -2
        offsets      0                   8               15
        header       7 7                 7 7                 (the same in every prompt, no vector in it)
        vector_index . . . . .  0 .  2   . . . .  1 . 2      (row of the vectors given to the encoder)

    Attributes:
        tokens: token ids int32 ``[T]``; negative where a vector goes in.
        offsets: int64 ``[N + 1]``.
        slot_items: item id of each slot in order of position, int64 ``[S]``.
        vector_items: distinct items among ``slot_items``, int64 ``[V]``: row v of the encoder's vectors is item v's.
        vector_index: int64 ``[T]``: row of the vectors for a slot or out token, -1 elsewhere. Out token k of a prompt
            takes row V + k, the marker the next one, the user's slot of prompt n the n-th of those that then follow.
        out_positions: flat positions of the out tokens int64 ``[N, out_tokens]``. Where prompts differ in their number of out
            tokens, ``[N, most of a prompt]``: one that has fewer repeats its last.
        header_length: leading tokens that all prompts have in common.
        parent: for a perturbed prompt, and for one of a part of another's history, the prompt whose beginning it shares, which
            has no parent itself; else -1; int64 ``[N]``.
        shared: how many leading tokens such a prompt has in common with its parent, header included; int64 ``[N]``.
        pooled: start and end, within the prompt, of the part of each prompt whose hidden states can be averaged: the
            history, or the item; int64 ``[N, 2]``. None: prompts without such a part.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    slot_items: np.ndarray
    vector_items: np.ndarray
    vector_index: np.ndarray
    out_positions: np.ndarray
    header_length: int
    parent: np.ndarray
    shared: np.ndarray
    pooled: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        tokens: np.ndarray,
        offsets: np.ndarray,
        slot_items: np.ndarray,
        out_tokens: int,
        header_length: int,
        parent: np.ndarray | None = None,
        shared: np.ndarray | None = None,
        pooled: np.ndarray | None = None,
        reads: np.ndarray | None = None,
    ) -> PromptBatch:
        """Locate slots and out tokens in ``tokens`` and build the batch.

        Args:
            reads: number of out tokens of each prompt, int64 ``[N]``, at least 1, where prompts differ in it; they all take
                the same vector then, and ``out_tokens`` is 1.

        The other arguments are attributes, or what the attributes follow from.
        """
        count = len(offsets) - 1
        vector_items, slot_row = np.unique(slot_items, return_inverse=True)
        vector_index = np.full(len(tokens), -1, dtype=np.int64)
        vector_index[tokens == SLOT_TOKEN] = slot_row
        out_positions = np.flatnonzero(tokens == OUT_TOKEN)
        if reads is None:
            out_positions = out_positions.reshape(count, out_tokens)
        else:
            column = np.minimum(np.arange(reads.max(initial=1)), reads[:, None] - 1)
            out_positions = out_positions[(np.cumsum(reads) - reads)[:, None] + column]
        vector_index[out_positions] = len(vector_items) + np.arange(out_tokens)
        markers = tokens == MARKER_TOKEN
        vector_index[markers] = len(vector_items) + out_tokens
        users = np.flatnonzero(tokens == USER_TOKEN)
        first = len(vector_items) + out_tokens + int(markers.any())
        vector_index[users] = first + np.searchsorted(offsets, users, side="right") - 1
        return cls(
            tokens=tokens,
            offsets=offsets,
            slot_items=slot_items,
            vector_items=vector_items,
            vector_index=vector_index,
            out_positions=out_positions,
            header_length=header_length,
            parent=np.full(count, -1, dtype=np.int64) if parent is None else parent,
            shared=np.zeros(count, dtype=np.int64) if shared is None else shared,
            pooled=pooled,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def is_read(self) -> np.ndarray:
        """Where ``out_positions`` names an out token for the first time, bool of its shape."""
        first = np.ones(self.out_positions.shape, dtype=bool)
        first[:, 1:] = self.out_positions[:, 1:] != self.out_positions[:, :-1]
        return first

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each prompt, int64 ``[N]``."""
        return np.diff(self.offsets)


def cut_into_micro_batches(lengths: np.ndarray, budget: int, call_cost: int) -> list[np.ndarray]:
    """Partition prompts into padded micro-batches at the least total cost.

    A micro-batch of n prompts, the longest of l tokens, costs ``n * l + call_cost``: its padded tokens, plus the fixed cost
    of a call. Dynamic programming finds the best partition of the prompts sorted by length.

    Args:
        lengths: tokens in each prompt, int64 ``[N]``.
        budget: the most padded tokens in one micro-batch (one prompt alone may exceed it).
        call_cost: the fixed cost of one call of the LLM, in tokens.

    Returns:
        index arrays, together a permutation of ``range(N)``; longest prompts first, so that memory peaks early.
    """
    count = len(lengths)
    if count == 0:
        return []
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order].astype(np.int64)
    best = np.zeros(count + 1)
    cut = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        longest = max(int(sizes[end - 1]), 1)
        start = max(0, end - max(1, budget // longest))
        begins = np.arange(start, end)
        cost = best[begins] + (end - begins) * longest + call_cost
        choice = int(cost.argmin())
        best[end], cut[end] = cost[choice], begins[choice]
    parts = []
    end = count
    while end > 0:
        parts.append(order[cut[end] : end])
        end = int(cut[end])
    return parts
