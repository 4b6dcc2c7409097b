"""Prompts for generation: a history, the candidates, and a request for a title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import USER_TOKEN, PromptBatch
from recbole_llm.prompt.pieces import Encode, PieceTable, after_user_slot, latest_that_fit, slot_tokens


@dataclass(frozen=True)
class TitlePromptSettings:
    """The wording of the prompts for generation, and their limits.

    Attributes:
        templates: each with ``{history}`` and, after it, ``{candidates}``.
        history_length: the most items of the history; the latest are kept.
        max_prompt_tokens: the most tokens in a prompt; whole oldest items of the history go first, candidates never.
        max_item_tokens: the most tokens of one item's text.
        item_vectors: whether an item's text is followed by its slot.
        user_vector: whether the prompt begins with the slot of the user's representation.
        user_sentence: announces the user's slot.
        context_length: the most tokens that the LLM can hold, prompt and answer together.
        marker: whether a learned vector stands before each slot.
    """

    templates: Sequence[str]
    history_length: int = 10
    max_prompt_tokens: int = 1024
    max_item_tokens: int = 256
    item_vectors: bool = True
    user_vector: bool = False
    user_sentence: str = "This is user representation from recommendation models:"
    context_length: int = 2048
    marker: bool = False


class TitlePrompts:
    """Builds prompts that list a history and candidates and ask for a candidate's title, and the answers to them::

        This user has watched "{title}"[slot], "{title}"[slot] in the previous. ... candidates are "{title}"[slot], ...
        The movie title you recommend is | "{title}" END

    An item's text is the same token ids in the history, among the candidates and in the answer.

    Args:
        encode, item_texts, prefix_ids: as in :class:`PromptBuilder`.
        settings: wording and limits.
        end_id: the token that ends an answer.

    Raises:
        UserError: a template without its two placeholders.
    """

    def __init__(
        self,
        encode: Encode,
        item_texts: Sequence[str],
        settings: TitlePromptSettings,
        prefix_ids: Sequence[int],
        end_id: int,
    ) -> None:
        self.settings = settings
        self.table = PieceTable(encode)
        self._title = self.table.append_texts(item_texts, settings.max_item_tokens)
        before = list(prefix_ids)
        if settings.user_vector:
            before += [*encode([settings.user_sentence])[0], USER_TOKEN]
        self._prefix, self._slot, self._end = self.table.append(
            [before, slot_tokens(settings.item_vectors, settings.marker), [end_id]]
        )
        self._open, self._close, self._joint, self._empty = self.table.texts([' "', '"', ",", ""])
        self._parts = []
        for template in settings.templates:
            if template.count("{history}") != 1 or template.count("{candidates}") != 1:
                raise UserError(f"title_prompts: {template!r} must hold {{history}} and {{candidates}} once each.")
            opening, found, rest = template.partition("{history}")
            request, found, closing = rest.partition("{candidates}")
            if not found:
                raise UserError(f"title_prompts: {template!r} must hold {{history}} before {{candidates}}.")
            if settings.user_vector:
                opening = after_user_slot(opening)
            # The space before a title belongs to its quotation mark.
            self._parts.append(self.table.texts([opening.rstrip(), request.rstrip(), closing.rstrip()]))

    def answers(self, items: np.ndarray) -> list[list[int]]:
        """The answer that names each item: token ids with the end token. ``items``: internal ids int64 ``[N]``."""
        pieces = np.full((len(items), 4), self._open, dtype=np.int64)
        pieces[:, 1], pieces[:, 2], pieces[:, 3] = self._title[items], self._close, self._end
        tokens, starts = self.table.gather(pieces.ravel())
        return [tokens[start:end].tolist() for start, end in zip(starts[:-1:4], starts[4::4], strict=True)]

    def prompts(
        self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, template: np.ndarray | None = None
    ) -> PromptBatch:
        """Build the prompt of each row.

        Args:
            history: item ids int64 ``[B, L]``, right padded with 0, oldest first.
            lengths: items in each history int64 ``[B]``, at least 1.
            candidates: item ids int64 ``[B, C]``, in the order in which they are listed.
            template: which template each row takes, int64 ``[B]``; None: the first.

        Raises:
            UserError: candidates alone are more than the LLM can hold.
        """
        rows, listed = candidates.shape
        most = min(self.settings.history_length, history.shape[1])
        count = np.minimum(lengths, most)
        column = np.arange(most)
        items = np.take_along_axis(history, np.clip((lengths - count)[:, None] + column, 0, history.shape[1] - 1), axis=1)
        parts = np.array(self._parts)[np.zeros(rows, dtype=np.int64) if template is None else template]
        size = self.table.lengths
        around = size[[self._open, self._close, self._slot, self._joint]].sum()
        fixed = size[self._prefix] + size[parts].sum(axis=1) + (size[self._title[candidates]] + around).sum(axis=1)
        answer = size[self._title[candidates]].max(axis=1) + around + 1
        room = np.minimum(self.settings.max_prompt_tokens, self.settings.context_length - answer) - fixed
        entry = size[self._title[items]] + around
        kept = latest_that_fit(entry, column < count[:, None], room)
        if (fixed + (entry * kept).sum(axis=1) + answer > self.settings.context_length).any():
            raise UserError(
                f"{listed} candidates do not fit into the LLM's {self.settings.context_length} tokens: lower max_item_tokens, "
                f"or take an LLM with a longer context."
            )
        width = 5  # open, title, close, slot, joint
        pieces = np.full((rows, 4 + (most + listed) * width), self._empty, dtype=np.int64)
        pieces[:, 0], pieces[:, 1], pieces[:, 2 + most * width], pieces[:, -1] = self._prefix, *parts.T
        self._fill(pieces[:, 2 : 2 + most * width].reshape(rows, most, width), items, kept)
        self._fill(pieces[:, 3 + most * width : -1].reshape(rows, listed, width), candidates, candidates > 0)
        tokens, starts = self.table.gather(pieces.ravel())
        slots = np.concatenate([items, candidates], axis=1)[np.concatenate([kept, candidates > 0], axis=1)]
        offsets = starts[:: pieces.shape[1]]
        return PromptBatch.build(
            tokens=tokens,
            offsets=offsets,
            slot_items=slots if self.settings.item_vectors else slots[:0],
            out_tokens=0,
            header_length=0,
            # The history's pieces come after the prefix and the template's opening.
            pooled=starts[np.arange(0, pieces.size, pieces.shape[1])[:, None] + [2, 2 + most * width]] - offsets[:-1, None],
        )

    def item_prompts(self, items: np.ndarray) -> PromptBatch:
        """Each item alone, as it stands in a history. ``items``: internal ids int64 ``[N]``."""
        pieces = np.stack([np.full(len(items), self._prefix), *self._entry(items)], axis=1)
        tokens, starts = self.table.gather(pieces.ravel())
        offsets = starts[:: pieces.shape[1]]
        return PromptBatch.build(
            tokens=tokens,
            offsets=offsets,
            slot_items=items if self.settings.item_vectors else items[:0],
            out_tokens=0,
            header_length=0,
            pooled=np.stack([starts[1 :: pieces.shape[1]] - offsets[:-1], np.diff(offsets)], axis=1),
        )

    def _entry(self, items: np.ndarray) -> list[np.ndarray]:
        """The pieces of an item: opening quotation mark, text, closing one, slot; each of the shape of ``items``."""
        return [np.broadcast_to(piece, items.shape) for piece in (self._open, self._title[items], self._close, self._slot)]

    def _fill(self, entries: np.ndarray, items: np.ndarray, inside: np.ndarray) -> None:
        """Write items into ``entries``, a view ``[rows, items, 5]`` of the pieces."""
        last = inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)
        joined = inside & (np.arange(inside.shape[1]) < last[:, None])
        for place, piece in enumerate(self._entry(items)):
            entries[:, :, place] = np.where(inside, piece, self._empty)
        entries[:, :, -1] = np.where(joined, self._joint, self._empty)
