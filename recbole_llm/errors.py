"""Invalid user input, reported in one line; and text from data or files, made safe to print."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import TextIO

_LONGEST_SENTENCE = 2000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that write by themselves report the same: safetensors by number, PyTorch without one.
_NO_ROOM_MESSAGES = (*(f"(os error {number})" for number in _NO_ROOM), "PytorchStreamWriter failed writing", "unexpected pos ")


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
    if limit is not None and is_cut:
        text = text[: limit - 3]
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return f"{text}..." if is_cut else text


def printable_lines(text: object) -> str:
    """``text`` of several lines, each :func:`printable` and of any length."""
    return "\n".join(printable(line, None) for line in str(text).split("\n"))


def printable_json(text: str) -> str:
    """The text of a JSON document that says the same in :func:`printable` lines: what is not has its ``\\u`` escape."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(one if one.isprintable() or one == "\n" else _json_escape(one) for one in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print :func:`printable_lines`: nothing else in this library prints, so that no file or data can steer a terminal."""
    print(printable_lines(text), file=file, flush=file is not None)


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


def sentence_for(error: BaseException) -> str | None:
    """What to tell the user of an error, None where it is a defect of the program and the traceback is needed."""
    # Imported where an error is told: this module is read by every start of the program.
    import zipfile

    import yaml
    from safetensors import SafetensorError

    if isinstance(error, UserError) or (isinstance(error, ModuleNotFoundError) and error.name == "recbole"):
        return str(error)
    if _out_of_memory(error):
        return (
            "out of memory; lower micro_batch_tokens or train_batch_size, or set --recompute_activations=True (or take fewer "
            "backbone_layers)."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written ({error.strerror})."
    if is_full_disk(error):
        return f"there is no room left on the disk ({first_line(error)}): free some, or name folders on another disk."
    if isinstance(error, RecursionError):
        return f"the settings or a file are nested too deeply ({first_line(error)}): write them flatter."
    if isinstance(error, OverflowError):
        return f"a number is too large ({first_line(error)}): lower the value that you set."
    if isinstance(error, (SafetensorError, yaml.YAMLError, zipfile.BadZipFile)):
        return f"a file is damaged or of another kind ({type(error).__name__}: {first_line(error)}): fetch or write it again."
    return None


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of Python, safetensors or PyTorch says that there is no room for what was written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(message in str(error) for message in _NO_ROOM_MESSAGES)
