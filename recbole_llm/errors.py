"""Invalid user input, reported in one line; and text from data or files, made safe to print."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_LONGEST_SENTENCE = 2000


def printable(text: object, limit: int | None = 100) -> str:
    """``text`` for a terminal or a log: one line, nothing that steers the terminal, not endless.

    Control characters, escape sequences' first bytes, line breaks, lone surrogates and characters that reorder text
    (bidirectional overrides) become spaces.

    Args:
        text: anything that came from data, a file or another library.
        limit: most characters; a longer text is cut and ends in ``...``. None: no limit.
    """
    text = str(text)
    is_cut = limit is not None and len(text) > limit
    if is_cut:
        text = text[: limit - 3]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return f"{text}..." if is_cut else text


class UserError(ValueError):
    """Invalid input: one sentence that names the file, line or key, and the remedy.

    The command line prints the sentence and exits with code 2; library callers see an ordinary ``ValueError``. The sentence
    is always :func:`printable`, whatever it quotes.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence, _LONGEST_SENTENCE))


class FullDiskError(UserError, OSError):
    """A write failed for want of room; what was there before is untouched."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.errno, self.strerror = errno.ENOSPC, "No space left on device"

    def __str__(self) -> str:
        return str(self.args[0])


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the entry of ``known`` that looks most like ``name``, or None where nothing is near."""
    known = list(known)
    by_lower_case = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(str(name).lower(), list(by_lower_case), n=1, cutoff=0.6)
    return by_lower_case[matches[0]] if matches else None


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, without its full stop, to stand inside a sentence."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0].rstrip("."), 300) if lines else type(error).__name__


def unknown_value(key: str, value: object, known: Iterable[str]) -> str:
    """The sentence for a value that is none of the ``known`` ones."""
    near = closest(str(value), known)
    hint = f"did you mean '{near}'?" if near else f"use one of {', '.join(known)}."
    return f"{key}: '{value}' is unknown; {hint}"
