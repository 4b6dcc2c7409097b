"""Prompts that list what a user liked and disliked and ask whether the user will enjoy a target item."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.pieces import Encode, PieceTable, latest_that_fit

PLACES = ("{liked}", "{disliked}", "{target}")


@dataclass(frozen=True)
class YesNoPromptSettings:
    """The wording of the prompts and their limits.

    Attributes:
        template: with ``{liked}``, ``{disliked}`` and ``{target}``, in any order.
        history_length: the most items of the history, liked and disliked together; the latest are kept.
        max_prompt_tokens: the most tokens in a prompt; whole oldest items of the history go first, the target never.
        max_item_tokens: the most tokens of one item's text.
        empty_list: what a list without an item reads.
    """

    template: str
    history_length: int = 10
    max_prompt_tokens: int = 1024
    max_item_tokens: int = 256
    empty_list: str = "none"


class YesNoPrompts:
    """Builds prompts in the manner of Bao et al. (RecSys 2023)::

        ... Liked movies: "{title}", "{title}". Disliked movies: none. Target movie: "{title}". Will the user ...? Answer:

    Within each list the items are in temporal order. An empty list reads ``none``, or as the settings say.

    Args:
        encode, item_texts: as in :class:`~recbole_llm.prompt.retrieval.PromptBuilder`.
        settings: wording and limits.
        prefix_ids: token ids that the tokenizer puts before a text.
        suffix_ids: token ids after the prompt: those with which both answers begin.

    Raises:
        UserError: a template without its three placeholders.
    """

    def __init__(
        self,
        encode: Encode,
        item_texts: Sequence[str],
        settings: YesNoPromptSettings,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
    ) -> None:
        if any(settings.template.count(place) != 1 for place in PLACES):
            raise UserError(f"yes_no_prompt: {settings.template!r} must hold {', '.join(PLACES)} once each.")
        self.settings = settings
        self.table = PieceTable(encode)
        opened, closed = encode([' "', '"'])
        limit = settings.max_item_tokens
        self._title = self.table.append([[*opened, *ids[:limit], *closed] for ids in encode(list(item_texts))])
        self._prefix, self._suffix = self.table.append([list(prefix_ids), list(suffix_ids)])
        self._joint, self._none, self._empty = self.table.texts([",", f" {settings.empty_list}", ""])
        texts = re.split("({liked}|{disliked}|{target})", settings.template)
        # The space before a title belongs to its quotation mark.
        self._texts, self._places = self.table.texts([text.rstrip() for text in texts[::2]]), texts[1::2]

    def prompts(self, history: np.ndarray, lengths: np.ndarray, liked: np.ndarray, targets: np.ndarray) -> PromptBatch:
        """Build the prompt of each row.

        Args:
            history: item ids int64 ``[B, L]``, right padded with 0, oldest first.
            lengths: items in each history int64 ``[B]``, at least 1.
            liked: whether the user liked each item of the history, bool ``[B, L]``.
            targets: item ids int64 ``[B]``.

        Returns:
            B prompts without slots and out tokens.

        Raises:
            UserError: the target and the latest item alone are longer than ``max_prompt_tokens``.
        """
        rows, most = len(targets), min(self.settings.history_length, history.shape[1])
        count = np.minimum(lengths, most)
        column = np.arange(most)
        source = np.clip((lengths - count)[:, None] + column, 0, history.shape[1] - 1)
        items, liked = np.take_along_axis(history, source, axis=1), np.take_along_axis(liked, source, axis=1)

        # Each item is counted with a comma, and both lists as if they were empty, which never keeps too many.
        size = self.table.lengths
        fixed = size[[self._prefix, *self._texts, self._none, self._none, self._suffix]].sum() + size[self._title[targets]]
        entry = size[self._title[items]] + size[self._joint]
        room = self.settings.max_prompt_tokens - fixed
        kept = latest_that_fit(entry, column < count[:, None], room)
        if ((entry * kept).sum(axis=1) > room).any():
            raise UserError(
                f"max_prompt_tokens: a target and one item of the history do not fit into {self.settings.max_prompt_tokens} "
                f"tokens: raise it, lower max_item_tokens, or take an LLM with a longer context."
            )

        block = {
            "{liked}": self._list(items, kept & liked),
            "{disliked}": self._list(items, kept & ~liked),
            "{target}": self._title[targets][:, None],
        }
        fixed_pieces = np.tile([self._prefix, *self._texts, self._suffix], (rows, 1))
        parts = [fixed_pieces[:, :1]]
        for number, place in enumerate(self._places):
            parts += [fixed_pieces[:, number + 1 : number + 2], block[place]]
        pieces = np.concatenate([*parts, fixed_pieces[:, -2:]], axis=1)
        tokens, starts = self.table.gather(pieces.ravel())
        return PromptBatch.build(
            tokens=tokens,
            offsets=starts[:: pieces.shape[1]],
            slot_items=np.empty(0, dtype=np.int64),
            out_tokens=0,
            header_length=0,
        )

    def _list(self, items: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """Pieces of the items that are shown, with commas between them: ``[B, 1 + 2 L]``."""
        rows, most = items.shape
        pieces = np.full((rows, 1 + 2 * most), self._empty, dtype=np.int64)
        pieces[:, 0] = np.where(shown.any(axis=1), self._empty, self._none)
        # A comma stands before each item but the first.
        pieces[:, 1::2] = np.where(shown & (np.cumsum(shown, axis=1) > 1), self._joint, self._empty)
        pieces[:, 2::2] = np.where(shown, self._title[items], self._empty)
        return pieces
