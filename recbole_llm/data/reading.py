"""RecBole's sequential dataset, read line by line from the atomic files, and checked.

Quotation marks are text, only an empty value is missing, and what is invalid is told by file, line and field. RecBole's reader
leaves out lines without a word, or reads ``NA`` as nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.config.settings import select
from recbole_llm.data import atomic, recbole_files
from recbole_llm.errors import UserError, closest, printable

TIMESTAMP_FORMATS = ("auto", "unix", "unix_ms", "none")
_SHOWN = 20  # names listed in a message


@dataclass(frozen=True)
class TextDataSettings:
    """What :class:`TextSequentialDataset` reads of a run's settings, by keys of the same names."""

    item_text: Sequence[str] | str | None
    item_text_separator: str | None
    item_representation: str | None
    timestamp_format: str | None
    like_threshold: float | None
    rating_field: str | None = dataclasses.field(metadata={"key": "RATING_FIELD"})
    field_separator: str
    seq_separator: str
    seq_len: Mapping[str, int] | None
    encoding: str | None
    benchmark_filename: Sequence[str] | None
    eval_args: Mapping[str, Any]

    @classmethod
    def of_config(cls, config: Any) -> TextDataSettings:
        """Read them from a RecBole Config; a key that nobody set has its default."""
        read = select(cls, config)
        defaults = {
            "item_text": "title",
            "item_text_separator": ", ",
            "timestamp_format": "auto",
            "encoding": "utf-8",
            "seq_len": {},
        }
        missing = {name: default for name, default in defaults.items() if getattr(read, name) is None}
        settings = replace(read, **missing)
        if isinstance(settings.item_text, str):
            settings = replace(settings, item_text=[settings.item_text])
        if not settings.item_text:
            raise UserError("the key item_text names no field: set it to a field of the .item file, such as title")
        if settings.timestamp_format not in TIMESTAMP_FORMATS:
            raise UserError(
                f"the key timestamp_format is {settings.timestamp_format!r}: set it to one of {', '.join(TIMESTAMP_FORMATS)}"
            )
        return settings


