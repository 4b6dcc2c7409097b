"""Writing a dataset: atomic files, a README.md and a YAML file, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recbole_llm._version import __version__
from recbole_llm.data.prepare.build import Built
from recbole_llm.data.prepare.source import TIMES, Counts, Preset, Wording
from recbole_llm.errors import UserError
from recbole_llm.files import written_folder

_TYPES = {"user_id": "token", "item_id": "token", "split": "token", "release_year": "token"}
_ROWS = 500_000  # written at a time


@dataclass(frozen=True)
class Origin:
    """Where a dataset comes from, for its README.

    Attributes:
        page: where the source is described.
        licence: its terms.
        command: what made the dataset.
        checksums: raw file -> sha256.
        duplicates: what was done with repeated records.
    """

    page: str
    licence: str
    command: str
    checksums: Mapping[str, str]
    duplicates: str


def write_dataset(folder: Path, preset: Preset, built: Built, wording: Wording, origin: Origin) -> Path:
    """Write ``folder/<name>`` in one step; a dataset of that name is replaced.

    Raises:
        UserError: an id cannot stand in an atomic file.
        OSError: the disk is full, or the folder is not to be written.
    """
    name = preset.name
    folder.mkdir(parents=True, exist_ok=True)
    for frame, fields in ((built.interactions, ("user_id", "item_id")), (built.items, ("item_id",))):
        for field in fields:
            _refuse_broken_ids(frame, field, name)
    with written_folder(folder / name) as new:
        new.mkdir()
        _write_table(new / f"{name}.inter", built.interactions)
        _write_table(new / f"{name}.item", built.items)
        _write_text(new / f"{name}.yaml", dataset_yaml(preset, built.items.columns[1:], built.times, wording, built.counts))
        _write_text(new / "README.md", readme(preset, built, origin))
    return folder / name


def _refuse_broken_ids(frame: pl.DataFrame, field: str, name: str) -> None:
    broken = frame.filter(pl.col(field).str.contains(r"[\t\n\r]")).get_column(field)
    if len(broken):
        raise UserError(f"{name}: the {field} {broken[0]!r} holds a tab or a line break, which an id cannot; replace it first.")


def _write_table(path: Path, frame: pl.DataFrame) -> None:
    kinds = {column: "float" if kind.is_numeric() else "token_seq" for column, kind in frame.schema.items()}
    types = {column: _TYPES.get(column, kind) for column, kind in kinds.items()}
    with _named(path), open(path, "wb") as file:
        file.write(("\t".join(f"{column}:{kind}" for column, kind in types.items()) + "\n").encode())
        for start in range(0, frame.height, _ROWS):
            part = frame.slice(start, _ROWS)
            file.write(part.write_csv(include_header=False, separator="\t", quote_style="never").encode())


def _write_text(path: Path, text: str) -> None:
    with _named(path), open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


class _named:
    """Puts the file's name into errors of writing it: a full disk names none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def dataset_yaml(preset: Preset, fields: Sequence[str], times: TIMES, wording: Wording, counts: Counts | None = None) -> str:
    """The settings of a dataset, as text. Without ``counts`` it speaks of the published ones."""
    told = f"{counts.users:,} users, {counts.items:,} items, {counts.interactions:,} interactions" if counts else ""
    if not told and preset.published:
        first = preset.published[0]
        told = f"{first.users:,} users, {first.items:,} items, {first.interactions:,} interactions ({first.where})"
    meaning = {"unix": "seconds since 1970", "unix_ms": "milliseconds since 1970", "none": "ranks, not dates"}[times]
    lines = [
        f"# {preset.title}" + (f": {told}." if told else "."),
        f"prepare_command: recbole-llm prepare {preset.name}  # (str or None) makes the dataset where it is not there yet",
        "load_col:                       # (dict or None) columns that RecBole reads of each atomic file",
        "  inter: [user_id, item_id, timestamp]",
        "item_text: [title]              # (list) fields of the .item file that make up an item's text. It has: "
        + ", ".join(fields),
        f"timestamp_format: {times:<14}# (str, one of auto|unix|unix_ms|none) here: {meaning}",
        f'prompt_sentence: "This user has {wording.series} in the following order:"'
        "  # (str) opens a user prompt, before the items",
        f'prompt_request: ". Based on this sequence of {wording.basis},{{goal}} generate user representation token:"'
        "  # (str) closes a user prompt, before the out token",
    ]
    if wording.title_words:
        lines.append(
            f"title_words: [{', '.join(wording.title_words)}]  # (list) what the prompts that are answered by a title say for "
            "{item}, {verb} and {past}"
        )
    return "\n".join(lines) + "\n"


def count_lines(counts: Counts) -> list[tuple[str, int]]:
    """(what, how many) of all counts, those of odd records only where there are any."""
    rows = [("raw lines", counts.lines)]
    odd = [
        ("lines without an id, left out", counts.without_id),
        ("duplicates dropped", counts.duplicates),
        ("repeated pairs of user and item, kept", counts.repeats),
        *counts.extra.items(),
    ]
    rows += [row for row in odd if row[1] or row[0] == "duplicates dropped"]
    rows += [("users", counts.users), ("items", counts.items), ("interactions", counts.interactions)]
    rows += [
        ("users with equal times", counts.users_with_ties),
        ("users whose last two times are equal", counts.users_whose_last_two_tie),
        ("items without title", counts.items_without_title),
        ("items without metadata", counts.items_without_metadata),
        ("items that share their title", counts.shared_titles),
    ]
    return rows + [("items described twice, first kept", counts.items_described_twice)] * bool(counts.items_described_twice)


def comparison(preset: Preset, counts: Counts) -> list[str]:
    """Published counts beside ours, a line for each paper."""
    lines = []
    ours = (counts.users, counts.items, counts.interactions)
    for paper in preset.published:
        theirs = (paper.users, paper.items, paper.interactions)
        worst = max(abs(own - other) / other for own, other in zip(ours, theirs, strict=True))
        verdict = "equal" if ours == theirs else f"ours differ by up to {worst:.1%}"
        told = f"{paper.users:,} users, {paper.items:,} items, {paper.interactions:,} interactions"
        lines.append(f"{paper.where}: {told}: {verdict}")
    return lines + ([preset.note] if preset.note else [])


def readme(preset: Preset, built: Built, origin: Origin) -> str:
    """The README.md of a dataset."""
    lines = [
        f"# {preset.name}",
        "",
        f"{preset.title}. Made by recbole-llm {__version__}:",
        "",
        f"    {origin.command}",
        "",
        f"Source: {origin.page}",
        "",
        f"Terms: {origin.licence}",
        "",
        f"Repeated records: {origin.duplicates}. Equal times keep the order of the raw file.",
        "",
        "| count | |",
        "|---|---:|",
        *(f"| {what} | {number:,} |" for what, number in count_lines(built.counts)),
        "",
        *(f"- {line}\n" for line in (*comparison(preset, built.counts), *built.notes)),
        "| raw file | sha256 |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in origin.checksums.items()),
    ]
    return "\n".join(lines) + "\n"
