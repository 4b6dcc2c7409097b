"""Sentences of items, each item's attributes as names and values, the latest item first.

(Li et al., "Text Is All You Need: Learning Language Representations for Sequential Recommendation", KDD 2023, section 2.2.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from recbole_llm.prompt.pieces import Encode

NAME, VALUE = 1, 2


class ItemTokens(NamedTuple):
    """An item's attributes, flattened: token ids and which of them are names or values, each int64 ``[n]``."""

    tokens: np.ndarray
    kinds: np.ndarray


class ItemSentences:
    """Builds the sentences of a dataset.

    Args:
        encode: texts to token ids, with nothing added.
        names, values: of each item's attributes, index = internal item id; index 0 is padding.
        first: token id that a sentence begins with.
        most_items, most_tokens: of a sentence; the earliest items go first, and what is left over is cut.
        most_attributes: of an item.
        most_attribute_tokens: of an attribute, its name included.
    """

    def __init__(
        self,
        encode: Encode,
        names: Sequence[Sequence[str]],
        values: Sequence[Sequence[str]],
        first: int,
        most_items: int,
        most_tokens: int,
        most_attributes: int,
        most_attribute_tokens: int,
    ) -> None:
        self._first, self._most_items, self._most_tokens = first, most_items, most_tokens
        pairs = [list(zip(*both, strict=True))[:most_attributes] for both in zip(names, values, strict=True)]
        encoded = iter(encode(list(chain.from_iterable(chain.from_iterable(pairs)))))
        self._items = []
        for attributes in pairs:
            tokens: list[int] = []
            kinds: list[int] = []
            for _ in attributes:
                name, value = next(encoded), next(encoded)
                tokens += [*name, *value][:most_attribute_tokens]
                kinds += [*[NAME] * len(name), *[VALUE] * len(value)][:most_attribute_tokens]
            self._items.append(ItemTokens(np.array(tokens, dtype=np.int64), np.array(kinds, dtype=np.int64)))

    def sentence(self, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, kinds and places of items given oldest first: the latest stands first, in place 1."""
        shown = [self._items[item] for item in items[::-1][: self._most_items]]
        tokens = np.concatenate([[self._first], *(item.tokens for item in shown)])
        kinds = np.concatenate([[0], *(item.kinds for item in shown)])
        places = np.repeat(np.arange(len(shown) + 1), [1, *(len(item.tokens) for item in shown)])
        limit = self._most_tokens
        return tokens[:limit].astype(np.int64), kinds[:limit].astype(np.int64), places[:limit].astype(np.int64)


def mask_words(
    tokens: np.ndarray, begins_word: np.ndarray, share: float, mask: int, vocabulary: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hide whole words: 80 % of their tokens behind the mask, 10 % behind random tokens, 10 % not at all.

    Args:
        tokens: of a sentence, int64 ``[T]``; the first is never hidden.
        begins_word: whether a token, by its id, begins a word, bool.
        share: of the sentence's tokens that is hidden, and at least one where a word of one token is left.
        mask: id of the mask.
        vocabulary: how many tokens there are.
        rng: source of randomness.

    Returns:
        the tokens with what is hidden, and what is to be predicted: the true token, -100 elsewhere.
    """
    words = np.cumsum(begins_word[tokens[1:]] | (np.arange(len(tokens) - 1) == 0))
    wanted, hidden = max(1, round(len(tokens) * share)), np.zeros(len(tokens), dtype=bool)
    for word in rng.permutation(words.max(initial=0)) + 1:
        places = np.flatnonzero(words == word) + 1
        if hidden.sum() + len(places) <= wanted:
            hidden[places] = True
        if hidden.sum() >= wanted:
            break
    shown, kind = tokens.copy(), rng.random(len(tokens))
    shown[hidden & (kind < 0.8)] = mask
    drawn = hidden & (kind >= 0.8) & (kind < 0.9)
    shown[drawn] = rng.integers(0, vocabulary, int(drawn.sum()))
    return shown, np.where(hidden, tokens, -100)