class AtomicFilesDataset(SequentialDataset):
    """What :class:`~recbole_llm.data.dataset.TextSequentialDataset` reads, before anything is filtered.

    Attributes:
        item_file_tokens (list[str]): ids in the ``.item`` file, line by line below its header.
        inter_file, item_file (Path): the files that it was read from.
    """

    item_file_tokens: list[str]

    def _get_field_from_config(self) -> None:
        self._settings = TextDataSettings.of_config(self.config)
        super()._get_field_from_config()

    def _load_data(self, token: str, dataset_path: str) -> None:
        if self._settings.benchmark_filename is not None:
            raise UserError(
                "the key benchmark_filename (interactions that were split beforehand) is not supported here: "
                "give one .inter file and set eval_args"
            )
        self.inter_file = Path(os.path.normpath(dataset_path), f"{token}.inter")
        self.item_file = self.inter_file.with_name(f"{token}.item")
        folder = self.inter_file.parent
        if not folder.exists() and recbole_files.address_of(token) is not None:
            recbole_files.fetch(token, folder)
        self._check_files_exist()
        self._attributes_of_token = atomic.read_item_attributes(
            self.item_file,
            self.iid_field,
            self._settings.item_text,
            self._settings.field_separator,
            self._settings.encoding,
        )
        self.item_file_tokens = list(self._attributes_of_token)
        super()._load_data(token, dataset_path)

    def _check_files_exist(self) -> None:
        folder = self.inter_file.parent
        if not folder.is_dir():
            raise UserError(self._no_folder(folder))
        if not self.inter_file.is_file():
            raise UserError(
                f"{self.inter_file} is missing: it must hold the interactions, with the columns "
                f"{self.uid_field}:token, {self.iid_field}:token and {self.time_field}:float"
            )
        if not self.item_file.is_file():
            raise UserError(
                f"{self.item_file} is missing: the items' texts are read from it, with the columns {self.iid_field}:token "
                f"and {self._settings.item_text[0]}:token_seq"
            )

    def _no_folder(self, folder: Path) -> str:
        remedy = "set the key data_path to the folder that holds your dataset's folder"
        if not folder.parent.is_dir():
            return f"the folder {folder.parent} of dataset {self.dataset_name!r} does not exist: {remedy}"
        present = sorted(entry.name for entry in folder.parent.iterdir() if (entry / f"{entry.name}.inter").is_file())
        near = closest(self.dataset_name, [*present, "ml-100k"])
        guess = f" (did you mean {near}?)" if near else ""
        shown = ", ".join(present[:_SHOWN]) + (f" and {len(present) - _SHOWN} more" if len(present) > _SHOWN else "")
        return (
            f"dataset folder {folder} does not exist{guess}; {folder.parent} holds {shown or 'no dataset'}, and ml-100k comes "
            f"with RecBole: set the key dataset to one of these, or {remedy}"
        )

    def _get_load_and_unload_col(self, source) -> tuple[set | None, set | None]:
        """Add the columns that a sequence is made of, whatever ``load_col`` says (RecBole's default has no time)."""
        load, unload = super()._get_load_and_unload_col(source)
        if source == FeatureSource.INTERACTION:
            needed = {self.uid_field, self.iid_field, *self._number_fields()}
            load = None if load is None else load | needed
            unload = None if unload is None else unload - needed
        return load, unload

    def _number_fields(self) -> dict[str, str]:
        """The numbers that every interaction must have, field -> key that names it: its time, and what tells likes."""
        ratings = {} if self._settings.like_threshold is None else {self._settings.rating_field: "RATING_FIELD"}
        return {self.time_field: "TIME_FIELD", **ratings}

    def _load_feat(self, filepath: str, source) -> pd.DataFrame | None:
        """Read the ``.inter``, ``.user`` or ``.item`` file as RecBole does, but line by line, without quoting, and checked.

        What differs from RecBole's reader: quotation marks are text, only an empty value is missing (an id may be ``NA`` or
        ``null``), and a missing id is an error where RecBole leaves out the line with a warning.
        """
        if source not in (FeatureSource.INTERACTION, FeatureSource.USER, FeatureSource.ITEM):
            return super()._load_feat(filepath, source)
        load, unload = self._get_load_and_unload_col(source)
        if load == set():
            return None
        path = Path(os.path.normpath(filepath))
        separator, encoding = self._settings.field_separator, self._settings.encoding
        types = atomic.read_header(path, separator, encoding)
        ids = {
            FeatureSource.INTERACTION: {self.uid_field: "USER_ID_FIELD", self.iid_field: "ITEM_ID_FIELD"},
            FeatureSource.USER: {self.uid_field: "USER_ID_FIELD"},
            FeatureSource.ITEM: {self.iid_field: "ITEM_ID_FIELD"},
        }[source]
        for field, key in ids.items():
            atomic.require(path, types, field, ["token"], key)
        if source == FeatureSource.INTERACTION:
            for field, key in self._number_fields().items():
                atomic.require(path, types, field, ["float"], key)
        fields = [field for field in types if (load is None or field in load) and field not in (unload or ())]

        table = atomic.read_table(path, fields, separator, encoding)
        for field in ids:
            if field in fields:
                atomic.check_ids(table, field)
        if source == FeatureSource.INTERACTION:
            if len(table) == 0:
                raise UserError(f"{path} holds no interactions, only a header: add one line for each interaction")
            for field in self._number_fields():
                self._check_numbers(table, field)
            self._recorded_times = table.columns[self.time_field], table.lines
        return self._to_frame(table, source)

    def _check_numbers(self, table: atomic.Table, field: str) -> None:
        values = table.columns[field]
        broken = np.flatnonzero(~np.isfinite(values))
        if broken.size:
            row = int(broken[0])
            what = "time" if field == self.time_field else "rating"
            raise UserError(
                f"{table.path}:{table.lines[row]} has no number as {field} (it reads "
                f"{'nothing' if np.isnan(values[row]) else values[row]}): give every interaction its {what}, or remove the line"
            )

    def _to_frame(self, table: atomic.Table, source: FeatureSource) -> pd.DataFrame:
        """Return the table as RecBole's reader would, and record its fields' properties as that does."""
        columns: dict[str, pd.Series] = {}
        for field, values in table.columns.items():
            kind = FeatureType(table.types[field])
            self.field2source[field] = source
            self.field2type[field] = kind
            if "float" in kind.value:
                self.field2bucketnum[field] = 2
            if kind == FeatureType.FLOAT:
                self.field2seqlen[field] = 1
                columns[field] = pd.Series(values)
            elif kind == FeatureType.TOKEN:
                self.field2seqlen[field] = 1
                columns[field] = pd.Series([value if value != "" else np.nan for value in values], dtype=object)
            else:
                columns[field] = self._to_sequences(table, field, kind)
        return pd.DataFrame(columns)

    def _to_sequences(self, table: atomic.Table, field: str, kind: FeatureType) -> pd.Series:
        separator, longest = self._settings.seq_separator, self._settings.seq_len.get(field)
        sequences = []
        for line, value in zip(table.lines, table.columns[field], strict=True):
            parts = [part for part in value.split(separator) if part][:longest]
            if kind == FeatureType.FLOAT_SEQ:
                try:
                    parts = [float(part) for part in parts]
                except ValueError:
                    raise UserError(
                        f"{table.path}:{line} has {printable(repr(value), 50)} as {field}, which is no list of numbers: write "
                        f"numbers with {separator!r} between them, or declare the column as {field}:token_seq"
                    ) from None
            sequences.append(np.array(parts))
        self.field2seqlen[field] = max(map(len, sequences), default=0)
        return pd.Series(sequences, dtype=object)

    def _fill_nan(self) -> None:
        """As RecBole's, without chained assignment: pandas 2 warns of that, and pandas 3 makes it do nothing."""
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in feat:
                kind = self.field2type[field]
                if kind == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif kind == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:  # an item or user that its file does not describe has a NaN in place of a sequence
                    nothing = np.array([], np.int64 if kind == FeatureType.TOKEN_SEQ else np.float64)
                    values = [nothing if isinstance(value, float) else value for value in feat[field]]
                    feat[field] = pd.Series(values, index=feat.index, dtype=object)
