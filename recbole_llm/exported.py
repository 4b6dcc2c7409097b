"""An exported model: what recommends, without the interactions it was trained on. ``docs/serving.md`` describes the folder.

::

    export/
        README.md                   what it is, for people
        export.json                 what it is, for programs; written last
        items.parquet               id and title of each item
        item_vectors.safetensors    items: a row for each item, the padding first; sample: vectors of some users
        users.parquet               histories of users, oldest first (--with-users)
        model/                      the checkpoint: record and trained weights
        teacher/                    the teacher's checkpoint
        llm/                        a copy of the LLM (--with-backbone)

Like any checkpoint it may come from somebody else: nothing in it is unpickled, evaluated or trusted with a path.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from polars.exceptions import PolarsError
from recbole.utils import get_model, init_seed
from torch import Tensor

from recbole_llm import checkpoint
from recbole_llm.backbone.reading import model_digest
from recbole_llm.config.checks import ENDPOINT, UNPICKLED, fitted, stock_class
from recbole_llm.config.schema import is_file_name, known_keys
from recbole_llm.config.settings import make_config
from recbole_llm.data.item_catalog import FINGERPRINTS, ItemCatalog, Times, UserHistories
from recbole_llm.data.sequences import Ragged
from recbole_llm.errors import UserError, first_line
from recbole_llm.loading import NOT_FROM_A_RECORD, checked_record, recorded_settings, teacher_settings
from recbole_llm.teacher import stock
from recbole_llm.trainer.checkpoint import load_trained_weights

MANIFEST, ITEMS, USERS, VECTORS = "export.json", "items.parquet", "users.parquet", "item_vectors.safetensors"
MODEL, TEACHER, LLM = "model", "teacher", "llm"
FORMAT, VERSION = "recbole-llm export", 1
# Every file of an export but the manifest, the README and the LLM.
_CHECKPOINT = (checkpoint.RECORD, checkpoint.WEIGHTS)
FILES = (ITEMS, VECTORS, USERS, *(f"{part}/{name}" for part in (MODEL, TEACHER) for name in _CHECKPOINT))
_OF_THE_PLACE = ("source", "name", "revision", "sha256")  # of an LLM's identity: where it was read from


def is_export(folder: str | Path) -> bool:
    """Whether ``folder`` holds an exported model, whole or not."""
    return (Path(folder) / MANIFEST).is_file()


def file_digest(file: Path) -> str:
    """Sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- what a reader needs of a data set ----------------------------------------------------------------------------------


def write_items(folder: Path, catalog: Any) -> None:
    """Write the ids and titles of the items of a data set, in the order of internal ids."""
    ids = [str(token) for token in catalog.field2id_token[catalog.iid_field][1:]]
    pl.DataFrame({"item": ids, "title": list(catalog.item_texts[1:])}).write_parquet(folder / ITEMS)


def write_users(folder: Path, users: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> int:
    """Write users with the internal ids and timestamps of their items; return how many there are."""
    rows = [(name, items.tolist(), times.tolist()) for name, items, times in users]
    schema = {"user": pl.String, "items": pl.List(pl.Int64), "times": pl.List(pl.Float64)}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / USERS)
    return len(rows)


def _read_items(folder: Path, count: int) -> tuple[list[str], list[str]]:
    table = _read_table(folder / ITEMS, {"item": pl.String, "title": pl.String})
    ids = table["item"].to_list()
    if len(ids) != count or len(set(ids)) != count:
        raise _damaged(folder / ITEMS, f"it must hold {count} different ids")
    return ids, table["title"].to_list()


def _read_users(folder: Path, items: int) -> UserHistories:
    file = folder / USERS
    table = _read_table(file, {"user": pl.String, "items": pl.List(pl.Int64), "times": pl.List(pl.Float64)})
    lengths = table["items"].list.len().to_numpy().astype(np.int64)
    values, times = (table[name].explode().to_numpy(writable=True) for name in ("items", "times"))
    same = (table["times"].list.len().to_numpy() == lengths).all()
    if not same or not (lengths > 0).all() or not ((values > 0) & (values <= items)).all() or not np.isfinite(times).all():
        raise _damaged(file, "each user needs items of the catalog, as many timestamps, and at least one")
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return UserHistories(table["user"].to_list(), Ragged(values.astype(np.int64), bounds), Ragged(times, bounds))


