"""Last.fm of HetRec 2011 (Cantador et al., 2011): who listens to which artist, and when artists were tagged.

Listening has no times. Where ``user_taggedartists-timestamps.dat`` is there, an artist's time with a user is when the user
first tagged it, and what was never tagged is left out; where it is not, the order is that of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recbole_llm.data.prepare.addresses import ADDRESSES
from recbole_llm.data.prepare.source import Preset, Published, Raw, RawFile, Wording
from recbole_llm.errors import UserError

_LISTENING, _ARTISTS, _TAGGING = "user_artists.dat", "artists.dat", "user_taggedartists-timestamps.dat"


class LastFM:
    name = "lastfm"
    page = "https://grouplens.org/datasets/hetrec-2011/"
    licence = "HetRec 2011: for research that is not commercial, cite Cantador et al. (2011)"
    times = "unix_ms"
    duplicates = "keep"
    wording = Wording("listened to a series of artists", "artists", ("artist", "listen to", "listened to"))
    variants = ("",)

    def preset(self, variant: str) -> Preset:
        if variant:
            raise UserError(f"lastfm:{variant} is unknown: there is one dataset, lastfm.")
        return PRESETS[0]

    def files(self, variant: str) -> Sequence[RawFile]:
        address = ADDRESSES["lastfm"]
        where = (address.of(), address.checksum, "hetrec2011-lastfm-2k.zip")
        return [
            RawFile(_LISTENING, *where, page=self.page),
            RawFile(_ARTISTS, *where, of_items=True, page=self.page),
            RawFile(_TAGGING, *where, required=False, page=self.page),
        ]

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        listening = _table(files[_LISTENING]).select(
            pl.col("userID").alias("user_id"),
            pl.col("artistID").alias("item_id"),
            pl.col("weight").cast(pl.Float64).alias("rating"),
        )
        notes = ("There are no times: the order is that of the file, by artist, and says nothing of when.",)
        if _TAGGING in files:
            time = pl.col("timestamp").cast(pl.Int64)
            pair = pl.col("userID").alias("user_id"), pl.col("artistID").alias("item_id")
            tagging = _table(files[_TAGGING]).select(*pair, time)
            first = tagging.group_by("user_id", "item_id").agg(pl.col("timestamp").min())
            listening = listening.join(first, on=["user_id", "item_id"], how="left", maintain_order="left")
            notes = ("A time is when the user first tagged the artist; what was never tagged is left out.",)
        artists = files.get(_ARTISTS)
        items = None
        if artists is not None:
            items = _table(artists).select(pl.col("id").alias("item_id"), pl.col("name").alias("title"))
        return Raw(listening, items, notes)


def _table(path: Path) -> pl.LazyFrame:
    """A table with a header, tabs between columns and quotation marks that mean nothing; blanks around values go."""
    frame = pl.scan_csv(path, separator="\t", quote_char=None, infer_schema=False, encoding="utf8-lossy")
    return frame.select(pl.all().str.strip_chars())


SOURCE = LastFM()
PRESETS = (
    Preset(
        "lastfm",
        "lastfm",
        "",
        "Last.fm of HetRec 2011, users and artists",
        core=5,
        published=(Published("RSLLM, Table 3", 1220, 4606, 73510),),
        note="RSLLM does not say how its 1,220 users of 1,892 were chosen, nor what their order is.",
    ),
)
