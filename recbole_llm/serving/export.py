"""Writing an exported model: ``recbole-llm export``."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from recbole_llm import checkpoint, exported, registry
from recbole_llm._version import __version__
from recbole_llm.backbone.load import locate
from recbole_llm.backbone.reading import MODEL_FILES, model_digest
from recbole_llm.backbone.settings import read_settings
from recbole_llm.config.settings import beside_data
from recbole_llm.data.item_catalog import FINGERPRINTS, Times
from recbole_llm.errors import UserError
from recbole_llm.files import format_size, replace_text, tree_size, written_folder
from recbole_llm.loading import NOT_FROM_A_RECORD
from recbole_llm.recommend import TrainedRecommender, load
from recbole_llm.serving.service import rows_of_users, sample_of_users, spread_users
from recbole_llm.serving.vectors import Vectors, alike, vectors_of

_CHECKED = 16  # histories whose scores must be the same after loading


def export(
    folder: str | Path,
    output: str | Path,
    with_backbone: bool = False,
    with_users: bool = False,
    given: Mapping[str, Any] | None = None,
) -> str:
    """Write what recommends of a trained model, and load it once to see that it scores as the model does.

    Args:
        folder: of the model's run.
        output: folder to write; it must be new, or hold an export.
        with_backbone: whether to put a copy of the LLM in.
        with_users: whether to put the users' histories in, so that users can be asked for by id.
        given: where things have moved, see :func:`recbole_llm.recommend.load`.

    Returns:
        a sentence on what was written.

    Raises:
        UserError: a model that cannot be exported, or a folder that holds something else; nothing is written then.
    """
    source, target = Path(folder), Path(output)
    _check_target(source, target)
    trained = load(source, **(given or {}))
    if trained.is_export:
        raise UserError(f"{folder} is an export: give the folder of a run.")
    name = str(trained.config["model"])
    llm = _llm_of(trained, with_backbone)
    vectors = vectors_of(trained)
    queries = rows_of_users(trained, spread_users(trained, _CHECKED))
    expected = trained.scores(queries)[:, 1:].float().cpu()
    manifest = _manifest(trained, vectors)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_folder(target) as new:
        new.mkdir()
        exported.write_items(new, trained.dataset)
        sample = sample_of_users(trained, vectors)
        checkpoint.write_tensors(new / exported.VECTORS, {"items": vectors.items.float(), "sample": sample.float()})
        users = exported.write_users(new, _histories(trained)) if with_users else 0
        _copy_checkpoint(trained.folder, new / exported.MODEL)
        run = getattr(trained.model, "teacher_run", None)
        if run is not None:
            _copy_checkpoint(run.folder, new / exported.TEACHER)
        if llm is not None:
            manifest["llm_copy"] = _copy_llm(*llm, new / exported.LLM)
        manifest["users"] = users
        manifest["files"] = {
            file: exported.file_digest(new / file) for file in exported.FILES if (new / file).is_file()
        }
        checkpoint.write_json(new / exported.MANIFEST, manifest)
        replace_text(new / "README.md", _readme(manifest))
        del trained, vectors, run
        gc.collect()  # an LLM may leave no room for another
        _check_same(new, name, expected, queries, None if llm is not None else (given or {}).get("backbone"))
    return f"{name} on {manifest['dataset']}: {manifest['items']:,} items, {format_size(tree_size(target))}, are in {target}"


def _check_target(source: Path, target: Path) -> None:
    """Refuse a folder that must not be replaced.

    Raises:
        UserError: a folder or file that is no export, or one that holds the run.
    """
    real, run = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if real == run or real in run.parents or run in real.parents:
        raise UserError(f"output: {target} and the run's folder {source} lie in each other: name another folder.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"output: {target} is a file or a link: name a folder.")
    if target.is_dir() and any(target.iterdir()) and not exported.is_export(target):
        raise UserError(f"output: {target} holds something else than an export: name another folder.")


def _llm_of(trained: TrainedRecommender, wanted: bool) -> tuple[Path, str | None] | None:
    """The folder of the LLM, and the name of its file there where that is one; None where no copy is made.

    Raises:
        UserError: a copy is wanted of a model that has none to copy.
    """
    if not wanted:
        return None
    name = trained.config["model"]
    backbones = getattr(trained.model, "backbones", {})
    if set(backbones) != {"backbone"} or not getattr(trained.model, "has_llm", False):
        what = "several LLMs" if len(backbones) > 1 else "no LLM"
        raise UserError(f"with_backbone: {name} has {what} to copy: leave it out.")
    if backbones["backbone"].identity.get("source") == "random":
        raise UserError("with_backbone: the tiny LLM is made from its seed, there is nothing to copy: leave it out.")
    return locate(read_settings(trained.config))[:2]


def _manifest(trained: TrainedRecommender, vectors: Vectors) -> dict[str, Any]:
    dataset, config = trained.dataset, trained.config
    backbones = getattr(trained.model, "backbones", {})
    return {
        "format": exported.FORMAT,
        "version": exported.VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "recbole_llm": __version__,
        "kind": "llm" if registry.is_ours(config["model"]) else "stock",
        "model": config["model"],
        "dataset": config["dataset"],
        "items": trained.model.n_items - 1,
        "size": vectors.items.shape[1],
        "llm": {name: checkpoint.as_json(backbone.identity) for name, backbone in backbones.items()} or None,
        "llm_copy": None,
        "times": asdict(Times.of(dataset)),
        "fingerprints": {name: getattr(dataset, name) for name in FINGERPRINTS},
        "dataset_settings": checkpoint.as_json(beside_data(config, config["dataset"])),
    }


def _histories(trained: TrainedRecommender) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    dataset = trained.dataset
    names = dataset.field2id_token[dataset.uid_field]
    for user in trained.users():
        items, times = trained.sequence_of_user(int(user))
        yield str(names[user]), items, times.numpy().astype(np.float64)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy weights and record, this without what is not read from a record: folders of this machine, most of all."""
    target.mkdir()
    record = checkpoint.read_record(source)
    for part in ("settings", "given"):
        if isinstance(record.get(part), dict):
            record[part] = {name: value for name, value in record[part].items() if name not in NOT_FROM_A_RECORD}
    if record.get("teacher"):
        record["teacher"] = {**record["teacher"], "folder": exported.TEACHER}
    record.pop("stored_files", None)
    shutil.copyfile(source / checkpoint.WEIGHTS, target / checkpoint.WEIGHTS)
    checkpoint.write_json(target / checkpoint.RECORD, record)


