"""From raw records to the interactions and items of a dataset, counting what is met."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recbole_llm.data import atomic
from recbole_llm.data.prepare.reading import collect
from recbole_llm.data.prepare.selection import in_order, k_core
from recbole_llm.data.prepare.source import DUPLICATES, TIMES, Counts, Preset, Raw
from recbole_llm.errors import UserError

_ORDER = ("user_id", "item_id", "rating", "timestamp", "split")


@dataclass(frozen=True)
class Built:
    """A dataset in memory: ``interactions`` in their final order, ``items`` in the order of their first interaction."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    counts: Counts
    times: TIMES
    notes: tuple[str, ...]


def build(raw: Raw, preset: Preset, duplicates: DUPLICATES, times: TIMES, files: Collection[Path]) -> Built:
    """Make a dataset of raw records.

    Args:
        raw: the records.
        preset: what is kept and how items are described.
        duplicates: what is done with equal records, see :class:`Source`.
        times: what timestamps are; "none" where they are absent.
        files: what the records come from, for messages.

    Raises:
        UserError: a file cannot be read, or nothing is left.
    """
    counts = Counts()
    frame = collect(raw.interactions, files)
    counts.lines = frame.height
    frame = frame.filter(~_missing("user_id"), ~_missing("item_id"))
    counts.without_id = counts.lines - frame.height
    frame = _without_duplicates(frame, duplicates, counts)
    if "timestamp" not in frame.columns:
        times = "none"
        frame = frame.with_columns(pl.int_range(pl.len()).over("user_id").alias("timestamp"))
    else:
        timed = frame.filter(pl.col("timestamp").is_not_null())
        if timed.height < frame.height:
            counts.extra["without a time, left out"] = frame.height - timed.height
        frame = timed
    if preset.choose is not None:
        frame = preset.choose(frame, raw.items)
    if preset.core:
        frame = k_core(frame, preset.core)
    if "split" not in frame.columns:
        frame = in_order(frame)
    if frame.is_empty():
        raise UserError(f"{preset.name}: of {counts.lines:,} interactions none is left; lower --core or look at the files.")
    frame = frame.select(name for name in _ORDER if name in frame.columns)
    _count(frame, counts)
    items = _items(frame, raw, preset, counts, files)
    return Built(frame, items, counts, times, raw.notes)


def _missing(field: str) -> pl.Expr:
    text = pl.col(field).str.strip_chars().str.to_lowercase()
    return pl.col(field).is_null() | (text == "") | (text == "nan")


def _without_duplicates(frame: pl.DataFrame, duplicates: DUPLICATES, counts: Counts) -> pl.DataFrame:
    pairs = ["user_id", "item_id"]
    before = frame.height
    if duplicates == "exact":
        frame = frame.unique(keep="first", maintain_order=True)
    elif duplicates == "first":
        if "timestamp" in frame.columns:
            frame = in_order(frame)
        frame = frame.unique(pairs, keep="first", maintain_order=True)
    counts.duplicates = before - frame.height
    counts.repeats = frame.height - frame.select(pairs).unique().height
    return frame


def _count(frame: pl.DataFrame, counts: Counts) -> None:
    counts.interactions = frame.height
    counts.users, counts.items = frame.get_column("user_id").n_unique(), frame.get_column("item_id").n_unique()
    same_user = pl.col("user_id") == pl.col("user_id").shift()
    ties = frame.with_columns((same_user & (pl.col("timestamp") == pl.col("timestamp").shift())).fill_null(False).alias("_tie"))
    users = ties.group_by("user_id").agg(pl.col("_tie").any().alias("any"), pl.col("_tie").last().alias("last"))
    counts.users_with_ties, counts.users_whose_last_two_tie = users.get_column("any").sum(), users.get_column("last").sum()


def _items(frame: pl.DataFrame, raw: Raw, preset: Preset, counts: Counts, files: Collection[Path]) -> pl.DataFrame:
    ids = frame.select(pl.col("item_id").unique(maintain_order=True))
    if raw.items is None:
        counts.items_without_metadata = counts.items_without_title = ids.height
        return ids.with_columns(pl.lit("").alias("title"))
    known = collect(raw.items.filter(pl.col("item_id").is_in(ids.get_column("item_id").implode())), files)
    once = known.unique("item_id", keep="first", maintain_order=True)
    counts.items_described_twice = known.height - once.height
    counts.items_without_metadata = ids.height - once.height
    items = ids.join(once, on="item_id", how="left", maintain_order="left")
    counts.items_without_title = ids.height - items.filter(pl.col("title").str.strip_chars().str.len_bytes() > 0).height
    if preset.describe is not None:
        items = preset.describe(items)
    items = items.with_columns(_one_line(items.get_column(name)) for name in items.columns if name != "item_id")
    titles = items.get_column("title")
    counts.shared_titles = titles.filter((titles != "") & titles.is_duplicated()).len()
    return items


def _one_line(column: pl.Series) -> pl.Series:
    """A column's texts, each on one line: lists joined, one level of HTML character references resolved."""
    separator = " " if column.name == "description" else "; "
    if column.dtype == pl.List(pl.String):
        column = column.list.eval(pl.element().filter(pl.element().str.strip_chars() != "")).list.join(separator)
    texts = (_text(text) for text in column.cast(pl.String))
    return pl.Series(column.name, texts, dtype=pl.String)


def _text(text: str | None) -> str:
    if not text:
        return ""
    if "&" in text:
        text = atomic.unescape(text)
    if not text.isprintable():
        text = atomic.CONTROLS.sub(" ", text)
    return text.strip()
