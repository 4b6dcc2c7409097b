"""Filters on interactions that sources and presets share."""

from __future__ import annotations

import random

import polars as pl


def k_core(interactions: pl.DataFrame, least: int) -> pl.DataFrame:
    """Leave out users and items with fewer than ``least`` interactions, until none is left that has."""
    while True:
        enough = (pl.len().over("user_id") >= least) & (pl.len().over("item_id") >= least)
        kept = interactions.filter(enough)
        if kept.height == interactions.height:
            return kept
        interactions = kept


def with_title(interactions: pl.DataFrame, items: pl.LazyFrame | None) -> pl.DataFrame:
    """Leave out interactions with items that have no title."""
    if items is None:
        return interactions
    titled = items.filter(pl.col("title").str.strip_chars().str.len_bytes() > 0).select("item_id").unique()
    ids = titled.collect(engine="streaming").get_column("item_id")
    return interactions.filter(pl.col("item_id").is_in(ids.implode()))


def one_user_in_five(interactions: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Keep each user with probability one in five, drawn in the order in which users are first seen."""
    users = interactions.get_column("user_id").unique(maintain_order=True)
    generator = random.Random(seed)
    drawn = users.filter(pl.Series([generator.randint(0, 4) == 0 for _ in range(len(users))], dtype=pl.Boolean))
    return interactions.filter(pl.col("user_id").is_in(drawn.implode()))


def in_order(interactions: pl.DataFrame) -> pl.DataFrame:
    """Users as they are first seen, each user's interactions by time; equal times keep the order of the file."""
    framed = interactions.with_row_index("_row").with_columns(pl.col("_row").min().over("user_id").alias("_first"))
    return framed.sort("_first", "timestamp", "_row").drop("_row", "_first")
