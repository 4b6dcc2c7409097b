"""MovieLens (Harper and Konstan, 2015). Titles stay as published, year included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.reading import text_lines
from recbole_llm.data.prepare.source import Preset, Published, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_GENRES_100K = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical Mystery "
    "Romance Sci-Fi Thriller War Western"
).split()
_NO_GENRES = "(no genres listed)"


@dataclass(frozen=True)
class _Form:
    """Names of the files of a release; ``.data``, ``.dat`` and ``.csv`` tell how they are written."""

    ratings: str
    movies: str
    archive: str


_FORMS = {
    "100k": _Form("u.data", "u.item", "ml-100k.zip"),
    "1m": _Form("ratings.dat", "movies.dat", "ml-1m.zip"),
    "10m": _Form("ratings.dat", "movies.dat", "ml-10m.zip"),
    "20m": _Form("ratings.csv", "movies.csv", "ml-20m.zip"),
    "25m": _Form("ratings.csv", "movies.csv", "ml-25m.zip"),
    "32m": _Form("ratings.csv", "movies.csv", "ml-32m.zip"),
    "latest-small": _Form("ratings.csv", "movies.csv", "ml-latest-small.zip"),
}


class MovieLens:
    name = "movielens"
    page = "https://grouplens.org/datasets/movielens/"
    licence = "GroupLens' research licence: no redistribution without permission, cite Harper and Konstan (2015)"
    times = "unix"
    duplicates = "keep"  # a user rates a movie once
    wording = Wording("watched a series of movies", "movies", ("movie", "watch", "watched"))
    variants = tuple(_FORMS)

    def preset(self, variant: str) -> Preset:
        named = next((preset for preset in PRESETS if preset.variant == variant), None)
        if named is None:
            raise UserError(f"movielens:{variant} is unknown: choose one of {', '.join(_FORMS)}.")
        return named

    def files(self, variant: str) -> Sequence[RawFile]:
        form, address = _FORMS[variant], ADDRESSES[f"movielens/{variant}"]
        where = (address.of(), address.checksum, form.archive)
        return [RawFile(form.ratings, *where, page=self.page), RawFile(form.movies, *where, of_items=True, page=self.page)]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        form = _FORMS[variant]
        ratings, movies = files[form.ratings], files.get(form.movies)
        columns = ("user_id", "item_id", "rating", "timestamp")
        if form.ratings.endswith(".csv"):
            frame = pl.scan_csv(ratings, infer_schema=False).rename({"userId": "user_id", "movieId": "item_id"})
        else:
            # "1::1193::5::978300760": between double colons lie empty columns.
            width, separator = (4, "\t") if form.ratings.endswith(".data") else (7, ":")
            schema = {f"column_{number}": pl.String for number in range(width)}
            frame = pl.scan_csv(ratings, has_header=False, separator=separator, schema=schema, quote_char=None)
            filled = list(schema)[:: 1 if width == 4 else 2]
            frame = frame.select(pl.col(old).alias(new) for old, new in zip(filled, columns, strict=True))
        casts = (pl.col("rating").cast(pl.Float64), pl.col("timestamp").cast(pl.Int64))
        return Raw(frame.select("user_id", "item_id", *casts), None if movies is None else _movies(movies))


def _movies(path: Path) -> pl.LazyFrame:
    if path.name.endswith(".csv"):
        frame = pl.scan_csv(path, infer_schema=False).rename({"movieId": "item_id"})
    else:
        frame = pl.LazyFrame(list(_records(path)), schema=["item_id", "title", "genres"], orient="row")
    genres = pl.when(pl.col("genres") == _NO_GENRES).then(pl.lit("")).otherwise(pl.col("genres"))
    year = pl.col("title").str.extract(r"^.*\((\d{4})(?:[-–]\d{0,4})?\)")
    return frame.select(
        "item_id", pl.col("title").str.strip_chars(), genres.str.split("|").alias("categories"), year.alias("release_year")
    )


def _records(path: Path) -> list[tuple[str, str, str]]:
    """(id, title, genres) of ``u.item`` or ``movies.dat``; some issues are Latin-1."""
    records = []
    for number, line in text_lines(path):
        if path.name == "u.item":
            fields = line.split("|")
            genres = [genre for genre, flag in zip(_GENRES_100K, fields[5:], strict=False) if flag == "1"]
            record = (fields[0], fields[1] if len(fields) > 1 else "", "|".join(genres))
            whole = len(fields) == 24
        else:
            identity, _, rest = line.partition("::")
            title, _, genres = rest.rpartition("::")
            record, whole = (identity, title, genres), "::" in rest
        if not whole:
            raise UserError(f"{path}:{number} is no record of a movie: {line[:60]!r}.")
        records.append(record)
    return records


SOURCE = MovieLens()
PRESETS = tuple(
    Preset(
        f"movielens-{variant}",
        "movielens",
        variant,
        f"MovieLens {variant}, from GroupLens' files",
        published=(Published("RSLLM, Table 3", 943, 1682, 100000),) if variant == "100k" else (),
    )
    for variant in _FORMS
)
