"""Recommendations as text, JSON and tables in files; files of users."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, printable, printable_json
from recbole_llm.files import replace_file, replace_text
from recbole_llm.results.files import check_writable

SHOWN = 10  # items of a history on the screen
KINDS = (".parquet", ".csv", ".json")


def read_users(file: str) -> list[str]:
    """Read a file of user ids, one a line; empty lines do not count.

    Raises:
        UserError: the file cannot be read, or names no user.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"users: {file} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}).") from None
    users = [line.strip() for line in lines if line.strip()]
    if not users:
        raise UserError(f"users: {file} names no user; write one id a line.")
    return users


def check_output(file: str, *inputs: str) -> None:
    """Refuse a file that cannot be written, or must not be, before anything is computed for it.

    Args:
        file: what ``--output`` names.
        inputs: files that the command reads.

    Raises:
        UserError: another kind of file, a folder, one that may not be written, an input, or a file that holds something else.
    """
    path = Path(file)
    if path.suffix not in KINDS:
        raise UserError(f"output: {file} must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    if any(os.path.realpath(file) == os.path.realpath(other) for other in inputs):
        raise UserError(f"output: {file} is read by the same command; name another file.")
    check_writable(path, "output", "recommendations", _BEGINNINGS[path.suffix].match)


# How the files begin that :func:`write` writes.
_BEGINNINGS = {
    ".parquet": re.compile(b"PAR1"),
    ".csv": re.compile(b"(user|query),rank,item,"),
    ".json": re.compile(rb'\[\]|\[\s*\{\s*"(user|query)":'),
}


def as_records(users: Sequence[str] | None, found: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """One record for each recommended item: query (from 0) or user, rank (from 1), item, title, score."""
    return [
        {**({"query": number} if users is None else {"user": users[number]}), "rank": rank, **best._asdict()}
        for number, items in enumerate(found)
        for rank, best in enumerate(items, start=1)
    ]


def as_json(users: Sequence[str] | None, found: Sequence[Sequence[Any]]) -> str:
    """The records as JSON, which may be shown on a terminal."""
    return printable_json(json.dumps(as_records(users, found), ensure_ascii=False, indent=2))


def as_text(history: Sequence[str], found: Sequence[Any]) -> str:
    """The end of a history and what is recommended after it, for a terminal."""
    shown = history[-SHOWN:]
    lines = [f"History ({len(history)} items" + (f", the last {SHOWN}):" if len(history) > len(shown) else "):")]
    lines += [f"      {printable(title)}" for title in shown]
    lines.append("Recommended:")
    lines += [
        f"  {rank:>3} {printable(best.title)}  (item {printable(best.item)}, score {best.score:.4f})"
        for rank, best in enumerate(found, start=1)
    ]
    return "\n".join(lines)


def write(file: str, users: Sequence[str] | None, found: Sequence[Sequence[Any]]) -> None:
    """Write recommendations to a ``.parquet``, ``.csv`` or ``.json`` file, in one step; its folder is made."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".json"):
        replace_text(Path(file), as_json(users, found) + "\n")
        return
    import polars  # only where a table is written

    schema = {"query": polars.Int32} if users is None else {"user": polars.String}
    schema |= {"rank": polars.Int32, "item": polars.String, "title": polars.String, "score": polars.Float64}
    table = polars.DataFrame(as_records(users, found), schema=schema)
    replace_file(Path(file), table.write_parquet if file.endswith(".parquet") else table.write_csv)
