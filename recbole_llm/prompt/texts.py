"""Prompts that are item texts and nothing else::

    user    Toy Story (1995); GoldenEye (1995); Twelve Monkeys (1995); </s>
    item    Twelve Monkeys (1995); </s>

No instruction, ranks, dates or vectors: the hidden state at the token that ends a text stands for all of it (Tang et al., "One
Model for All: Large Language Models are Domain-Agnostic Recommendation Systems", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recbole_llm.prompt.pieces import Encode
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings

ITEM_END = "; "  # as in the paper's public code: a part of the item's text, and cut with it


class TextPrompts(PromptBuilder):
    """Builds user and item prompts of texts alone.

    Args:
        encode, item_texts, prefix_ids: see :class:`PromptBuilder`.
        settings: of these, the limits; wording and vectors are none.
    """

    def __init__(
        self, encode: Encode, item_texts: Sequence[str], settings: PromptSettings, prefix_ids: Sequence[int] = ()
    ) -> None:
        bare = replace(settings, sentence="", request="", item_vectors=False, user_vector=False, marker=False, out_tokens=1)
        super().__init__(encode, item_texts, bare, None, prefix_ids)
        empty = self.table.append([[]])[0]
        self._sentence = self._request = self._quote = self._joint = self._item_header = self._item_request = empty
        self._rank[:] = empty
        self._header_tokens = dict.fromkeys(self._header_tokens, len(prefix_ids))

    def _title_pieces(self, texts: Sequence[str]) -> np.ndarray:
        return super()._title_pieces([text + ITEM_END for text in texts])
