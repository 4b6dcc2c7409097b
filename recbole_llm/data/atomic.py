"""Read RecBole's atomic files: one header line ``name:type``, then one record per line, fields split by a separator.

A record is its line, split at the separator: no quoting. Titles are full of quotation marks (``24" TV mount``), and a reader
that honors them swallows whole lines. Errors name the file, line and field.
"""

from __future__ import annotations

import html
import html.entities
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from recbole_llm.errors import UserError, printable

TYPES = ("token", "token_seq", "float", "float_seq")
_CHUNK_CHARACTERS = 1 << 22  # bounds what is held twice while a file is read


@dataclass(frozen=True)
class Table:
    """Some fields of an atomic file.

    Attributes:
        path: the file.
        types: field -> type, of all fields in the header, in its order.
        columns: field -> values, of the fields that were asked for. ``float`` fields are float64 arrays (NaN where the
            file has nothing), all others lists of str (``""`` where the file has nothing).
        lines: line number in the file of each record (from 1; the header is line 1), int64. Blank lines are no records.
    """

    path: Path
    types: dict[str, str]
    columns: dict[str, list[str] | np.ndarray]
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.lines)


def read_header(path: str | os.PathLike, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """Return field -> type of an atomic file, in the order of its columns.

    Raises:
        UserError: the file is empty or not text in ``encoding``, or a field is not ``name:type``.
    """
    for line in _chunks(Path(path), encoding, 1):
        return _parse_header(Path(path), line[0], separator)
    raise UserError(f"{path} is empty: its first line must name the fields, such as user_id:token")


def read_table(
    path: str | os.PathLike,
    fields: Collection[str] | None = None,
    separator: str = "\t",
    encoding: str = "utf-8",
) -> Table:
    """Read ``fields`` (None: all of them) of an atomic file in one pass.

    Equal strings within a ``token`` field are stored once, so that the ids of ten million interactions stay small.

    Raises:
        UserError: the file is empty or not text in ``encoding``, a header field is not ``name:type``, a line has more or
            fewer columns than the header, or a ``float`` field holds something that is no number.
    """
    path = Path(path)
    chunks = _chunks(path, encoding, _CHUNK_CHARACTERS)
    chunk = next(chunks, None)
    if not chunk:
        raise UserError(f"{path} is empty: its first line must name the fields, such as user_id:token")
    types = _parse_header(path, chunk[0], separator)
    wanted = [field for field in types if fields is None or field in fields]
    position = {field: index for index, field in enumerate(types)}
    columns: dict[str, list] = {field: [] for field in wanted}
    known: dict[str, dict[str, str]] = {field: {} for field in wanted if types[field] == "token"}

    lines: list[np.ndarray] = []
    next_line = 2
    chunk = chunk[1:]
    while chunk is not None:
        numbers: Sequence[int] = range(next_line, next_line + len(chunk))
        next_line += len(chunk)
        if "\n" in chunk or "\r\n" in chunk:
            kept = [(number, line) for number, line in zip(numbers, chunk, strict=True) if line.strip("\r\n")]
            numbers, chunk = [number for number, _ in kept], [line for _, line in kept]
        if chunk:
            lines.append(np.asarray(numbers, dtype=np.int64))
            values = _split(path, chunk, numbers, separator, len(types))
            for field in wanted:
                column = values[position[field] :: len(types)]
                if types[field] == "float":
                    columns[field].append(_to_numbers(path, field, column, numbers))
                elif field in known:
                    columns[field].extend(map(known[field].setdefault, column, column))
                else:
                    columns[field].extend(column)
        chunk = next(chunks, None)

    for field in wanted:
        if types[field] == "float":
            columns[field] = np.concatenate(columns[field] or [np.zeros(0)])
    return Table(path, types, columns, np.concatenate([np.empty(0, np.int64), *lines]))


def require(path: str | os.PathLike, types: dict[str, str], field: str, kinds: Sequence[str], key: str | None = None) -> None:
    """Check that the header ``types`` of ``path`` holds ``field`` as one of ``kinds``.

    Args:
        key: the configuration key that names the field, for the remedy.

    Raises:
        UserError: the field is absent or has another type.
    """
    if field not in types:
        remedy = f"add a column {field}:{kinds[0]}" + (f", or name the column that holds it with the key {key}" if key else "")
        raise UserError(f"{path} has no field {field!r}, only {', '.join(types)}: {remedy}")
    if types[field] not in kinds:
        raise UserError(f"{path}:1 declares {field} as {types[field]!r}: write {field}:{kinds[0]}")


def is_missing_id(token: str) -> bool:
    """Whether an id is absent: blank, or the ``nan`` that some programs write for a missing value."""
    return token.strip().lower() in ("", "nan")


# Character references end with a semicolon; HTML's historical exceptions (&copy, &times) would damage names such as
# "Salt&notes". Numeric ones are unmistakable without it, and shops do print "Brand&#8482 Case".
_REFERENCE = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]*;|#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|#[0-9]{2,7}(?![0-9;]))")
_PASSES = 4
_LONGEST_REFERENCE = max(map(len, html.entities.html5)) + 2  # with its `&`, and the character behind it
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _resolve(reference: re.Match) -> str:
    text = reference[0]
    if text.startswith("&#"):
        return html.unescape(text if text.endswith(";") else text + ";")
    return html.entities.html5.get(text[1:], text)