def _read_table(file: Path, schema: Mapping[str, Any]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(file)
    except (OSError, PolarsError) as error:
        raise _damaged(file, first_line(error)) from None
    if dict(table.schema) != dict(schema) or any(table.null_count().row(0)):
        raise _damaged(file, f"its columns must be {', '.join(schema)}, without gaps")
    return table


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged ({why}): export the model again.")


# --- the manifest -------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an export says of itself, each part of its type, once all its files are found to be those that it names.

    Raises:
        UserError: no export, one of a newer version, or a file that is missing or another.
    """
    file = folder / MANIFEST
    manifest = checkpoint.read_json(file)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("version"), int):
        raise UserError(f"{file} is not of an export of this library: give a folder that recbole-llm export wrote.")
    if manifest["version"] > VERSION:
        raise UserError(f"{folder} was written by a newer version of recbole-llm: update the library to read it.")
    wrong = next((name for name, fits in _PARTS.items() if not fits(manifest.get(name))), None)
    if wrong is not None:
        raise UserError(f"{file} is damaged: its {wrong} is missing or not what it must be; export the model again.")
    digests = manifest["files"]
    for name in FILES:
        path = folder / name
        if path.is_file() != (name in digests) or (name in digests and file_digest(path) != digests[name]):
            raise _damaged(path, "it is not the file that export.json names")
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _are_times(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(Times.__dataclass_fields__):
        return False
    unit = value["units_per_second"]
    return all(_is_number(value[name]) for name in ("last", "offset", "scale")) and (unit is None or _is_count(unit))


def _are_fingerprints(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in FINGERPRINTS)


# The parts of a manifest that are read, and what each must be.
_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in ("llm", "stock"),
    "model": lambda value: isinstance(value, str),
    "dataset": is_file_name,
    "items": _is_count,
    "size": _is_count,
    "times": _are_times,
    "fingerprints": _are_fingerprints,
    "dataset_settings": lambda value: isinstance(value, dict),
    "llm_copy": lambda value: value is None or isinstance(value, dict),
    "files": lambda value: isinstance(value, dict),
}


# --- loading ------------------------------------------------------------------------------------------------------------


def load_exported(folder: Path, given: Mapping[str, Any] | None = None) -> tuple[Any, Any, ItemCatalog]:
    """Load an exported model; its configuration, the model, and the items that stand for its data set.

    What a record may say is what it may say in :func:`recbole_llm.loading.load_data_and_model`; no path is taken from it.

    Args:
        folder: of the export.
        given: ``backbone``, where the LLM lies elsewhere.

    Raises:
        UserError: a damaged export, one that asks for more, or one that fits no model here.
    """
    given = {name: value for name, value in (given or {}).items() if name == "backbone"}
    manifest = read_manifest(folder)
    model_folder = folder / MODEL
    is_llm = manifest["kind"] == "llm"
    record = checked_record(model_folder) if is_llm else checkpoint.read_record(model_folder)
    name, recorded = record["model"], record.get("settings" if is_llm else "given")
    teacher = None
    if not is_llm and stock_class(name) is None:
        raise UserError(f"{model_folder / checkpoint.RECORD} names {name!r}, which is no model of RecBole.")
    if not isinstance(recorded, dict):
        raise _damaged(model_folder / checkpoint.RECORD, "it lacks settings")
    if name != manifest["model"]:
        raise _damaged(folder / MANIFEST, "it names another model than its checkpoint")
    settings = recorded_settings(recorded, name, model_folder)
    if is_llm:
        if any(settings.get(key) is not None for key in ENDPOINT) or record["foundation"] is not None:
            raise UserError(f"{folder} asks an endpoint or names a pre-trained LLM, which an export may not.")
        settings["teacher_settings"] = teacher_settings(recorded, name, model_folder)
        known = known_keys(name)
        teacher = settings.get("teacher", known["teacher"].default if "teacher" in known else None)
        if record["teacher"] is not None:
            settings["teacher_checkpoint"] = str(folder / TEACHER)
        settings = {key: value for key, value in settings.items() if key in known}
        if manifest["llm_copy"] is not None and "backbone" not in given:
            settings["backbone"] = str(_copied_llm(folder, manifest["llm_copy"]))
    else:
        settings = {"protocol": "retrieval", **settings}
    of_data = _dataset_settings(manifest["dataset_settings"], [name, *([teacher] if stock_class(teacher) else [])], folder)
    with tempfile.TemporaryDirectory() as scratch:  # as if the data lay there: a place for nothing but their settings
        place = Path(scratch) / manifest["dataset"]
        place.mkdir()
        (place / f"{manifest['dataset']}.yaml").write_text(yaml.safe_dump(of_data), encoding="utf-8")
        settings |= {"data_path": scratch, "checkpoint_dir": scratch}
        try:
            config = make_config(name, manifest["dataset"], config_dict=settings, command_line=given)
        except UserError:
            raise
        except Exception as error:  # RecBole's own, of whatever kind, for values that it does not check
            raise UserError(f"the settings in {folder} cannot be used ({first_line(error)}).") from error
        catalog = _catalog(folder, manifest, config)
        try:
            if is_llm:
                model = _llm_recommender(config, catalog, folder, manifest, record)
            else:
                model = stock.load(model_folder, config, catalog.splits).model
        except (AttributeError, KeyError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"{name} needs the interactions when it is loaded, so it cannot be exported: serve the folder of its run."
            ) from error
    table = getattr(model, "item_table", None)
    if table is not None:
        table.fill(read_vectors(folder, manifest)["items"].to(config["device"]))
    return config, model.eval(), catalog


def _catalog(folder: Path, manifest: Mapping[str, Any], config: Any) -> ItemCatalog:
    ids, titles = _read_items(folder, manifest["items"])
    histories = _read_users(folder, manifest["items"]) if USERS in manifest["files"] else None
    return ItemCatalog(config, ids, titles, Times(**manifest["times"]), manifest["fingerprints"], histories)


def _llm_recommender(
    config: Any, catalog: ItemCatalog, folder: Path, manifest: Mapping[str, Any], record: Mapping[str, Any]
) -> Any:
    checkpoint.check(record, folder, fingerprint=catalog.text_fingerprint)
    init_seed(config["seed"], config["reproducibility"])
    with stock.without_training():
        model = get_model(config["model"])(config, catalog).to(config["device"])
    kept = record.get("backbone")
    if manifest["llm_copy"] is not None and config["backbone"] == str(folder / LLM) and isinstance(kept, dict):
        # The copy is the recorded LLM, under another name: its bytes were compared.
        identity = {key: value for key, value in model.backbone.identity.items() if key not in _OF_THE_PLACE}
        model.backbone.identity = identity | {key: kept[key] for key in _OF_THE_PLACE if key in kept}
    load_trained_weights(model, folder / MODEL, config["model"])
    return model


def _copied_llm(folder: Path, copy: Mapping[str, Any]) -> Path:
    """Where the copy of the LLM lies: a folder, or the one file in it that the manifest names.

    Raises:
        UserError: it is not the one that was copied.
    """
    place, name = folder / LLM, copy.get("file")
    if name is not None:
        if not is_file_name(name) or not str(name).endswith(".gguf"):
            raise _damaged(folder / MANIFEST, "llm_copy names no .gguf file")
        place = place / str(name)
    if not place.exists() or model_digest(place) != copy.get("sha256"):
        raise _damaged(place, "it is not the LLM that was copied")
    return place


def _dataset_settings(values: Mapping[str, Any], models: list[str], folder: Path) -> dict[str, Any]:
    """What lay beside the data set's files, as far as these models know it, each value of its key's type."""
    where, taken = str(folder / MANIFEST), {}
    for name, value in values.items():
        if name in UNPICKLED and value:
            raise UserError(f"{where} names a file in {name}, which would be unpickled: it may not.")
        keys = [known[name] for model in models if name in (known := known_keys(model, stock_class(model)))]
        if keys and name not in NOT_FROM_A_RECORD:
            taken[name] = fitted(keys[0], value, where)
    return taken


def read_vectors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vectors of the items, ``[items + 1, size]``, and of a sample of users, ``[n, size]``.

    Raises:
        UserError: they are not there, or of another shape or type.
    """
    found = checkpoint.read_tensors(folder / VECTORS)
    size = manifest["size"]
    if set(found) != {"items", "sample"} or any(part.dtype != torch.float32 or part.ndim != 2 for part in found.values()):
        raise _damaged(folder / VECTORS, "it must hold items and sample, in float32")
    if found["items"].shape != (manifest["items"] + 1, size) or found["sample"].shape[1] != size:
        raise _damaged(folder / VECTORS, f"it must hold vectors of {manifest['items']} items, {size} wide")
    if not all(part.isfinite().all() for part in found.values()):
        raise _damaged(folder / VECTORS, "its numbers must be finite")
    return found
