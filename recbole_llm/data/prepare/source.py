"""What a source of data says of itself: its files, how they are read, and what a paper made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import polars as pl

TIMES = Literal["unix", "unix_ms", "none"]
DUPLICATES = Literal["keep", "exact", "first"]


@dataclass(frozen=True)
class RawFile:
    """A file of a source.

    Attributes:
        name: its name as published, ``.gz`` included; the unpacked file, or a packed one, is as good.
        address: where it is downloaded from; empty where it is given out by hand only.
        checksum: ``md5:...`` or ``sha256:...`` of what the address gives; empty where none is published.
        archive: name of the zip file at the address that holds it; empty where the address gives the file itself.
        other_names: names under which the file is also found.
        required: False where the source can be read without it.
        of_items: whether it describes items, rather than interactions.
        page: where a person finds the file.
    """

    name: str
    address: str = ""
    checksum: str = ""
    archive: str = ""
    other_names: tuple[str, ...] = ()
    required: bool = True
    of_items: bool = False
    page: str = ""


@dataclass(frozen=True)
class Raw:
    """The records of a source, lazily.

    Attributes:
        interactions: ``user_id`` and ``item_id`` (String), and where the source has them ``timestamp`` (Int64), ``rating``
            (Float64) and ``split`` (String). Without ``timestamp`` the order of the rows counts. Further columns (a
            hash of the text) only tell records apart.
        items: ``item_id``, ``title`` and further texts (String, or lists of String), or None where there are none.
        notes: what a reader of the dataset must know of this reading, a sentence each.
    """

    interactions: pl.LazyFrame
    items: pl.LazyFrame | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wording:
    """How prompts speak of the interactions: "has watched a series of movies", "this sequence of movies"."""

    series: str = "made a series of purchases"
    basis: str = "purchases"
    title_words: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Published:
    """Counts that a paper gives."""

    where: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Preset:
    """A dataset with a name.

    Attributes:
        name: name of the dataset.
        source: name of its source.
        variant: which of the source's datasets, such as ``CDs_and_Vinyl``.
        about: one line on it.
        choose: what is kept of the interactions, (interactions, items) -> interactions in their final order; None: all.
        describe: what is made of the items' texts; None: they stay.
        duplicates: in place of the source's.
        core: users and items keep at least so many interactions (iterated); 0: no filter.
        published: counts in papers, to be printed beside our own.
        note: what must be known of those counts.
    """

    name: str
    source: str
    variant: str
    about: str = ""
    choose: Callable[[pl.DataFrame, pl.LazyFrame | None], pl.DataFrame] | None = None
    describe: Callable[[pl.DataFrame], pl.DataFrame] | None = None
    duplicates: DUPLICATES | None = None
    core: int = 0
    published: tuple[Published, ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        """What the dataset is, its filter included."""
        return (self.about or self.name) + (f", {self.core}-core" if self.core else "")


class Source(Protocol):
    """One published collection: a module in ``sources/`` offers it as ``SOURCE``, and named datasets as ``PRESETS``."""

    name: str
    page: str
    licence: str
    times: TIMES
    duplicates: DUPLICATES  # keep: all; exact: equal records go; first: an item's first time with a user stays
    wording: Wording
    variants: Sequence[str]  # for help; a source may take others

    def preset(self, variant: str) -> Preset:
        """The dataset of a variant without a name of its own.

        Raises:
            UserError: there is no such variant.
        """

    def files(self, variant: str) -> Sequence[RawFile]:
        """The files of a variant, those with the interactions first."""

    def read(self, files: Mapping[str, Path], variant: str) -> Raw:
        """Read the files, by ``RawFile.name``; those that are not required, or of items, may be absent."""


@dataclass
class Counts:
    """What was met on the way from raw lines to a dataset."""

    lines: int = 0
    without_id: int = 0
    duplicates: int = 0
    repeats: int = 0
    users: int = 0
    items: int = 0
    interactions: int = 0
    users_with_ties: int = 0
    users_whose_last_two_tie: int = 0
    items_described_twice: int = 0
    items_without_metadata: int = 0
    items_without_title: int = 0
    shared_titles: int = 0
    extra: dict[str, int] = field(default_factory=dict)
