"""``recbole-llm prepare``: a public source, or your own tables, to a dataset."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from recbole_llm.config.command_line import parse_command_line
from recbole_llm.data.prepare.build import Built, build
from recbole_llm.data.prepare.catalog import all_presets, all_sources, find
from recbole_llm.data.prepare.download import digest, obtain
from recbole_llm.data.prepare.frame import read_items, table, write_own
from recbole_llm.data.prepare.source import Preset, Wording
from recbole_llm.data.prepare.write import Origin, comparison, count_lines, write_dataset
from recbole_llm.errors import UserError, closest, say

_KEYS = {"raw-dir", "data-path", "name", "core", "items", "overwrite", "help"}
_OWN = {"interactions", "user", "item", "time", "rating", "title"}
_DUPLICATES = {
    "keep": "kept, as published",
    "exact": "equal records (user, item, time) are dropped, repeated pairs with other times kept",
    "first": "of a user's interactions with an item the earliest stays",
}


def prepare(argv: Sequence[str]) -> Path | None:
    """Make the dataset that the command line names; print its counts.

    Returns:
        its folder; None where only help was asked for.

    Raises:
        UserError: a word cannot be read, a file is neither there nor to be fetched, or the dataset is there already.
    """
    words = [word for word in argv if not word.startswith("-")]
    settings = parse_command_line([word for word in argv if word.startswith("-")])
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    for key in settings:
        if key not in _KEYS | _OWN:
            near = closest(key, _KEYS | _OWN)
            raise UserError(f"unknown key --{key}; " + (f"did you mean --{near}?" if near else f"known: {_known()}."))
    if settings.get("help") or not argv:
        say((files_text(words[0]) if words else help_text()).rstrip("\n"))
        return None
    if len(words) != 1:
        raise UserError("name one dataset: recbole-llm prepare amazon-cds (--help lists them).")
    command = shlex.join(["recbole-llm", "prepare", *argv])
    data_path = Path(str(settings.get("data-path", "dataset")))
    if "interactions" in settings:
        folder, built, preset = _own(words[0], settings, data_path, command)
    else:
        odd = sorted(settings.keys() & _OWN)
        if odd:
            raise UserError(f"--{odd[0]} is for tables of your own: name them with --interactions=FILE.")
        folder, built, preset = _public(words[0], settings, data_path, command)
    say(report(preset, built))
    flags = "" if data_path == Path("dataset") else f" --data_path={data_path}"
    say(f"Written to {folder}. Next: recbole-llm run --model=LLMSTAR --dataset={preset.name}{flags}")
    return folder


def _public(word: str, settings: dict[str, Any], data_path: Path, command: str) -> tuple[Path, Built, Preset]:
    source, preset = find(word)
    variant = preset.variant
    if "name" in settings:
        preset = replace(preset, name=_plain_name(settings["name"]))
    if "core" in settings:
        preset = replace(preset, core=_whole(settings, "core"))
    _refuse_present(data_path / preset.name, settings)
    raw_dir = Path(str(settings.get("raw-dir", data_path / "raw" / source.name)))
    own_items = settings.get("items")
    wanted = list(source.files(variant))
    if own_items is not None:
        wanted = [file for file in wanted if not file.of_items]
    files = obtain(wanted, raw_dir)
    raw = source.read(files, variant)
    if own_items is not None and str(own_items) != "none":
        path = Path(str(own_items))
        raw = replace(raw, items=_items_table(path, settings).lazy())
        files = {**files, path.name: path}
    duplicates = preset.duplicates or source.duplicates
    built = build(raw, preset, duplicates, source.times, files.values())
    checksums = {path.name: digest(path) for path in files.values()}
    origin = Origin(source.page, source.licence, command, checksums, _DUPLICATES[duplicates])
    return write_dataset(data_path, preset, built, source.wording, origin), built, preset


def _own(name: str, settings: dict[str, Any], data_path: Path, command: str) -> tuple[Path, Built, Preset]:
    for key in ("raw-dir", "name"):
        if key in settings:
            raise UserError(f"--{key} is for public sources; tables of your own are read from --interactions and --items.")
    _refuse_present(data_path / _plain_name(name), settings)
    interactions, items = str(settings["interactions"]), settings.get("items")
    time = settings.get("time", "timestamp")
    rating = settings.get("rating")
    return write_own(
        interactions,
        None if items in (None, "none") else str(items),
        name,
        data_path,
        str(settings.get("user", "user_id")),
        str(settings.get("item", "item_id")),
        None if time in (None, "none") else str(time),
        None if rating is None else str(rating),
        str(settings.get("title", "title")),
        _whole(settings, "core"),
        Wording("had a series of items", "items"),
        command,
    )


def _items_table(path: Path, settings: dict[str, Any]) -> pl.DataFrame:
    """A table of items in place of the source's, with whatever the source calls its items."""
    rows = table(str(path), "items")
    named = [name for name in ("item_id", "parent_asin", "asin", "business_id", "id") if name in rows.columns]
    return read_items(rows, str(settings.get("item", named[0] if named else "item_id")), str(settings.get("title", "title")))


