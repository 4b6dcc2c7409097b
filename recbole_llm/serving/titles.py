"""Items by title or id, and the completion of titles that are being typed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

_BREAK = "\n"  # between titles; a title has none, see ``data.atomic.clean_text``


class Titles:
    """Finds items by what people write: letters of either case, a title before an id.

    Args:
        ids, texts: of all items by internal id, the padding first.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self.ids, self.texts = ids, texts
        folded = [_folded(text) for text in texts[1:]]
        self._by_title: dict[str, int] = {}
        for number, title in enumerate(folded, start=1):
            self._by_title.setdefault(title, number)
        self._by_id = {str(name): number for number, name in enumerate(ids) if number}
        # One text, so that a search is one of the C library's. Title n begins at _starts[n - 1].
        self._all = _BREAK + _BREAK.join(folded) + _BREAK
        self._starts = [1]
        for title in folded[:-1]:
            self._starts.append(self._starts[-1] + len(title) + 1)

    def find(self, name: str) -> int | None:
        """The internal id of an item; None where there is none of this title or id."""
        return self._by_title.get(_folded(name)) or self._by_id.get(name.strip())

    def complete(self, query: str, limit: int) -> list[int]:
        """Items for the beginning of a title, of one of its words, or a part of it; in this order, or all for an empty one.

        Args:
            query: what was typed.
            limit: the most items.
        """
        query = _folded(query)
        if not query:
            return list(range(1, min(limit, len(self.texts) - 1) + 1))
        found: dict[int, None] = {}
        exact = self.find(query)
        if exact:
            found[exact] = None
        for before in (_BREAK, " ", ""):
            for item in self._containing(before + query, len(before)):
                if len(found) >= limit:
                    return list(found)
                found[item] = None
        return list(found)

    def _containing(self, text: str, offset: int) -> Iterator[int]:
        place = self._all.find(text)
        while place >= 0:
            item = bisect_right(self._starts, place + offset)
            yield item
            # On with the next title: a title counts once.
            after = self._starts[item] - 1 if item < len(self._starts) else len(self._all)
            place = self._all.find(text, after)

    def nearest(self, name: str) -> str | None:
        """A title that begins as ``name`` does, for a message; None where none does."""
        for length in range(len(name), 2, -1):
            found = self.complete(name[:length], 1)
            if found:
                return self.texts[found[0]]
        return None


def _folded(text: object) -> str:
    return " ".join(str(text).casefold().split())