def _copy_llm(source: Path, file: str | None, target: Path) -> dict[str, Any]:
    """Copy the files of an LLM that are read, and return what a manifest says of the copy."""
    target.mkdir()
    files = [source / file] if file else [path for path in sorted(source.iterdir()) if path.suffix in MODEL_FILES]
    for path in files:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    return {"file": file, "sha256": model_digest(target / file if file else target)}


def _check_same(folder: Path, name: str, expected: Tensor, queries: Any, backbone: str | None) -> None:
    """Load the export and compare its scores with the model's.

    Raises:
        UserError: they differ.
    """
    again = TrainedRecommender(folder, {} if backbone is None else {"backbone": backbone})
    scores = again.scores(queries)[:, 1:].float().cpu()
    if not alike(scores, expected):
        raise UserError(f"{name} scores otherwise without the interactions, so it cannot be exported: serve its run's folder.")


def _readme(manifest: Mapping[str, Any]) -> str:
    """The README of an export."""
    rows = {
        exported.VECTORS: f"`items`: float32 [{manifest['items'] + 1}, {manifest['size']}], row r of item r, row 0 of the "
        "padding; an item's score is the inner product of its row and the vector of a history. `sample`: vectors of some users",
        exported.ITEMS: "`item` (its id) and `title` of items 1, 2, ... in order",
        exported.USERS: f"histories of {manifest['users']} users",
        "model/": "trained weights and their record",
        "teacher/": "the same of the model that it learned from",
        "llm/": "the LLM",
        exported.MANIFEST: "all of this for programs, and the sha256 of each file",
    }
    absent = {exported.USERS: not manifest["users"], "llm/": not manifest["llm_copy"]}
    absent["teacher/"] = f"{exported.TEACHER}/{checkpoint.RECORD}" not in manifest["files"]
    llms = "; ".join(_llm_line(identity) for identity in (manifest["llm"] or {}).values())
    return f"""\
# {manifest["model"]} on {manifest["dataset"]}

A trained recommender without the data it was trained on. Exported by recbole-llm {manifest["recbole_llm"]}, {manifest["made"]}.

    recbole-llm serve FOLDER
    recbole-llm recommend --checkpoint=FOLDER --history='[a title, a title]'

and in Python `recbole_llm.load("FOLDER").recommend(histories=[["a title", "a title"]])`.

| file | content |
|---|---|
{chr(10).join(f"| `{name}` | {content} |" for name, content in rows.items() if not absent.get(name))}

LLM: {llms or "none"}.

Fingerprint of the data: `{manifest["fingerprints"]["text_fingerprint"]}`.
"""


def _llm_line(identity: Mapping[str, Any]) -> str:
    parts = (identity.get(key) for key in ("name", "revision", "sha256"))
    layers = identity.get("layers")
    return " ".join(f"`{part}`" for part in parts if part) + (f", {layers} layers" if layers else "")
