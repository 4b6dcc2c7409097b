"""Prompts for generation: a history, the candidates, and a request for a title."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        quotes: whether titles stand in quotation marks.
        titles: whether an item's text stands in the lists; an answer is a title in any case.
        details: whether ``Item No.{rank}`` and the date, where there is one, stand before each text of the history.
    """

    templates: Sequence[str]
    history_length: int = 10
    max_prompt_tokens: int = 1024
    max_item_tokens: int = 256
    item_vectors: bool = True
    user_vector: bool = False
    user_sentence: str = "This is user representation from recommendation models: "
    context_length: int = 2048
    marker: bool = False
    quotes: bool = True
    titles: bool = True
    details: bool = False


class TitlePrompts:
    """Builds prompts that list a history and candidates and ask for a candidate's title, and the answers to them::

        This user has watched "{title}"[slot], "{title}"[slot] in the previous. ... candidates are "{title}"[slot], ...
        The movie title you recommend is | "{title}" END

    An item's text is the same token ids in the history, among the candidates and in the answer.

    Args:
        encode, item_texts, prefix_ids, format_dates: as in :class:`PromptBuilder`.
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
        format_dates: Callable[[np.ndarray], Sequence[str]] | None = None,
    ) -> None:
        self.settings, self.format_dates = settings, format_dates
        self.table = PieceTable(encode)
        # The space before a title belongs to its quotation mark, or to its first word.
        texts = item_texts if settings.quotes else [f" {text}" if text else "" for text in item_texts]
        self._title = self.table.append_texts(texts, settings.max_item_tokens)
        before = list(prefix_ids)
        if settings.user_vector:
            before += [*encode([settings.user_sentence])[0], USER_TOKEN]
        self._prefix, self._slot, self._end = self.table.append(
            [before, slot_tokens(settings.item_vectors, settings.marker), [end_id]]
        )
        marks = (' "', '"') if settings.quotes else ("", "")
        self._open, self._close, self._joint, self._empty = self.table.texts([*marks, ",", ""])
        self._shown = self._title if settings.titles else np.full_like(self._title, self._empty)
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
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        template: np.ndarray | None = None,
        times: np.ndarray | None = None,
    ) -> PromptBatch:
        """Build the prompt of each row.

        Args:
            history: item ids int64 ``[B, L]``, right padded with 0, oldest first.
            lengths: items in each history int64 ``[B]``, at least 1.
            candidates: item ids int64 ``[B, C]``, in the order in which they are listed.
            template: which template each row takes, int64 ``[B]``; None: the first.
            times: when the items of the history were taken, float64 ``[B, L]``; None: unknown.

        Raises:
            UserError: candidates alone are more than the LLM can hold.
        """
        rows, listed = candidates.shape
        most = min(self.settings.history_length, history.shape[1])
        count = np.minimum(lengths, most)
        column = np.arange(most)
        items = np.take_along_axis(history, np.clip((lengths - count)[:, None] + column, 0, history.shape[1] - 1), axis=1)
        parts = np.array(self._parts)[np.zeros(rows, dtype=np.int64) if template is None else template]
        details = self._details(history, times, lengths, count, column)
        size = self.table.lengths
        marks = [self._open, self._close] if self.settings.titles else []
        around = size[[*marks, self._slot, self._joint]].sum()
        fixed = size[self._prefix] + size[parts].sum(axis=1) + (size[self._shown[candidates]] + around).sum(axis=1)
        answer = size[self._title[candidates]].max(axis=1) + size[[self._open, self._close, self._slot, self._joint]].sum() + 1
        room = np.minimum(self.settings.max_prompt_tokens, self.settings.context_length - answer) - fixed
        entry = size[self._shown[items]] + around + size[details].sum(axis=2)
        kept = latest_that_fit(entry, column < count[:, None], room)
        if (fixed + (entry * kept).sum(axis=1) + answer > self.settings.context_length).any():
            raise UserError(
                f"{listed} candidates do not fit into the LLM's {self.settings.context_length} tokens: lower max_item_tokens, "
                f"or take an LLM with a longer context."
            )
        width = 5  # open, title, close, slot, joint; in a history rank and date before them
        of_history = most * (width + 2)
        pieces = np.full((rows, 4 + of_history + listed * width), self._empty, dtype=np.int64)
        pieces[:, 0], pieces[:, 1], pieces[:, 2 + of_history], pieces[:, -1] = self._prefix, *parts.T
        shown = pieces[:, 2 : 2 + of_history].reshape(rows, most, width + 2)
        # Ranks count what is kept: they move with the items that a long prompt loses.
        shift = (count - kept.sum(axis=1))[:, None]
        ranks = np.take_along_axis(details[:, :, 0], np.clip(column - shift, 0, most - 1), axis=1)
        shown[:, :, 0] = np.where(kept, ranks, self._empty)
        shown[:, :, 1] = np.where(kept, details[:, :, 1], self._empty)
        self._fill(shown[:, :, 2:], items, kept)
        self._fill(pieces[:, 3 + of_history : -1].reshape(rows, listed, width), candidates, candidates > 0)
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
            pooled=starts[np.arange(0, pieces.size, pieces.shape[1])[:, None] + [2, 2 + of_history]] - offsets[:-1, None],
        )

    def _details(
        self, history: np.ndarray, times: np.ndarray | None, lengths: np.ndarray, count: np.ndarray, column: np.ndarray
    ) -> np.ndarray:
        """Pieces of rank and date before each item of the histories, int64 ``[B, L, 2]``; empty ones without ``details``."""
        most = len(column)
        details = np.full((len(lengths), most, 2), self._empty, dtype=np.int64)
        if not self.settings.details:
            return details
        details[:, :, 0] = self.table.texts([f" Item No.{rank}," for rank in range(1, most + 1)])
        if times is not None and self.format_dates is not None:
            inside = column < count[:, None]
            source = np.clip((lengths - count)[:, None] + column, 0, history.shape[1] - 1)
            dates = self.format_dates(np.take_along_axis(np.asarray(times, dtype=np.float64), source, axis=1)[inside])
            details[:, :, 1][inside] = self.table.texts([f" Time: {date}," for date in dates])
        return details

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
        text = [self._open, self._title[items], self._close] if self.settings.titles else [self._empty] * 3
        return [np.broadcast_to(piece, items.shape) for piece in (*text, self._slot)]

    def _fill(self, entries: np.ndarray, items: np.ndarray, inside: np.ndarray) -> None:
        """Write items into ``entries``, a view ``[rows, items, 5]`` of the pieces."""
        last = inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)
        joined = inside & (np.arange(inside.shape[1]) < last[:, None])
        for place, piece in enumerate(self._entry(items)):
            entries[:, :, place] = np.where(inside, piece, self._empty)
        entries[:, :, -1] = np.where(joined, self._joint, self._empty)
