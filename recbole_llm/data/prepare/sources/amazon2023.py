"""Amazon Reviews 2023 (Hou et al., 2024, arXiv:2403.03952).

A variant is a category, ``Gift_Cards``, with a release behind a colon where it is not the 5-core:

- ``Gift_Cards``: the 5-core benchmark, split by leaving the last out: train, valid and test files;
- ``Gift_Cards:0core``: the same without the filter;
- ``Gift_Cards:ratings``: the 5-core as one file;
- ``Gift_Cards:raw``: the reviews themselves; of a user's reviews of an item the earliest stays, as in the benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.llmsrec_rules import preset as llmsrec_preset
from recbole_llm.data.prepare.reading import first_text, scan_json
from recbole_llm.data.prepare.source import Preset, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_RELEASES = ("5core", "0core", "ratings", "raw")
_SPLITS = ("train", "valid", "test")
_COLUMNS = ("user_id", "parent_asin", "rating", "timestamp")
_META = {"parent_asin": pl.String, "title": pl.String, "store": pl.String} | {
    name: pl.List(pl.String) for name in ("categories", "description")
}
_REVIEW = {"user_id": pl.String, "parent_asin": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}


class Amazon2023:
    name = "amazon-2023"
    page = "https://amazon-reviews-2023.github.io/"
    licence = "published by McAuley Lab (UCSD) for research; no explicit open licence"
    times = "unix_ms"
    duplicates = "first"
    wording = Wording()
    variants = ("<Category>", *(f"<Category>:{release}" for release in _RELEASES[1:]))

    def preset(self, variant: str) -> Preset:
        category, release = _parse(variant)
        suffix = "" if release == "5core" else f"-{release}"
        told = {"5core": "5-core", "0core": "all users and items", "ratings": "5-core", "raw": "raw reviews"}[release]
        name = f"{self.name}-{category.lower().replace('_', '-')}{suffix}"
        return Preset(name, self.name, variant, f"Amazon 2023 {category.replace('_', ' ')}, {told}")

    def files(self, variant: str) -> Sequence[RawFile]:
        category, release = _parse(variant)
        items = ADDRESSES["amazon-2023/items"].of(category=category)
        other = (f"meta_{category}.json",)
        meta = RawFile(f"meta_{category}.jsonl.gz", items, other_names=other, of_items=True, page=self.page)
        if release == "raw":
            address = ADDRESSES["amazon-2023/reviews"].of(category=category)
            return [RawFile(f"{category}.jsonl.gz", address, page=self.page), meta]
        if release == "ratings":
            address = ADDRESSES["amazon-2023/ratings"].of(category=category, core="5core")
            return [RawFile(f"{category}.csv.gz", address, page=self.page), meta]
        address = ADDRESSES["amazon-2023/benchmark"]
        return [
            *(
                RawFile(f"{category}.{split}.csv.gz", address.of(category=category, core=release, split=split), page=self.page)
                for split in _SPLITS
            ),
            meta,
        ]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        category, release = _parse(variant)
        if release == "raw":
            interactions = scan_json(files[f"{category}.jsonl.gz"], _REVIEW)
        elif release == "ratings":
            interactions = _ratings(files[f"{category}.csv.gz"])
        else:
            paths = [files[f"{category}.{split}.csv.gz"] for split in _SPLITS]
            parts = (_ratings(path).with_columns(split=pl.lit(split)) for split, path in zip(_SPLITS, paths, strict=True))
            interactions = pl.concat(parts)
        meta = files.get(f"meta_{category}.jsonl.gz")
        items = None if meta is None else scan_json(meta, _META).rename({"parent_asin": "item_id"})
        return Raw(interactions.rename({"parent_asin": "item_id"}), items)


def _ratings(path: Path) -> pl.LazyFrame:
    """The first four columns of a benchmark file, whose early issues have no header, and some a fifth column (history)."""
    head = first_text(path)
    header = head.startswith("user_id,")
    names = head.split(",") if header else [*_COLUMNS, "history"][: head.count(",") + 1]
    if tuple(names[:4]) != _COLUMNS or len(names) > 5:
        raise UserError(f"{path}:1 reads {head[:80]!r}: expected the columns {', '.join(_COLUMNS)}.")
    schema = dict.fromkeys(names, pl.String)
    frame = pl.scan_csv(path, has_header=header, schema=schema, quote_char=None, infer_schema=False)
    return frame.select("user_id", "parent_asin", pl.col("rating").cast(pl.Float64), pl.col("timestamp").cast(pl.Int64))


def _parse(variant: str) -> tuple[str, str]:
    category, _, release = variant.partition(":")
    if not re.fullmatch(r"[A-Za-z][A-Za-z_]*", category) or (release and release not in _RELEASES):
        raise UserError(
            f"amazon-2023:{variant}: name a category as published, and a release of {', '.join(_RELEASES)} or none, such as "
            "amazon-2023:Gift_Cards or amazon-2023:Gift_Cards:raw."
        )
    return category, release or "5core"


SOURCE = Amazon2023()
PRESETS = (
    llmsrec_preset("amazon-movies", "Movies_and_TV", (11947, 17490, 144071), (12029, 17672, 131342)),
    llmsrec_preset("amazon-scientific", "Industrial_and_Scientific", (23627, 25764, 266164), (23627, 25764, 218910)),
    llmsrec_preset("amazon-electronics", "Electronics", (27601, 31533, 292308), (27526, 31778, 260201)),
    llmsrec_preset("amazon-cds", "CDs_and_Vinyl", (18481, 30951, 284695), (18550, 31202, 259947)),
)
