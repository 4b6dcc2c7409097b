"""Goodreads of the UCSD Book Graph (Wan and McAuley, 2018): who shelved which book. Rows have no times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.reading import first_text, scan_json
from recbole_llm.data.prepare.source import Preset, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_INTERACTIONS, _IDS, _BOOKS = "goodreads_interactions.csv", "book_id_map.csv", "goodreads_books.json.gz"
_BOOK = {name: pl.String for name in ("book_id", "title", "publisher", "description")}


class Goodreads:
    name = "goodreads"
    page = "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html"
    licence = "UCSD Book Graph: academic use only, no redistribution"
    times = "none"
    duplicates = "first"
    wording = Wording("read a series of books", "books", ("book", "read", "read"))
    variants = ("",)

    def preset(self, variant: str) -> Preset:
        if variant:
            raise UserError(f"goodreads:{variant} is unknown: there is one dataset, goodreads.")
        return PRESETS[0]

    def files(self, variant: str) -> Sequence[RawFile]:
        address = ADDRESSES["goodreads"]
        names = (_INTERACTIONS, _IDS, _BOOKS)
        return [RawFile(name, address.of(file=name), of_items=name != _INTERACTIONS, page=self.page) for name in names]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        """Books keep the number that the interactions give them; the map leads from it to the books' own ids."""
        path = files[_INTERACTIONS]
        if "user_id,book_id" not in first_text(path):
            raise UserError(f"{path}:1 does not name the columns user_id and book_id.")
        table = pl.scan_csv(path, infer_schema=False)
        rating = pl.col("rating").cast(pl.Float64).replace(0.0, None)  # 0: shelved, and not rated
        interactions = table.select("user_id", pl.col("book_id").alias("item_id"), rating)
        items = None
        if _BOOKS in files and _IDS in files:
            ids = pl.scan_csv(files[_IDS], infer_schema=False).select(pl.col("book_id_csv").alias("item_id"), "book_id")
            items = scan_json(files[_BOOKS], _BOOK).join(ids, on="book_id", how="inner").drop("book_id")
            items = items.select("item_id", "title", "publisher", "description")
        return Raw(interactions, items, ("There are no times: the order is that of the file.",))


SOURCE = Goodreads()
PRESETS = (Preset("goodreads", "goodreads", "", "Goodreads, shelved books", core=5),)
