"""Candidate sets in a file, so that another program is tested on exactly the same questions, or this one on another's.

A parquet file with one row for each row of the test split, all of them the data set's own ids, as text:

* ``user``, ``target``: who, and what came next;
* ``candidates``: list of the other items that the target is ranked among, as many in each row;
* ``history``: list of the user's items before the target, the latest last. Written for other programs; not read.
"""

from __future__ import annotations

import io
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recbole_llm.errors import UserError, first_line, printable
from recbole_llm.evaluation.candidates import draw_candidates
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode
from recbole_llm.files import is_writable, regular_file, replace_file
from recbole_llm.processes import group as processes


def sets_of_test(split: Any, settings: EvaluationSettings, rows: np.ndarray) -> tuple[np.ndarray, bool]:
    """The candidates of the test from ``candidates_file``, which is written from a draw where it does not exist.

    Args:
        split: the test split.
        settings: of the evaluation, with a ``candidates_file``.
        rows: ``[n]`` rows of the split.

    Returns:
        ``[n, 1 + number]`` int64 internal item ids, column 0 = the target; and whether an item may stand twice in a row.

    Raises:
        UserError: the file is no such file, is of other data, or cannot be written; or nothing is sampled.
    """
    file = Path(str(settings.candidates_file))
    mode = None if settings.mode("test") == "labeled" else evaluation_mode(settings, "test")
    if mode is None:
        raise UserError(
            f"candidates_file: mode {settings.mode('test')} samples no candidates; take protocol: retrieval, or leave the key "
            f"out."
        )
    regular_file(file)
    if file.exists():
        return read_candidates(file, split)[rows], True
    folder = file.parent
    if not folder.is_dir() or not is_writable(folder):
        raise UserError(f"candidates_file: {file} cannot be written in {folder}; name a file in a folder of yours.")
    distribution, number = mode
    drawn = draw_candidates(split, number, settings.seed, "test", sampling=settings.sampling, distribution=distribution)
    if processes.is_main():
        write_candidates(file, split, drawn)
    getLogger().info(f"candidates_file: {len(drawn)} sets of {number} candidates and a target are written to {file}")
    return drawn[rows], settings.sampling == "recbole"


def write_candidates(file: Path, split: Any, candidates: np.ndarray) -> None:
    """Write the candidate sets of all rows of a split.

    Args:
        file: to write, in one step.
        split: the test split.
        candidates: ``[rows, 1 + number]`` internal item ids, column 0 = the target.
    """
    tokens = np.asarray(split.field2id_token[split.iid_field]).astype(str)
    histories = split.inter_feat[split.iid_field + split.config["LIST_SUFFIX"]].numpy()
    lengths = split.inter_feat[split.item_list_length_field].numpy().tolist()
    lists = pl.List(pl.String)
    table = pl.DataFrame(
        {
            "user": pl.Series(_users(split).tolist(), dtype=pl.String),
            "target": pl.Series(tokens[candidates[:, 0]].tolist(), dtype=pl.String),
            "candidates": pl.Series(tokens[candidates[:, 1:]].tolist(), dtype=lists),
            "history": pl.Series([tokens[row[:n]].tolist() for row, n in zip(histories, lengths, strict=True)], dtype=lists),
        }
    )
    replace_file(file, lambda temporary: table.write_parquet(temporary))


def read_candidates(file: Path, split: Any) -> np.ndarray:
    """The candidate sets of all rows of a split, ``[rows, 1 + number]`` internal item ids, column 0 = the target.

    Raises:
        UserError: the file is no such file, lacks rows of the split, or names users, targets or items that it has not.
    """
    try:
        table = pl.read_parquet(io.BytesIO(file.read_bytes())).select(
            pl.col("user", "target").cast(pl.String), pl.col("candidates").cast(pl.List(pl.String))
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"candidates_file: {file} is no parquet file with user, target and candidates, a list of item ids "
            f"({first_line(error)})."
        ) from None
    lengths = table["candidates"].list.len()
    if not len(table) or sum(table.null_count().row(0)) or lengths.n_unique() != 1 or lengths[0] == 0:
        raise UserError(f"candidates_file: {file} must name a user, a target and candidates in each row, as many in all.")
    items = table["candidates"].explode()
    wanted = _places(split.field2token_id[split.iid_field], items, "item", file).reshape(len(table), -1)
    targets = _places(split.field2token_id[split.iid_field], table["target"], "target", file)
    users = _places(split.field2token_id[split.uid_field], table["user"], "user", file)

    own = split.inter_feat[split.uid_field].numpy(), split.inter_feat[split.iid_field].numpy()
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(users.tolist(), targets.tolist(), strict=True)):
        rows_of.setdefault(key, []).append(row)
    places = []
    for user, target in zip(own[0].tolist(), own[1].tolist(), strict=True):
        rows = rows_of.get((user, target))
        if not rows:
            names = split.id2token(split.uid_field, user), split.id2token(split.iid_field, target)
            raise UserError(
                f"candidates_file: {file} has no row of user {printable(repr(names[0]))} with the target "
                f"{printable(repr(names[1]))}, which the test has: it is of another split or data set; name another file."
            )
        places.append(rows.pop(0))
    left = len(table) - len(places)
    if left:
        raise UserError(f"candidates_file: {file} has {left} rows that the test has not: it is of another split or data set.")
    return np.concatenate([own[1][:, None].astype(np.int64), wanted[places]], axis=1)


def _places(known: dict[str, int], tokens: pl.Series, kind: str, file: Path) -> np.ndarray:
    """Internal ids of some tokens, int64."""
    distinct = tokens.unique(maintain_order=True)
    ids = {token: known.get(token) for token in distinct.to_list()}
    unknown = next((token for token, place in ids.items() if not place), None)  # 0 is the padding
    if unknown is not None or None in ids:
        raise UserError(
            f"candidates_file: the {kind} {printable(repr(unknown))} in {file} is not in the data set; write its own ids."
        )
    return np.fromiter((ids[token] for token in tokens.to_list()), dtype=np.int64, count=len(tokens))


def _users(split: Any) -> np.ndarray:
    return np.asarray(split.id2token(split.uid_field, split.inter_feat[split.uid_field].numpy())).astype(str)
