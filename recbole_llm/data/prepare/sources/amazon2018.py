"""Amazon review data 2018 (Ni et al., 2019), 5-core, with the six target domains of ST2SI (Zhai et al., 2025, Table 1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.reading import scan_json
from recbole_llm.data.prepare.selection import one_user_in_five, with_title
from recbole_llm.data.prepare.source import Preset, Published, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_REVIEW = {"reviewerID": pl.String, "asin": pl.String, "overall": pl.Float64, "unixReviewTime": pl.Int64}
_META = {"asin": pl.String, "title": pl.String, "brand": pl.String} | {
    name: pl.List(pl.String) for name in ("category", "description")
}


class Amazon2018:
    name = "amazon-2018"
    page = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
    licence = "published by McAuley Lab (UCSD) for research; no explicit open licence"
    times = "unix"
    duplicates = "keep"  # a user reviews an item again: the 5-core counts both
    wording = Wording()
    variants = ("<Category>",)

    def preset(self, variant: str) -> Preset:
        return _preset(self.name, "Amazon 2018", variant)

    def files(self, variant: str) -> Sequence[RawFile]:
        reviews, items = (ADDRESSES[f"{self.name}/{kind}"].of(category=variant) for kind in ("reviews", "items"))
        meta = f"meta_{variant}.json.gz"
        return [RawFile(f"{variant}_5.json.gz", reviews, page=self.page), RawFile(meta, items, of_items=True, page=self.page)]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        reviews = scan_json(files[f"{variant}_5.json.gz"], _REVIEW)
        meta = files.get(f"meta_{variant}.json.gz")
        items = None
        if meta is not None:
            brand = pl.col("brand").str.replace_all(r"\s+", " ").str.strip_chars().str.replace("^by ", "")
            items = scan_json(meta, _META).select(
                pl.col("asin").alias("item_id"), "title", brand, pl.col("category").alias("categories"), "description"
            )
        return Raw(_interactions(reviews), items)


def _interactions(reviews: pl.LazyFrame) -> pl.LazyFrame:
    names = {"reviewerID": "user_id", "asin": "item_id", "overall": "rating", "unixReviewTime": "timestamp"}
    return reviews.select(pl.col(old).alias(new) for old, new in names.items())


def _preset(source: str, title: str, variant: str) -> Preset:
    if not re.fullmatch(r"[A-Za-z][A-Za-z_]*", variant):
        raise UserError(f"{source}:{variant}: name a category as published, such as {source}:Musical_Instruments.")
    name = f"{source}-{variant.lower().replace('_', '-')}"
    return Preset(name, source, variant, f"{title} {variant.replace('_', ' ')}, 5-core")


def _fifth(interactions: pl.DataFrame, items: pl.LazyFrame | None) -> pl.DataFrame:
    return one_user_in_five(with_title(interactions, items))


def _st2si(short: str, category: str, users: int, items: int, interactions: int, fifth: bool = False) -> Preset:
    about = f"Amazon 2018 {category.replace('_', ' ')}, 5-core, items with a title" + (", one user in five" if fifth else "")
    note = "The paper's own fifth of the users was drawn without a seed: ours has seed 0, and counts near the paper's."
    published = (Published("ST2SI, Table 1", users, items, interactions),)
    choose = _fifth if fifth else with_title
    return Preset(
        f"amazon-2018-{short}", "amazon-2018", category, about, choose, published=published, note=note if fifth else ""
    )


SOURCE = Amazon2018()
PRESETS = (
    _st2si("scientific", "Industrial_and_Scientific", 11041, 5327, 76896),
    _st2si("instruments", "Musical_Instruments", 27530, 10611, 231312),
    _st2si("arts", "Arts_Crafts_and_Sewing", 56210, 22855, 492492),
    _st2si("office", "Office_Products", 101501, 27932, 798914),
    _st2si("games", "Video_Games", 11036, 15402, 100255, fifth=True),
    _st2si("pet", "Pet_Supplies", 47569, 37970, 420662, fifth=True),
)
