"""Amazon product data 2014 (McAuley et al., 2015), 5-core. The metadata are Python literals, not JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.reading import scan_json, scan_literals
from recbole_llm.data.prepare.source import Preset, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_REVIEW = {"reviewerID": pl.String, "asin": pl.String, "overall": pl.Float64, "unixReviewTime": pl.Int64}
_META = {name: pl.String for name in ("asin", "title", "brand", "description")} | {"categories": pl.List(pl.String)}


class Amazon2014:
    name = "amazon-2014"
    page = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"
    licence = "published by McAuley Lab (UCSD) for research; no explicit open licence"
    times = "unix"
    duplicates = "keep"
    wording = Wording()
    variants = ("<Category>",)

    def preset(self, variant: str) -> Preset:
        if not re.fullmatch(r"[A-Za-z][A-Za-z_]*", variant):
            raise UserError(f"{self.name}:{variant}: name a category as published, such as {self.name}:Beauty.")
        name = f"{self.name}-{variant.lower().replace('_', '-')}"
        return Preset(name, self.name, variant, f"Amazon 2014 {variant.replace('_', ' ')}, 5-core")

    def files(self, variant: str) -> Sequence[RawFile]:
        reviews, items = (ADDRESSES[f"{self.name}/{kind}"].of(category=variant) for kind in ("reviews", "items"))
        return [
            RawFile(f"reviews_{variant}_5.json.gz", reviews, other_names=(f"{variant}_5.json",), page=self.page),
            RawFile(f"meta_{variant}.json.gz", items, of_items=True, page=self.page),
        ]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        names = {"reviewerID": "user_id", "asin": "item_id", "overall": "rating", "unixReviewTime": "timestamp"}
        reviews = scan_json(files[f"reviews_{variant}_5.json.gz"], _REVIEW)
        meta = files.get(f"meta_{variant}.json.gz")
        items = None
        if meta is not None:
            # A category path is a list: its names, and those of further paths, each once.
            categories = pl.col("categories").list.unique(maintain_order=True)
            fields = ("title", "brand", categories, "description")
            items = scan_literals(meta, _META).select(pl.col("asin").alias("item_id"), *fields)
        return Raw(reviews.select(pl.col(old).alias(new) for old, new in names.items()), items)


SOURCE = Amazon2014()
PRESETS = ()