def _plain_name(name: Any) -> str:
    text = str(name)
    if not text or Path(text).name != text or text.startswith("."):
        raise UserError(f"{text!r} cannot be the name of a dataset: it is the name of a folder.")
    return text


def _refuse_present(folder: Path, settings: dict[str, Any]) -> None:
    if folder.exists() and settings.get("overwrite") is not True:
        raise UserError(f"{folder} is there already: remove it, or add --overwrite=True to make it again.")


def _whole(settings: dict[str, Any], key: str) -> int:
    value = settings.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"--{key} is {value!r}: give a whole number, 0 or above.")
    return value


def _known() -> str:
    return ", ".join(f"--{key}" for key in sorted(_KEYS | _OWN))


def report(preset: Preset, built: Built) -> str:
    """The counts as a table, and those of papers beside them."""
    rows = count_lines(built.counts)
    width = max(len(what) for what, _ in rows)
    lines = [f"{preset.name}: {preset.title}", *(f"  {what:<{width}} {number:>12,}" for what, number in rows)]
    return "\n".join(lines + [*comparison(preset, built.counts), *built.notes])


def files_text(word: str) -> str:
    """The raw files of a dataset and where they are."""
    source, preset = find(word)
    lines = [f"{preset.name}: {preset.title}", f"{source.page} ({source.licence})", "Files for --raw-dir:"]
    for file in source.files(preset.variant):
        origin = f"{file.address}{f' (holds {file.name})' if file.archive else ''}" if file.address else f"by hand: {file.page}"
        lines.append(f"  {file.archive or file.name:<40} {origin}")
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """What ``recbole-llm prepare --help`` prints."""
    lines = [
        "recbole-llm prepare NAME [--raw-dir=FOLDER] [--data-path=dataset] [--core=5] [--items=FILE|none] [--overwrite=True]",
        "    make the dataset NAME under --data-path; raw files are taken from --raw-dir, and downloaded to it where absent",
        "recbole-llm prepare my-shop --interactions=FILE [--items=FILE] [--user=user_id] [--item=item_id]",
        "    [--time=timestamp|none] [--title=title] [--rating=COLUMN] [--core=5]: own tables, .csv, .tsv, .parquet or .jsonl",
        "recbole-llm prepare NAME --help: the raw files of NAME and their addresses",
        "",
        "  --raw-dir     folder of the raw files, as published, packed or not",
        "  --core        users and items keep at least so many interactions, iterated (0: no filter)",
        "  --items       a table of your own in place of the source's metadata (columns item_id and title); none: no titles",
        "  --name        name of the dataset, where it is not to be NAME",
        "  --overwrite   replace a dataset that is there",
        "",
        "Datasets:",
        *(f"  {name:<24} {preset.title}" for name, preset in sorted(all_presets().items())),
        "",
        "Sources (NAME is source:variant):",
    ]
    for name, source in sorted(all_sources().items()):
        forms = ", ".join(f"{name}:{variant}" if variant else name for variant in source.variants)
        lines += [f"  {forms}", f"      {source.page}"]
    return "\n".join(lines) + "\n"
