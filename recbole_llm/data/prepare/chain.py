"""Write RecBole's atomic files: your own data, and generated sequences whose order is known."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from recbole_llm.data import atomic
from recbole_llm.errors import UserError, printable
from recbole_llm.files import replace_file

_FIRST_DAY = 1_577_836_800  # 2020-01-01, in unix seconds
_HOUR = 3600

_ADJECTIVES = (
    "Amber Ancient Autumn Bitter Blue Borrowed Brass Broken Burning Clever Copper Crimson Crooked Distant Drowsy Electric "
    "Emerald Endless Fearless Forgotten Frozen Gentle Golden Hidden Hollow Honest Humming Iron Ivory Jade Little Lonely "
    "Lucky Marble Midnight Northern Painted Patient Quiet Restless"
).split()
_NOUNS = (
    "Archive Atlas Balloon Beacon Bridge Caravan Cathedral Clockmaker Comet Compass Corridor Courier Desert Engine Ferry "
    "Fountain Garden Glacier Harbour Harvest Island Journey Kingdom Lantern Library Lighthouse Machine Market Meadow Mirror "
    "Monsoon Mountain Observatory Orchard Orchestra Parade Postman River Signal Winter"
).split()


def write_atomic(path: str | os.PathLike, columns: Mapping[str, Iterable[object]], separator: str = "\t") -> None:
    """Write one atomic file; a file of that name is replaced once the new one is complete.

    Numbers are written in full. Line breaks, separators and other control characters inside texts (``token_seq``) become
    spaces, for a record is one line; a missing value (None or NaN) becomes an empty one.

    Args:
        path: such as ``dataset/my-shop/my-shop.inter``; missing folders are made.
        columns: ``name:type`` -> values, in the order of the file's columns, all of one length. Types: token, token_seq (a
            text, or several tokens in one string), float (a number, or a date, which becomes unix seconds; without a time zone
            it is UTC), float_seq.
        separator: stands between columns (RecBole's key ``field_separator``).

    Raises:
        UserError: a column is not ``name:type``, columns differ in length, an id (``token``) holds a separator or line
            break, a float is neither a number nor a date, or the disk is full.

    Example:
        >>> write_atomic("dataset/shop/shop.item", {"item_id:token": ["a1"], "title:token_seq": ["Red shoes"]})
    """
    path = Path(path)
    written = {}
    for head, values in columns.items():
        name, _, kind = head.partition(":")
        if not name or kind not in atomic.TYPES:
            raise UserError(f"column {head!r} of {path}: write name:type, with one of {', '.join(atomic.TYPES)} as type")
        written[head] = [_format(value, kind, separator, head, path) for value in values]
    lengths = {head: len(values) for head, values in written.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"the columns of {path} must have one length, not {lengths or 'no columns'}")

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(separator.join(written) + "\n")
            file.writelines(separator.join(row) + "\n" for row in zip(*written.values(), strict=True))

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)


def _format(value: object, kind: str, separator: str, head: str, path: Path) -> str:
    if value is None or value != value:  # NaN is what pandas has in place of a missing text
        return ""
    if kind == "float":
        number = _number(value, head, path)
        return str(int(number)) if number.is_integer() else repr(number)
    text = str(value)
    if separator in text or not text.isprintable():
        cleaned = atomic.CONTROLS.sub(" ", text.replace(separator, " "))
        if kind == "token" and cleaned != text:
            raise UserError(
                f"column {head!r} of {path} holds {printable(repr(text))}: an id cannot hold a separator or a line break"
            )
        return cleaned
    return text


def _number(value: object, head: str, path: Path) -> float:
    """A number, or the unix seconds of a date: a ``datetime``, a ``date``, pandas' ``Timestamp`` or a text in ISO form."""
    if isinstance(value, (int, float, np.number)):
        return float(value)
    with contextlib.suppress(ValueError):
        if isinstance(value, str):
            return float(value)
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(moment, np.datetime64):
            moment = moment.astype("datetime64[us]").item()
        if not isinstance(moment, datetime):
            moment = datetime(moment.year, moment.month, moment.day)  # type: ignore[attr-defined]
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"column {head!r} of {path} holds {printable(repr(value))}: give a number, a datetime, or a date such as "
            f"2024-12-31 or 2024-12-31T18:30:00"
        ) from None


def generate_chain(
    folder: str | os.PathLike,
    name: str,
    users: int,
    items: int,
    seed: int,
    noise: float,
    lengths: tuple[int, int] = (5, 15),
) -> Path:
    """Write a dataset whose order is known: item ``k + 1`` follows item ``k``, and the first follows the last.

    A model that learns the order reaches a hit rate of about ``1 - noise``; one that looks at the set of items alone cannot.
    Titles are readable, distinct and say nothing of the order. The same arguments give the same bytes, on any machine.

    Args:
        folder: where datasets live (RecBole's ``data_path``); the files are ``folder/name/name.inter`` and ``.item``.
        name: name of the dataset.
        users: number of users, with ids ``u1, u2, ...``.
        items: number of items (at least 3), with ids ``1, 2, ...``: the place in the chain.
        seed: seed of all draws.
        noise: probability, in [0, 1], that the next item is any of the others but the successor (all equally probable).
        lengths: least and greatest number of interactions of a user.

    Returns:
        The dataset's folder.

    Raises:
        UserError: an argument is out of range.
    """
    if users < 1 or items < 3 or not 0 <= noise <= 1 or not 1 <= lengths[0] <= lengths[1]:
        raise UserError(
            f"a chain needs users >= 1, items >= 3, noise in [0, 1] and lengths from low to high, not users={users}, "
            f"items={items}, noise={noise}, lengths={lengths}"
        )
    # Only random(), whose values Python guarantees for a seed, so that the files are the same everywhere.
    generator = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return low + int(generator.random() * (high - low + 1))

    user_ids, item_ids, timestamps = [], [], []
    for user in range(1, users + 1):
        item = draw(1, items)
        time = _FIRST_DAY + draw(0, 2 * 365 * 24 * _HOUR)
        for _ in range(draw(*lengths)):
            user_ids.append(f"u{user}")
            item_ids.append(item)
            timestamps.append(time)
            successor = item % items + 1
            if generator.random() < noise:
                item = (successor + draw(0, items - 2)) % items + 1  # any item but the successor
            else:
                item = successor
            time += draw(_HOUR, 7 * 24 * _HOUR)

    target = Path(folder, name)
    write_atomic(
        target / f"{name}.inter",
        {"user_id:token": user_ids, "item_id:token": item_ids, "timestamp:float": timestamps},
    )
    write_atomic(
        target / f"{name}.item",
        {"item_id:token": range(1, items + 1), "title:token_seq": _titles(items, generator)},
    )
    return target


def _titles(number: int, generator: random.Random) -> list[str]:
    """Return ``number`` distinct made-up titles, in random order."""
    titles = [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    titles += [f"{titles[index % len(titles)]}, Part {index // len(titles) + 1}" for index in range(len(titles), number)]
    keys = [generator.random() for _ in titles]
    return [title for _, title in sorted(zip(keys, titles, strict=True))][:number]
