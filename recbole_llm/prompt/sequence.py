"""Prompts of item texts, each followed by a query token.

::

    history     {item text}[Q]{item text}[Q]{item text}[Q]
    alignment   Please give the ID of the following item: {item text}[Q]

(Zhai et al., "Learning Transition Patterns by Large Language Models for Sequential Recommendation", 2025, equations 2 and 6.)

An item's text has the same token ids in every prompt. It is joined from the item's attributes (title, brand, categories),
each of which is cut before they are joined, so that a long title leaves room for the brand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import OUT_TOKEN, PromptBatch
from recbole_llm.prompt.pieces import Encode, PieceTable, latest_that_fit


@dataclass(frozen=True)
class SequencePromptSettings:
    """Limits of the prompts.

    Attributes:
        history_length: the most items in a prompt; the latest are kept.
        max_prompt_tokens: the most tokens in a prompt; whole oldest items go first.
        max_attribute_tokens: the most tokens of one attribute of an item.
        separator: what stands between the attributes of an item.
        queries: ``all``: a query token after each item; ``last``: after the last item only.
        query_ids: token ids of a query that is a text: the last is read, and its vector given like a learned one's. Empty:
            a learned one.
        instruction: opens an alignment prompt.
    """

    history_length: int = 50
    max_prompt_tokens: int = 1024
    max_attribute_tokens: int = 32
    separator: str = ", "
    queries: str = "all"
    query_ids: tuple[int, ...] = ()
    instruction: str = "Please give the ID of the following item: "


class SequencePrompts:
    """Builds the prompts of a dataset from item ids.

    Args:
        encode: see :class:`~recbole_llm.prompt.pieces.PieceTable`.
        item_attributes: texts of each item, index = internal item id; index 0 is padding.
        settings: see :class:`SequencePromptSettings`.
        prefix_ids: token ids that the tokenizer puts before a text (such as a BOS token).

    Raises:
        UserError: ``max_prompt_tokens`` is too small for a prompt.
    """

    def __init__(
        self,
        encode: Encode,
        item_attributes: Sequence[Sequence[str]],
        settings: SequencePromptSettings,
        prefix_ids: Sequence[int] = (),
    ) -> None:
        self.settings = settings
        self.table = PieceTable(encode)
        query = [*settings.query_ids[:-1], OUT_TOKEN]
        self._prefix, self._query, self._empty = self.table.append([list(prefix_ids), query, []])
        self._instruction = self.table.texts([settings.instruction])[0]
        # An item that is too long by itself is cut, so that it fits after the instruction as well.
        self._header_length = int(self.table.lengths[[self._prefix, self._instruction]].sum())
        room = settings.max_prompt_tokens - self._header_length - max(1, len(settings.query_ids))
        if room < 1:
            raise UserError(
                f"max_prompt_tokens: {settings.max_prompt_tokens} leaves no room for an item after the {self._header_length} "
                f"tokens of the ID alignment's instruction; raise it."
            )
        self._item = self.table.append([ids[:room] for ids in self._item_tokens(encode, item_attributes)])

    def _item_tokens(self, encode: Encode, item_attributes: Sequence[Sequence[str]]) -> list[list[int]]:
        """Token ids of each item's text: its attributes, each cut, with the separator between them."""
        limit = self.settings.max_attribute_tokens
        # A space belongs to the word after it, as in the texts that an LLM was trained on.
        mark = self.settings.separator.rstrip()
        lead = self.settings.separator[len(mark) :]
        joint = encode([mark])[0]
        texts = [(lead if place else "") + text for texts in item_attributes for place, text in enumerate(texts)]
        encoded = iter(encode(texts))
        items = []
        for texts in item_attributes:
            parts = [next(encoded)[:limit] for _ in texts]
            items.append(list(chain.from_iterable((joint if place else []) + part for place, part in enumerate(parts))))
        return items

    def sequences(self, history: np.ndarray, lengths: np.ndarray, last_only: bool = False) -> PromptBatch:
        """Build the prompt of each history: its latest items that fit.

        Args:
            history: item ids int64 ``[B, L]``, right padded with 0, oldest first.
            lengths: items in each history int64 ``[B]``, at least 1.
            last_only: read the hidden state at the last query token only, however many the prompt has.
        """
        rows, every = len(lengths), self.settings.queries == "all"
        most = min(self.settings.history_length, history.shape[1])
        # Aligned to the right: column -1 is the latest item.
        source = lengths[:, None] + np.arange(-most, 0)
        items = np.where(source >= 0, np.take_along_axis(history, source.clip(min=0), axis=1), 0)
        query = int(self.table.lengths[self._query])
        fixed = self.table.lengths[self._prefix] + query * (not every)
        sizes = self.table.lengths[self._item[items]] + query * every
        shown = latest_that_fit(sizes, source >= 0, self.settings.max_prompt_tokens - fixed)

        pieces = np.full((rows, 1 + most, 2), self._empty, dtype=np.int64)
        pieces[:, 0, 1] = self._prefix
        pieces[:, 1:, 0] = np.where(shown, self._item[items], self._empty)
        queried = shown if every else np.arange(-most, 0) == -1
        pieces[:, 1:, 1] = np.where(queried, self._query, self._empty)
        tokens, starts = self.table.gather(pieces.ravel())
        batch = PromptBatch.build(
            tokens=tokens,
            offsets=starts[:: 2 * (1 + most)],
            slot_items=np.zeros(0, dtype=np.int64),
            out_tokens=1,
            header_length=0,
            reads=shown.sum(axis=1) if every else np.ones(rows, dtype=np.int64),
        )
        return replace(batch, out_positions=batch.out_positions[:, -1:]) if last_only else batch

    def alignments(self, items: np.ndarray) -> PromptBatch:
        """Build the prompt that asks for the ID of each item. ``items``: internal ids int64 ``[N]``."""
        template = [self._prefix, self._instruction, -1, self._query]
        pieces = np.tile(np.array(template, dtype=np.int64), (len(items), 1))
        pieces[:, 2] = self._item[items]
        tokens, starts = self.table.gather(pieces.ravel())
        return PromptBatch.build(
            tokens=tokens,
            offsets=starts[:: len(template)],
            slot_items=np.zeros(0, dtype=np.int64),
            out_tokens=1,
            header_length=self._header_length,
        )
