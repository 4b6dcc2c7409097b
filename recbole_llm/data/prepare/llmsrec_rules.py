"""The preprocessing of LLM-SRec (Kim et al., 2025), which LLM-STAR follows, as its public code does it.

Input: the 5-core leave-last-out files of Amazon Reviews 2023, train, valid and test in this order. Users are sampled in the
order in which they are first seen; counts are taken once, over all splits of the sampled users, and not again after
filtering; a repeated pair counts twice.
"""

from __future__ import annotations

import random
from functools import partial

import polars as pl

from recbole_llm.data.prepare.source import Preset, Published

RATES = {"Movies_and_TV": 0.05, "Electronics": 0.05, "CDs_and_Vinyl": 0.33, "Industrial_and_Scientific": 1.0}
_LEAST = 5  # "> 4" in the code


def choose(interactions: pl.DataFrame, items: pl.LazyFrame | None, rate: float, seed: int = 0) -> pl.DataFrame:
    """Return the interactions that the rules keep, user by user, each user's in the order train, valid, test.

    Args:
        interactions: ``user_id``, ``item_id``, ``split`` ("train", "valid", "test"), in the order of the files.
        items: not used.
        rate: share of users that are sampled.
        seed: seed of the sample.
    """
    users = interactions.get_column("user_id").unique(maintain_order=True)
    drawn = random.Random(seed).sample(range(len(users)), int(len(users) * rate))
    kept = interactions.filter(pl.col("user_id").is_in(users.gather(drawn).implode()))
    kept = kept.with_columns(pl.len().over("user_id").alias("_of_user"), pl.len().over("item_id").alias("_of_item"))
    kept = kept.filter(pl.col("_of_user") >= _LEAST, pl.col("_of_item") >= _LEAST)
    kept = kept.filter((pl.col("split") == "train").sum().over("user_id") >= _LEAST)
    kept = kept.with_row_index("_row").with_columns(pl.col("_row").min().over("user_id").alias("_first"))
    return kept.sort("_first", "_row").drop("_row", "_first", "_of_user", "_of_item")


def describe(items: pl.DataFrame) -> pl.DataFrame:
    """Titles as they are or "Empty title"; of a description its first part, or "Empty description"."""

    def text(name: str) -> pl.Expr:
        column = pl.col(name).list.first() if items.schema[name] == pl.List(pl.String) else pl.col(name)
        column = column.fill_null("")
        return pl.when(column == "").then(pl.lit(f"Empty {name}")).otherwise(column).alias(name)

    return items.with_columns(text(name) for name in ("title", "description") if name in items.columns)


def preset(name: str, category: str, table_10: tuple[int, int, int], table_3: tuple[int, int, int]) -> Preset:
    """A dataset of LLM-SRec's Table 10, with LLM-STAR's Table 3 beside it."""
    rate = RATES[category]
    sample = "all users" if rate == 1 else f"{rate:.0%} of the users"
    return Preset(
        name,
        "amazon-2023",
        category,
        f"Amazon 2023 {category.replace('_', ' ')}, {sample}, by the rules of LLM-SRec and LLM-STAR",
        choose=partial(choose, rate=rate),
        describe=describe,
        duplicates="keep",
        published=(Published("LLM-SRec, Table 10", *table_10), Published("LLM-STAR, Table 3", *table_3)),
        note=(
            "LLM-STAR's Table 3 counts what is left for training (of Scientific, two interactions a user fewer: 266,164 - 2 x "
            "23,627 = 218,910), and its samples of Movies, Electronics and CDs are others than LLM-SRec's."
        ),
    )
