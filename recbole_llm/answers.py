"""Recommendations as text, JSON and tables in files; files of users."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, printable
from recbole_llm.files import replace_file, replace_text

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
    if path.exists() and not path.is_file():
        raise UserError(f"output: {file} is no regular file.")
    if any(path.exists() and os.path.exists(other) and os.path.samefile(path, other) for other in inputs):
        raise UserError(f"output: {file} is read by the same command; name another file.")
    if path.is_file() and path.stat().st_size and not _is_ours(path):
        raise UserError(f"output: {file} holds something else than recommendations, and is not replaced; name another file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"output: {path.parent} is no folder that can be written; make it, or name another.")


def _is_ours(path: Path) -> bool:
    """Whether a file begins as :func:`write` begins one."""
    with open(path, "rb") as file:
        beginning = file.read(64)
    if path.suffix == ".parquet":
        return beginning.startswith(b"PAR1")
    if path.suffix == ".csv":
        return beginning.startswith((b"user,rank,item,", b"query,rank,item,"))
    return re.match(rb'\[\]|\[\s*\{\s*"(user|query)":', beginning) is not None


def as_records(users: Sequence[str] | None, found: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """One record for each recommended item: query (from 0) or user, rank (from 1), item, title, score."""
    return [
        {**({"query": number} if users is None else {"user": users[number]}), "rank": rank, **best._asdict()}
        for number, items in enumerate(found)
        for rank, best in enumerate(items, start=1)
    ]


def as_json(users: Sequence[str] | None, found: Sequence[Sequence[Any]]) -> str:
    return json.dumps(as_records(users, found), ensure_ascii=False, indent=2)


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
    """Write recommendations to a ``.parquet``, ``.csv`` or ``.json`` file, in one step."""
    if file.endswith(".json"):
        replace_text(Path(file), as_json(users, found) + "\n")
        return
    import polars  # only where a table is written

    schema = {"query": polars.Int32} if users is None else {"user": polars.String}
    schema |= {"rank": polars.Int32, "item": polars.String, "title": polars.String, "score": polars.Float64}
    table = polars.DataFrame(as_records(users, found), schema=schema)
    replace_file(Path(file), table.write_parquet if file.endswith(".parquet") else table.write_csv)
