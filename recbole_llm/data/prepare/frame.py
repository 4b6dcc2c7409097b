"""Your own data: from tables in memory or on disk to a dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from recbole_llm.data.prepare.build import Built, build
from recbole_llm.data.prepare.download import digest
from recbole_llm.data.prepare.source import TIMES, Preset, Raw, Wording
from recbole_llm.data.prepare.write import Origin, write_dataset
from recbole_llm.errors import UserError, closest, first_line

Frame = Any  # pandas or polars DataFrame, Hugging Face Dataset, mapping of columns, or path


def from_frame(
    interactions: Frame,
    items: Frame | None,
    name: str,
    *,
    folder: str | os.PathLike = "dataset",
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    rating: str | None = None,
    title: str = "title",
    core: int = 0,
    wording: Wording | None = None,
) -> Path:
    """Write a dataset of your own tables: ``folder/name/`` with atomic files, README.md and YAML file.

    A table is a pandas or polars DataFrame, a Hugging Face ``Dataset``, a mapping column -> values, or the path of a CSV
    (``.csv``, ``.tsv``), Parquet or JSON lines file, packed with gzip or not.

    Args:
        interactions: who had what, when.
        items: what the items are called; further columns of text, or of lists of text, are written as well. None: no texts.
        name: name of the dataset, and of its folder.
        folder: where datasets live (RecBole's ``data_path``).
        user: column of the users' ids.
        item: column of the items' ids, in both tables.
        time: column of times: unix seconds or milliseconds, dates, or ISO text. None: the order of the rows.
        rating: column of ratings, to be written as well.
        title: column of the items' titles.
        core: users and items keep at least so many interactions (iterated); 0: no filter.
        wording: how prompts speak of the interactions.

    Returns:
        The dataset's folder.

    Raises:
        UserError: a column is absent or cannot be read, an item is described twice, or nothing is left.

    Example:
        >>> from_frame("sales.csv", "products.parquet", "my-shop", user="customer", item="sku", time="day", title="product")
    """
    return write_own(interactions, items, name, folder, user, item, time, rating, title, core, wording)[0]


def write_own(
    interactions: Frame,
    items: Frame | None,
    name: str,
    folder: str | os.PathLike,
    user: str,
    item: str,
    time: str | None,
    rating: str | None,
    title: str,
    core: int,
    wording: Wording | None,
    command: str = "",
) -> tuple[Path, Built, Preset]:
    """As :func:`from_frame`; returns the folder, what was built and what it is called."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{name!r} cannot be the name of a dataset: it is the name of a folder.")
    rows = table(interactions, "interactions")
    users, bought = _ids(rows, user, "interactions", "user"), _ids(rows, item, "interactions", "item")
    columns = [users.alias("user_id"), bought.alias("item_id")]
    times: TIMES = "none"
    if time is not None:
        _require(rows, time, "interactions", "time")
        stamps, times = _times(rows.get_column(time), time)
        columns.append(stamps.alias("timestamp"))
    if rating is not None:
        _require(rows, rating, "interactions", "rating")
        columns.append(rows.get_column(rating).cast(pl.Float64, strict=False).alias("rating"))
    described = None
    if items is not None:
        described = read_items(items, item, title).lazy()
    preset = Preset(name, "own", "", f"{name}, from tables of one's own", core=core)
    built = build(Raw(pl.LazyFrame(columns), described), preset, "exact", times, ())
    files = [Path(value) for value in (interactions, items) if isinstance(value, (str, os.PathLike))]
    origin = Origin(
        "tables of one's own",
        "as its owner says",
        command or f"from_frame(interactions, items, {name!r})",
        {path.name: digest(path) for path in files},
        "equal records (user, item, time) are dropped, repeated pairs with other times kept",
    )
    return write_dataset(Path(folder), preset, built, wording or Wording(), origin), built, preset


def read_items(items: Frame, item: str, title: str) -> pl.DataFrame:
    """A table of items as ``item_id``, ``title`` and the further columns of text.

    Raises:
        UserError: a column is absent, or an item is described twice.
    """
    rows = table(items, "items")
    _require(rows, title, "items", "title")
    ids = _ids(rows, item, "items", "item").alias("item_id")
    twice = ids.filter(ids.is_duplicated() & ids.is_not_null())
    if len(twice):
        raise UserError(f"items: {twice[0]!r} is described on two lines; keep one for each item.")
    texts = [rows.get_column(title).cast(pl.String).alias("title")]
    for name, kind in rows.schema.items():
        if name in (item, title, "item_id", "title") or not name.isidentifier():
            continue
        if kind == pl.List(pl.String):
            texts.append(rows.get_column(name))
        elif kind in (pl.String, pl.Categorical) or kind.is_numeric():
            texts.append(rows.get_column(name).cast(pl.String))
    return pl.DataFrame([ids, *texts])


