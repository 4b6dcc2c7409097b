"""Yelp's academic dataset: reviews, or tips (``yelp:tip``), of businesses. Given out on acceptance of its terms only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.reading import first_text, scan_json
from recbole_llm.data.prepare.source import Preset, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_BUSINESS = "yelp_academic_dataset_business.json"


class Yelp:
    name = "yelp"
    page = "https://business.yelp.com/data/resources/open-dataset/"
    licence = "Yelp's dataset terms: academic use, no redistribution"
    times = "unix"
    duplicates = "exact"
    wording = Wording("visited a series of places", "visits", ("place", "visit", "visited"))
    variants = ("review", "tip")

    def preset(self, variant: str) -> Preset:
        if variant not in ("", *self.variants):
            raise UserError(f"yelp:{variant} is unknown: choose yelp:review or yelp:tip.")
        return PRESETS[1 if variant == "tip" else 0]

    def files(self, variant: str) -> Sequence[RawFile]:
        reviews = f"yelp_academic_dataset_{variant}.json"
        return [RawFile(reviews, page=self.page), RawFile(_BUSINESS, of_items=True, page=self.page)]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        schema = {"user_id": pl.String, "business_id": pl.String, "date": pl.String, "text": pl.String} | (
            {"stars": pl.Float64} if variant == "review" else {}
        )
        day = pl.col("date").str.slice(0, 19)
        time = pl.coalesce(
            day.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False), day.str.to_datetime("%Y-%m-%d", strict=False)
        )
        fields = [pl.col("business_id").alias("item_id"), time.dt.epoch("s").alias("timestamp"), pl.col("text").hash()]
        fields += [pl.col("stars").alias("rating")] if variant == "review" else []
        interactions = scan_json(files[f"yelp_academic_dataset_{variant}.json"], schema).select("user_id", *fields)
        business = files.get(_BUSINESS)
        return Raw(interactions, None if business is None else _places(business))


def _places(path: Path) -> pl.LazyFrame:
    """The businesses; early issues list categories, later ones write them with commas."""
    try:
        listed = isinstance(json.loads(first_text(path)).get("categories"), list)
    except (ValueError, AttributeError):
        raise UserError(f"{path}:1 is no JSON record.") from None
    kind = pl.List(pl.String) if listed else pl.String
    schema = {"business_id": pl.String, "name": pl.String, "city": pl.String, "categories": kind}
    categories = pl.col("categories") if listed else pl.col("categories").str.split(", ")
    return scan_json(path, schema).select(
        pl.col("business_id").alias("item_id"), pl.col("name").alias("title"), "city", categories
    )


SOURCE = Yelp()
PRESETS = (
    Preset("yelp", "yelp", "review", "Yelp, reviews of businesses", core=5),
    Preset("yelp-tip", "yelp", "tip", "Yelp, tips on businesses", core=5),
)
