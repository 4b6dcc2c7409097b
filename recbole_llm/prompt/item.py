"""Prompts of one item each: a sentence, the item's text, and an out token whose hidden state is the item's vector::

    <prefix> Compress the following sentence into embedding: The Birds [ITEM]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import OUT_TOKEN, PromptBatch
from recbole_llm.prompt.pieces import Encode, PieceTable


class ItemPrompts:
    """Builds the prompts of items from their ids.

    Args:
        encode: see :class:`~recbole_llm.prompt.pieces.PieceTable`.
        item_texts: text of each item, index = internal item id; index 0 is padding.
        sentence: opens each prompt.
        max_item_tokens: the most tokens of a prompt before the out token; the item's text is cut.
        prefix_ids: token ids that the tokenizer puts before a text (such as a BOS token).

    Raises:
        UserError: ``max_item_tokens`` leaves no room for a text.
    """

    def __init__(
        self, encode: Encode, item_texts: Sequence[str], sentence: str, max_item_tokens: int, prefix_ids: Sequence[int] = ()
    ) -> None:
        self.table = PieceTable(encode)
        self._prefix, self._out = self.table.append([list(prefix_ids), [OUT_TOKEN]])
        self._sentence = self.table.texts([sentence.rstrip()])[0]
        self._header_length = int(self.table.lengths[[self._prefix, self._sentence]].sum())
        room = max_item_tokens - self._header_length
        if room < 1:
            raise UserError(
                f"max_item_tokens: {max_item_tokens} leaves no room for an item's text after the {self._header_length} tokens "
                f"of item_prompt; raise it."
            )
        # A space belongs to the word after it, as in the texts that an LLM was trained on.
        self._item = self.table.append([ids[:room] for ids in encode([" " + text for text in item_texts])])

    def __call__(self, items: np.ndarray) -> PromptBatch:
        """Build the prompt of each item. ``items``: internal ids int64 ``[N]``."""
        pieces = np.tile(np.array([self._prefix, self._sentence, -1, self._out], dtype=np.int64), (len(items), 1))
        pieces[:, 2] = self._item[items]
        tokens, starts = self.table.gather(pieces.ravel())
        return PromptBatch.build(
            tokens=tokens,
            offsets=starts[:: pieces.shape[1]],
            slot_items=np.zeros(0, dtype=np.int64),
            out_tokens=1,
            header_length=self._header_length,
        )