def table(data: Frame, what: str) -> pl.DataFrame:
    """Any of the kinds of table as a polars DataFrame.

    Raises:
        UserError: it is none of them, or its file cannot be read.
    """
    if isinstance(data, pl.DataFrame):
        return data
    if isinstance(data, pl.LazyFrame):
        return data.collect(engine="streaming")
    if isinstance(data, (str, os.PathLike)):
        return _file(Path(data), what)
    try:
        if hasattr(data, "to_polars"):
            return data.to_polars()
        if isinstance(data, Mapping):
            return pl.DataFrame(
                {name: values if hasattr(values, "dtype") else list(values) for name, values in data.items()}, strict=False
            )
        if hasattr(data, "to_pandas"):
            data = data.to_pandas()
        if hasattr(data, "columns") and hasattr(data, "__getitem__"):
            return pl.DataFrame({str(name): _column(data[name]) for name in data.columns}, strict=False)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        raise UserError(f"the table of {what} cannot be read ({first_line(error)}).") from None
    raise UserError(f"the {what} are a {type(data).__name__}: give a DataFrame, a Dataset, a mapping of columns or a path.")


def _column(column: Any) -> Any:
    """A pandas column as polars takes it without pyarrow: plain values, None for what is missing."""
    if getattr(column.dtype, "kind", "O") in "iufbM" and hasattr(column, "to_numpy") and not hasattr(column.dtype, "na_value"):
        return column.to_numpy()
    return [None if value is None or value != value else value for value in column.tolist()]


def _file(path: Path, what: str) -> pl.DataFrame:
    if not path.is_file():
        raise UserError(f"there is no file {path} to take the {what} from.")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("csv", "tsv", "parquet", "jsonl", "ndjson"):
        raise UserError(f"{path} is called .{kind}: {what} are read from .csv, .tsv, .parquet or .jsonl, or .gz of them.")
    try:
        if kind in ("csv", "tsv"):
            return pl.read_csv(path, separator="," if kind == "csv" else "\t", infer_schema=False)
        return pl.read_parquet(path) if kind == "parquet" else pl.read_ndjson(path, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as .{kind} ({first_line(error)}).") from None


def _require(rows: pl.DataFrame, column: str, what: str, key: str) -> None:
    if column not in rows.columns:
        near = closest(column, rows.columns)
        hint = f"did you mean {key}={near}?" if near else f"name one of {', '.join(rows.columns)} with {key}=."
        raise UserError(f"the {what} have no column {column!r}; {hint}")


def _ids(rows: pl.DataFrame, column: str, what: str, key: str) -> pl.Series:
    _require(rows, column, what, key)
    values = rows.get_column(column)
    if values.dtype.is_float():  # pandas makes floats of whole numbers as soon as one is missing
        whole = values.drop_nulls().drop_nans()
        if (whole != whole.round()).any():
            raise UserError(f"the {what}' column {column!r} holds numbers with fractions, which are no ids.")
        values = values.fill_nan(None).cast(pl.Int64)
    return values.cast(pl.String)


def _times(values: pl.Series, column: str) -> tuple[pl.Series, TIMES]:
    """Times as whole numbers, and what they are."""
    if values.dtype in (pl.Datetime, pl.Date):
        return values.cast(pl.Datetime("us")).dt.epoch("s"), "unix"
    if values.dtype == pl.String:
        numbers = values.str.strip_chars().cast(pl.Float64, strict=False)
        if numbers.null_count() > values.null_count():
            return _dates(values, column), "unix"
        values = numbers
    if not values.dtype.is_numeric():
        raise UserError(f"the column {column!r} holds {values.dtype}: times are numbers, dates or ISO text.")
    numbers = values.cast(pl.Float64).fill_nan(None).round().cast(pl.Int64)
    middle = numbers.median()
    if middle is None or middle < 1e8:
        return numbers, "none"
    return numbers, "unix_ms" if middle >= 1e11 else "unix"


def _dates(values: pl.Series, column: str) -> pl.Series:
    texts = values.str.strip_chars().str.replace("T", " ").str.replace(r"(\.\d+)?(Z|\+00:?00)?$", "")
    frame = pl.DataFrame({"text": texts}).select(
        pl.coalesce(
            pl.col("text").str.to_datetime(form, strict=False) for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d")
        ).alias("time")
    )
    times = frame.get_column("time")
    wrong = values.filter(times.is_null() & values.is_not_null() & (values.str.strip_chars() != ""))
    if len(wrong):
        raise UserError(f"the column {column!r} holds {wrong[0]!r}: write times as numbers or as 2024-01-31 12:00:00.")
    return times.dt.epoch("s")
