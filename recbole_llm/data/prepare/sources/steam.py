"""Steam (Kang and McAuley, 2018): reviews of games, as Python literals; users are known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.reading import scan_literals
from recbole_llm.data.prepare.source import Preset, Published, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_REVIEW = {name: pl.String for name in ("username", "product_id", "date", "text")}
_GAME = {name: pl.String for name in ("id", "app_name", "title", "developer")} | {
    name: pl.List(pl.String) for name in ("genres", "tags")
}


class Steam:
    name = "steam"
    page = "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data"
    licence = "published by McAuley Lab (UCSD) for research; no explicit open licence"
    times = "unix"
    duplicates = "exact"
    wording = Wording("played a series of games", "games", ("game", "play", "played"))
    variants = ("",)

    def preset(self, variant: str) -> Preset:
        if variant:
            raise UserError(f"steam:{variant} is unknown: there is one dataset, steam.")
        return PRESETS[0]

    def files(self, variant: str) -> Sequence[RawFile]:
        reviews, items = ADDRESSES["steam/reviews"].of(), ADDRESSES["steam/items"].of()
        other = ("steam_new.json", "steam_reviews.json")
        return [
            RawFile("steam_reviews.json.gz", reviews, other_names=other, page=self.page),
            RawFile("steam_games.json.gz", items, of_items=True, page=self.page),
        ]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        reviews = scan_literals(files["steam_reviews.json.gz"], _REVIEW).select(
            pl.col("username").alias("user_id"),
            pl.col("product_id").alias("item_id"),
            pl.col("date").str.to_date("%Y-%m-%d", strict=False).dt.epoch("s").alias("timestamp"),
            pl.col("text").hash(),
        )
        games = files.get("steam_games.json.gz")
        return Raw(reviews, None if games is None else read_games(games))


def read_games(path: Path) -> pl.LazyFrame:
    """The games by ``app_name``, which is there more often than ``title``, and clean of HTML; without an id they go."""
    name = pl.coalesce(_filled("app_name"), _filled("title"))
    fields = (name.alias("title"), "developer", pl.col("genres").alias("categories"), "tags")
    return scan_literals(path, _GAME).filter(_filled("id").is_not_null()).select(pl.col("id").alias("item_id"), *fields)


def _filled(field: str) -> pl.Expr:
    return pl.when(pl.col(field).str.strip_chars() != "").then(pl.col(field))


SOURCE = Steam()
PRESETS = (
    Preset(
        "steam",
        "steam",
        "",
        "Steam, reviews of games",
        core=5,
        published=(Published("RSLLM, Table 3", 11938, 3581, 274726),),
        note="RSLLM's counts are those of a sample whose rule the paper does not give.",
    ),
)