def _resolve_all(text: str) -> str:
    """What ``_REFERENCE.sub(_resolve, text)`` makes of a text when it is applied until nothing changes, in linear time.

    A reference begins with ``&``, holds no other one and has a bounded length, so that each ``&`` can be judged alone, and only
    those near a change need to be judged again. Characters are a doubly linked list; position 0 stands before the text.
    """
    characters = ["", *text]
    following = [*range(1, len(characters)), -1]
    before = [-1, *range(len(characters) - 1)]
    waiting = [place for place, character in enumerate(characters) if character == "&"]
    while waiting:
        found: list[tuple[int, int, str]] = []  # where a reference begins, the place behind it, what it stands for
        for start in waiting:
            places = [start]
            place = following[start]
            while place >= 0 and len(places) < _LONGEST_REFERENCE:
                places.append(place)
                character = characters[place]
                if not (character == "#" or (character.isascii() and character.isalnum())):
                    break
                place = following[place]
            resolved, length = _reference_at("".join([characters[place] for place in places]))
            if length:
                found.append((start, places[length] if length < len(places) else following[places[-1]], resolved))
        changed: set[int] = set()
        for start, end, resolved in found:
            last, place = before[start], start
            for character in resolved:  # no longer than the reference, whose places it takes
                characters[place] = character
                following[last], before[place], last = place, last, place
                if character == "&":
                    changed.add(place)
                place = following[place]
            following[last] = end
            if end >= 0:
                before[end] = last
            # What stands here now may complete the reference that the last `&` before it begins.
            place = before[start] if resolved else last
            for _ in range(_LONGEST_REFERENCE):
                if place <= 0 or not (characters[place] in "#&" or characters[place].isalnum()):
                    break
                if characters[place] == "&":
                    changed.add(place)
                    break
                place = before[place]
        waiting = sorted(changed)
    place, kept = following[0], []
    while place >= 0:
        kept.append(characters[place])
        place = following[place]
    return "".join(kept)


@lru_cache(maxsize=4096)
def _reference_at(text: str) -> tuple[str, int]:
    """What the reference that ``text`` begins with stands for, and its length; 0 where it begins with none."""
    match = _REFERENCE.match(text)
    resolved = "" if match is None else _resolve(match)
    return ("", 0) if match is None or resolved == match[0] else (resolved, match.end())


def unescape(text: str) -> str:
    """Resolve HTML character references, one level of escaping; unknown ones (``R&B;``) stay."""
    return _REFERENCE.sub(_resolve, text)


def clean_text(text: str) -> str:
    """Return an item's text as people would read it, whole.

    - HTML character references are resolved until none is left: ``&quot;`` and the doubly escaped ``&amp;quot;`` (Amazon's
      data holds both) are ``"``. Unknown ones (``R&B;``) stay as they are.
    - A run of control characters, or of line and paragraph separators, becomes one space, so that a title stays on one line.
    - Outer white space goes. All else stays: quotation marks, symbols, special tokens of language models, any length.

    The result does not change when it is cleaned again.
    """
    for _ in range(_PASSES):  # all that real texts need
        if "&" not in text:
            break
        resolved = _REFERENCE.sub(_resolve, text)
        if resolved == text:
            break
        text = resolved
    else:
        text = _resolve_all(text)
    if not text.isprintable():  # a fast check that most titles pass
        text = CONTROLS.sub(" ", text)
    return text.strip()


def read_item_attributes(
    path: str | os.PathLike,
    id_field: str,
    text_fields: Sequence[str],
    separator: str = "\t",
    encoding: str = "utf-8",
    key: str = "item_text",
) -> dict[str, tuple[str, ...]]:
    """Return item token -> the texts of its ``text_fields`` in an ``.item`` file, cleaned, those that are empty left out.

    Raises:
        UserError: see :func:`read_named_attributes`.
    """
    named = read_named_attributes(path, id_field, text_fields, separator, encoding, key)
    return {token: tuple(text for _, text in pairs) for token, pairs in named.items()}


