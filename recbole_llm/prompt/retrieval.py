"""Prompts as sequences of pieces: fixed text, item text, vector slots and out tokens.

A prompt is never a string. Every fixed text, rank, date and item text is tokenized once and stored in one ragged table of
token ids (:class:`~recbole_llm.prompt.pieces.PieceTable`); a prompt is a list of piece numbers, and a batch of prompts is one
gather. Slots are known by position, so that no title, whatever it contains, can be taken for a slot or an out token::

    pieces   header | rank 1 | date | title A | quote | SLOT | joint | rank 2 | date | title B | ... | request | OUT
    tokens   17 4 9   22 3     8 1    5 5 9     2       -1     7       22 4     8 1    6 6 6           31 8      -2

User prompts (Kim et al., "Lost in Sequence", KDD 2025, table 2)::

    {sentence} Item No.{rank}, Time: {YYYY-MM-DD}, "{title}"[SeqItemEmb],... {request}[UserOut]

Item prompts::

    The item title and item embedding are as follows: "{title}"[SeqItemEmb], then generate item representation
    token:[ItemOut]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.prompt.batch import OUT_TOKEN, USER_TOKEN, PromptBatch
from recbole_llm.prompt.pieces import Encode, PieceTable, after_user_slot, check_room, latest_that_fit, slot_tokens


@dataclass(frozen=True)
class PromptSettings:
    """The wording of the prompts and their limits.

    Attributes:
        sentence: opens a user prompt, e.g. "This user has made a series of purchases in the following order:".
        request: closes a user prompt, e.g. ". Based on this sequence of purchases, generate user representation token:".
        history_length: the most items in a user prompt; the latest are kept.
        max_prompt_tokens: the most tokens in a prompt; whole oldest items go first.
        max_item_tokens: the most tokens of one item's text.
        item_vectors: whether an item's text is followed by its slot.
        user_vector: whether a user prompt begins with the slot of the user's representation.
        user_sentence: announces the user's slot.
        out_tokens: how many out tokens end a prompt.
        marker: whether a learned vector stands before each slot.
    """

    sentence: str = "This user has made a series of purchases in the following order:"
    request: str = ". Based on this sequence of purchases, generate user representation token:"
    history_length: int = 10
    max_prompt_tokens: int = 1024
    max_item_tokens: int = 256
    item_vectors: bool = True
    user_vector: bool = False
    user_sentence: str = "This is user representation from recommendation models: "
    out_tokens: int = 1
    marker: bool = False


class PromptBuilder:
    """Builds user and item prompts of a dataset from item ids.

    Args:
        encode: see :class:`~recbole_llm.prompt.pieces.PieceTable`.
        item_texts: text of each item, index = internal item id; index 0 is padding.
        settings: wording and limits.
        format_dates: turns float64 timestamps into ``YYYY-MM-DD`` texts; None where the dataset has no dates.
        prefix_ids: token ids that the tokenizer puts before a text (such as a BOS token).
    """

    def __init__(
        self,
        encode: Encode,
        item_texts: Sequence[str],
        settings: PromptSettings,
        format_dates: Callable[[np.ndarray], Sequence[str]] | None = None,
        prefix_ids: Sequence[int] = (),
    ) -> None:
        self.settings = settings
        self.format_dates = format_dates
        self.table = PieceTable(encode)
        self._title = self._title_pieces(item_texts)
        self.catalog = len(item_texts)
        self._prefix, self._slot, self._out = self.table.append(
            [list(prefix_ids), slot_tokens(settings.item_vectors, settings.marker), [OUT_TOKEN] * settings.out_tokens]
        )
        vector_words = "item title and item embedding are" if settings.item_vectors else "item title is"
        before_title = "Time: " if format_dates is not None else '"'
        opening, self._opening = settings.sentence, [self._prefix]
        if settings.user_vector:
            opening = after_user_slot(opening)
            self._opening += [*self.table.texts([settings.user_sentence]), *self.table.append([[USER_TOKEN]])]
        self._sentence, self._request, self._quote, self._joint, self._item_header, self._item_request = self.table.texts(
            [
                opening,
                settings.request,
                '"',
                ",",
                f'The {vector_words} as follows: "',
                ", then generate item representation token:",
            ]
        )
        first = [f" Item No.1, {before_title}"]
        rest = [f"Item No.{rank}, {before_title}" for rank in range(2, settings.history_length + 1)]
        self._rank = self.table.texts(first + rest)
        self._header_tokens = {
            # Up to the first slot: what is the same for every user.
            "user": int(self.table.lengths[[*self._opening, self._sentence][: 2 if settings.user_vector else None]].sum()),
            "opening": int(self.table.lengths[[*self._opening, self._sentence]].sum()),
            "item": int(self.table.lengths[[self._prefix, self._item_header]].sum()),
        }

    def _title_pieces(self, texts: Sequence[str]) -> np.ndarray:
        """Piece numbers of items' texts as they stand in a prompt, int64 ``[len(texts)]``."""
        return self.table.append_texts(texts, self.settings.max_item_tokens)

    def check_fits(self) -> None:
        """Check that the longest item fits into a user prompt and an item prompt.

        Raises:
            UserError: naming ``max_prompt_tokens`` and what it must be at least.
        """
        date = self.table.texts(['2000-12-31, "'] if self.format_dates is not None else [])
        size, header = self.table.lengths, self._header_tokens
        longest = int(size[self._title].max()) + int(size[[self._quote, self._slot]].sum())
        in_history = int(size[self._rank].max()) + int(size[[*date, self._joint, self._request, self._out]].sum())
        alone = int(size[[self._item_request, self._out]].sum())
        needed = max(header["opening"] + in_history, header["item"] + alone) + longest
        check_room(needed, self.settings.max_prompt_tokens)

    def add_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Let histories show texts that are no items of the data set: as text alone, without a vector.

        Returns:
            numbers for them, int64 ``[len(texts)]``, to stand among internal item ids in histories.

        Raises:
            UserError: one is so long that no prompt has room for it.
        """
        first = len(self._title)
        self._title = np.concatenate([self._title, self._title_pieces(texts)])
        self.check_fits()
        return np.arange(first, len(self._title), dtype=np.int64)

    def item_prompts(self, items: np.ndarray) -> PromptBatch:
        """Build the prompt of each item. ``items``: internal ids int64 ``[N]``."""
        items = np.asarray(items, dtype=np.int64)
        template = [self._prefix, self._item_header, -1, self._quote, self._slot, self._item_request, self._out]
        pieces = np.tile(np.array(template, dtype=np.int64), (len(items), 1))
        pieces[:, 2] = self._title[items]
        tokens, starts = self.table.gather(pieces.ravel())
        return PromptBatch.build(
            tokens=tokens,
            offsets=starts[:: len(template)],
            slot_items=items if self.settings.item_vectors else items[:0],
            out_tokens=self.settings.out_tokens,
            header_length=self._header_tokens["item"],
        )

    def select_histories(
        self, history: np.ndarray, lengths: np.ndarray, timestamps: np.ndarray | None, shown: np.ndarray | None = None
    ) -> Histories:
        """Choose the items of each history that its prompt shows: the latest that fit.

        Args:
            history: item ids int64 ``[B, L]``, right padded with 0, oldest first.
            lengths: items in each history int64 ``[B]``, at least 1.
            timestamps: float64 ``[B, L]``, or None.
            shown: the most items of each row, int64 ``[B]``, at least 1; None: as the settings say.
        """
        history, lengths = np.asarray(history, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        rows = len(lengths)
        most = min(self.settings.history_length, history.shape[1])
        count = np.minimum(lengths, most if shown is None else np.minimum(most, shown))
        column = np.arange(most)
        source = np.clip((lengths - count)[:, None] + column, 0, history.shape[1] - 1)
        inside = column < count[:, None]
        items = np.where(inside, np.take_along_axis(history, source, axis=1), 0)
        dates = np.full((rows, most), -1, dtype=np.int64)
        if self.format_dates is not None and timestamps is not None:
            times = np.take_along_axis(np.asarray(timestamps, dtype=np.float64), source, axis=1)
            dates[inside] = self.table.texts([f'{date}, "' for date in self.format_dates(times[inside])])

        # The ranks, and so their pieces, depend on how many items are kept: the longest rank piece never keeps too many.
        entry = self.table.lengths[self._title[items]] + self.table.lengths[self._rank].max()
        entry += self.table.lengths[[self._quote, self._slot, self._joint]].sum()
        entry += np.where(dates >= 0, self.table.lengths[dates], 0)
        fixed = self._header_tokens["opening"] + self.table.lengths[[self._request, self._out]].sum()
        kept = latest_that_fit(entry, inside, self.settings.max_prompt_tokens - fixed).sum(axis=1)
        shift = count - kept
        if shift.any():
            source = np.clip(shift[:, None] + column, 0, most - 1)
            inside = column < kept[:, None]
            items = np.where(inside, np.take_along_axis(items, source, axis=1), 0)
            dates = np.where(inside, np.take_along_axis(dates, source, axis=1), -1)
        return Histories(items=items, lengths=kept, dates=dates)

    def user_prompts(self, histories: Histories) -> PromptBatch:
        """Build the prompt of each history (see :meth:`select_histories`).

        One that the next row's history continues shares its beginning with it, and so a window of histories, each one item
        longer than the one before, with the longest of them.
        """
        return self._user_prompts(histories, histories.items, np.arange(len(histories.lengths)))

    def perturbed_prompts(self, histories: Histories, items: np.ndarray, parents: np.ndarray) -> PromptBatch:
        """Build the original prompts followed by perturbed ones, which share their beginnings with the originals.

        Titles and vectors move together; ranks and dates stay in place, so that no date betrays the order.

        Args:
            histories: the original histories, B of them.
            items: perturbed item ids int64 ``[P, L]``: each row a reordering of its parent's items.
            parents: the original that each perturbed row belongs to, int64 ``[P]``.

        Returns:
            B + P prompts: the originals, then the perturbed.
        """
        rows = np.concatenate([np.arange(len(histories.lengths)), parents])
        return self._user_prompts(histories, np.concatenate([histories.items, items]), rows)

    def _user_prompts(self, histories: Histories, items: np.ndarray, parents: np.ndarray) -> PromptBatch:
        originals, total = len(histories.lengths), len(parents)
        lengths = histories.lengths[parents]
        most = items.shape[1]
        entry_pieces = 6  # rank, date, title, quote, slot, joint
        empty = self.table.texts([""])[0]
        before = len(self._opening) + 1
        pieces = np.full((total, before + most * entry_pieces + 2), empty, dtype=np.int64)
        pieces[:, :before] = [*self._opening, self._sentence]
        inside = np.arange(most) < lengths[:, None]
        dates = histories.dates[parents]
        entries = pieces[:, before:-2].reshape(total, most, entry_pieces)
        entries[:, :, 0] = np.where(inside, self._rank[:most], empty)
        entries[:, :, 1] = np.where(dates >= 0, dates, empty)
        entries[:, :, 2] = np.where(inside, self._title[items], empty)
        entries[:, :, 3] = np.where(inside, self._quote, empty)
        has_slot = inside & (items < self.catalog)
        entries[:, :, 4] = np.where(has_slot, self._slot, empty)
        entries[:, :, 5] = np.where(np.arange(most) < lengths[:, None] - 1, self._joint, empty)
        pieces[:, -2], pieces[:, -1] = self._request, self._out
        tokens, starts = self.table.gather(pieces.ravel())
        offsets = starts[:: pieces.shape[1]]

        parent = np.full(total, -1, dtype=np.int64)
        shared = np.zeros(total, dtype=np.int64)
        if not self.settings.user_vector:  # which differs, ahead of the history, from one prefix to the next
            parent[:originals] = histories.longest(but_not=parents[originals:])
            nested = np.flatnonzero(parent[:originals] >= 0)
            joint_piece = nested * pieces.shape[1] + before + (lengths[nested] - 1) * entry_pieces + 5
            shared[nested] = starts[joint_piece] - offsets[nested]
        if total > originals:
            perturbed = np.arange(originals, total)
            parent[perturbed] = parents[perturbed]
            moved = items[perturbed] != histories.items[parents[perturbed]]
            # Rank and date of the first moved item are still the same: the tail begins at its title.
            first_moved = np.where(moved.any(axis=1), moved.argmax(axis=1), lengths[perturbed] - 1)
            title_piece = perturbed * pieces.shape[1] + before + first_moved * entry_pieces + 2
            shared[perturbed] = starts[title_piece] - offsets[perturbed]
        return PromptBatch.build(
            tokens=tokens,
            offsets=offsets,
            slot_items=items[has_slot] if self.settings.item_vectors else items[:0].ravel(),
            out_tokens=self.settings.out_tokens,
            header_length=self._header_tokens["user"],
            parent=parent,
            shared=shared,
        )


@dataclass(frozen=True)
class Histories:
    """The items that the user prompts of a batch show.

    Attributes:
        items: internal item ids int64 ``[B, L]``, oldest first, right padded with 0.
        lengths: items shown int64 ``[B]``.
        dates: piece numbers of the dates int64 ``[B, L]``; -1 where there is none.
    """

    items: np.ndarray
    lengths: np.ndarray
    dates: np.ndarray

    def longest(self, but_not: np.ndarray) -> np.ndarray:
        """For a history that the next row's continues, the last row of such a chain; else -1; int64 ``[B]``.

        Args:
            but_not: rows that stay on their own, int64.
        """
        inside = np.arange(self.items.shape[1]) < self.lengths[:-1, None]
        same = (self.items[:-1] == self.items[1:]) & (self.dates[:-1] == self.dates[1:])
        continued = np.append((same | ~inside).all(axis=1) & (self.lengths[:-1] < self.lengths[1:]), False)
        continued[but_not] = False
        ends = np.flatnonzero(~continued)
        return np.where(continued, ends[np.searchsorted(ends, np.arange(len(continued)))], -1)
