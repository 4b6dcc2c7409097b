"""Pieces of prompts: token ids of fixed text and of items, tokenized once per dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import MARKER_TOKEN, SLOT_TOKEN

_TEXTS_AT_ONCE = 1 << 15

Encode = Callable[[list[str]], list[list[int]]]


class PieceTable:
    """A growing ragged table of token ids: piece number -> token ids.

    Args:
        encode: turns a list of texts into lists of token ids, special tokens in the text read as plain text.
    """

    def __init__(self, encode: Encode) -> None:
        self.encode = encode
        self._flat = np.zeros(1024, dtype=np.int32)
        self._offsets = np.zeros(257, dtype=np.int64)
        self._count = 0
        self._number_of_text: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each piece, int64 ``[pieces]``."""
        return np.diff(self._offsets[: self._count + 1])

    def append(self, pieces: Sequence[Sequence[int]]) -> np.ndarray:
        """Add pieces given as token ids; return their numbers, int64 ``[len(pieces)]``."""
        lengths = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
        start = int(self._offsets[self._count])
        end = start + int(lengths.sum())
        if end > len(self._flat):
            self._flat = np.concatenate([self._flat, np.zeros(max(end, len(self._flat)), dtype=np.int32)])
        if self._count + len(pieces) + 1 > len(self._offsets):
            room = max(self._count + len(pieces) + 1, len(self._offsets))
            self._offsets = np.concatenate([self._offsets, np.zeros(room, dtype=np.int64)])
        if end > start:
            self._flat[start:end] = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces])
        self._offsets[self._count + 1 : self._count + 1 + len(pieces)] = start + np.cumsum(lengths)
        numbers = np.arange(self._count, self._count + len(pieces), dtype=np.int64)
        self._count += len(pieces)
        return numbers

    def append_texts(self, texts: Sequence[str], limit: int) -> np.ndarray:
        """Add the first ``limit`` tokens of each text as a piece; return their numbers, int64 ``[len(texts)]``.

        Some texts at a time: lists of Python integers take ten times the memory of the table.
        """
        parts = [list(texts[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        numbers = [self.append([ids[:limit] for ids in self.encode(part)]) for part in parts]
        return np.concatenate([np.empty(0, np.int64), *numbers])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the piece number of each text, tokenizing only texts never seen before; int64 ``[len(texts)]``."""
        new = [text for text in dict.fromkeys(texts) if text not in self._number_of_text]
        if new:
            for text, number in zip(new, self.append(self.encode(new)), strict=True):
                self._number_of_text[text] = int(number)
        return np.fromiter((self._number_of_text[text] for text in texts), dtype=np.int64, count=len(texts))

    def gather(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate pieces.

        Returns:
            token ids int32 ``[tokens]`` and the first token of each piece int64 ``[len(pieces) + 1]``.
        """
        lengths = self._offsets[pieces + 1] - self._offsets[pieces]
        starts = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        source = np.arange(starts[-1]) + np.repeat(self._offsets[pieces] - starts[:-1], lengths)
        return self._flat[source], starts


def latest_that_fit(sizes: np.ndarray, inside: np.ndarray, room: np.ndarray | int) -> np.ndarray:
    """Choose the items of each history that a prompt can hold: the latest ones, whole; the latest of all in any case.

    Args:
        sizes: tokens of each item, with all that a prompt puts around it, int64 ``[B, L]``.
        inside: which columns hold an item, bool ``[B, L]``, oldest first.
        room: the most tokens of all items of a row, int64 ``[B]`` or a number for all rows.

    Returns:
        bool ``[B, L]``, within ``inside``.
    """
    from_latest = np.cumsum(np.where(inside, sizes, 0)[:, ::-1], axis=1)[:, ::-1]
    place = np.cumsum(inside[:, ::-1], axis=1)[:, ::-1]  # 1 = the latest item
    return inside & ((place == 1) | (from_latest <= np.reshape(room, (-1, 1))))


def check_room(needed: int, limit: int) -> None:
    """Check that a prompt with the longest item alone fits: then every prompt keeps its request and its latest item.

    Args:
        needed: tokens of that prompt.
        limit: the most tokens of a prompt.

    Raises:
        UserError: naming ``max_prompt_tokens`` and what it must be at least.
    """
    if needed > limit:
        raise UserError(
            f"max_prompt_tokens: a prompt with the longest item alone takes {needed} tokens, and {limit} are allowed by the "
            f"key or the LLM's context: set it to {needed} or more, lower max_item_tokens, or take an LLM of longer context."
        )


def slot_tokens(item_vectors: bool, marker: bool) -> list[int]:
    """Tokens after an item's text: its slot, after a marker where there are markers; none in text-only prompts."""
    if not item_vectors:
        return []
    return [MARKER_TOKEN, SLOT_TOKEN] if marker else [SLOT_TOKEN]


def after_user_slot(sentence: str) -> str:
    """The opening of a prompt that begins with the user's slot."""
    return f", and {sentence[:1].lower()}{sentence[1:]}"
