"""Errors that are the user's to mend, told apart from defects of the library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: one sentence that names the file, line or key, and the remedy.

    The command line prints the sentence and exits with code 2; library callers see an ordinary ``ValueError``.
    """


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the entry of ``known`` that looks most like ``name``, or None where nothing is near."""
    known = list(known)
    by_lower_case = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(str(name).lower(), list(by_lower_case), n=1, cutoff=0.6)
    return by_lower_case[matches[0]] if matches else None


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line without its full stop, to stand inside a sentence."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def unknown_value(key: str, value: object, known: Iterable[str]) -> str:
    near = closest(str(value), known)
    hint = f"did you mean '{near}'?" if near else f"use one of {', '.join(known)}."
    return f"{key}: '{value}' is unknown; {hint}"