def read_named_attributes(
    path: str | os.PathLike,
    id_field: str,
    text_fields: Sequence[str],
    separator: str = "\t",
    encoding: str = "utf-8",
    key: str = "item_text",
) -> dict[str, tuple[tuple[str, str], ...]]:
    """As :func:`read_item_attributes`, each text with the field that it is of: item token -> (field, text), ...

    Raises:
        UserError: as ``read_table``; or a field is absent, an id is missing or stands on two lines.
    """
    path = Path(path)
    types = read_header(path, separator, encoding)
    require(path, types, id_field, ["token"], "ITEM_ID_FIELD")
    absent = [field for field in text_fields if field not in types]
    if absent:
        present = [field for field in types if field != id_field]
        raise UserError(
            f"{path} has no field {absent[0]!r} to take the items' text from, only {', '.join(present) or 'ids'}: "
            f"set the key {key} to fields that it has"
        )
    table = read_table(path, {id_field, *text_fields}, separator, encoding)
    tokens = table.columns[id_field]
    check_ids(table, id_field)
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for token, line in zip(tokens, table.lines, strict=True):
            if token in first:
                raise UserError(
                    f"{path}:{line} describes item {printable(repr(token))} again, after line {first[token]}: keep one line "
                    f"for each item"
                )
            first[token] = line

    # A float field (a price, a year) is text here as well, printed without a trailing ".0".
    parts = []
    for field in text_fields:
        column = table.columns[field]
        if types[field] == "float":
            column = ["" if np.isnan(number) else f"{number:.15g}" for number in column]
        parts.append([clean_text(text) for text in column])
    rows = zip(*parts, strict=True)
    return {
        token: tuple((field, text) for field, text in zip(text_fields, row, strict=True) if text)
        for token, row in zip(tokens, rows, strict=True)
    }


def check_ids(table: Table, field: str) -> None:
    """Raise UserError where a record of ``table`` has no id in ``field``."""
    tokens = table.columns[field]
    missing = {token for token in set(tokens) if is_missing_id(token)}
    if missing:
        row = next(row for row, token in enumerate(tokens) if token in missing)
        raise UserError(
            f"{table.path}:{table.lines[row]} has no {field} (it reads {printable(repr(tokens[row]))}): give every line "
            f"its id, or remove it"
        )


def _chunks(path: Path, encoding: str, characters: int) -> Iterator[list[str]]:
    """Yield the lines of a file, some at a time, each with its end. Only ``\\n`` ends a line: titles hold other breaks."""
    try:
        with open(path, encoding=encoding, newline="\n") as file:
            while lines := file.readlines(characters):
                yield lines
    except UnicodeDecodeError as error:
        raise UserError(_not_text(path, encoding)) from error
    except LookupError as error:
        raise UserError(f"the key encoding names {encoding!r}, which Python does not know: write utf-8") from error


def _not_text(path: Path, encoding: str) -> str:
    remedy = "save the file as UTF-8, or set the key encoding to what it is"
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                return f"{path}:{number} holds bytes that are not {encoding} ({line[error.start : error.end]!r}): {remedy}"
    return f"{path} is not {encoding}: {remedy}"


def _parse_header(path: Path, line: str, separator: str) -> dict[str, str]:
    types: dict[str, str] = {}
    header = line.lstrip("\ufeff").rstrip("\r\n")  # a byte order mark, as some editors write it, is no part of a name
    for number, column in enumerate(header.split(separator), start=1):
        name, _, kind = column.partition(":")
        if not name or kind not in TYPES:
            raise UserError(
                f"{path}:1 has {printable(repr(column))} as column {number} of its header: write name:type, with one "
                f"of {', '.join(TYPES)} as type and {_describe(separator)} between the columns"
            )
        if name in types:
            raise UserError(f"{path}:1 names the field {printable(repr(name))} twice: give every column its own name")
        types[name] = kind
    return types


def _describe(separator: str) -> str:
    return {"\t": "one tab", ",": "one comma", " ": "one space"}.get(separator, repr(separator))


def _split(path: Path, lines: list[str], numbers: Sequence[int], separator: str, width: int) -> list[str]:
    """Return the values of all lines in one list, record after record, after checking that each has ``width`` of them."""
    counts = [line.count(separator) for line in lines]
    if counts.count(width - 1) != len(counts):
        row = next(row for row, count in enumerate(counts) if count != width - 1)
        raise UserError(
            f"{path}:{numbers[row]} has {counts[row] + 1} columns where the header names {width}: put "
            f"{_describe(separator)} between the columns and none inside a value"
        )
    text = "".join(lines)
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    return text.removesuffix("\n").removesuffix("\r").replace("\n", separator).split(separator)


def _to_numbers(path: Path, field: str, values: list[str], numbers: Sequence[int]) -> np.ndarray:
    """Return float64 values, NaN for empty ones."""
    try:
        # float() takes "2020_01_01" for a number: let the slow path judge such values.
        if not any("_" in value for value in values):
            return np.fromiter(map(float, values), np.float64, len(values))
    except ValueError:
        pass
    result = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            result[row] = float(value or "nan")
            if "_" in value:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}:{numbers[row]} has {printable(repr(value))} as {field}, which is no number: write a number, or "
                f"declare the column as {field}:token if it holds words"
            ) from None
    return result
