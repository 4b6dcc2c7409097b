"""What is checked of a comparison before the first of its models is trained."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from recbole.config import Config
from recbole.utils import get_model

from recbole_llm.backbone.load import fetch_backbone, load_text_side
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line
from recbole_llm.evaluation.candidates import check_pools
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.registry import is_ours
from recbole_llm.trainer.pretraining import source_configs

ATTRIBUTE_KEYS = ("selected_features", "item_attribute")  # keys by which RecBole's models name columns of the .item file
LEAST_FREE_DISK = 64 << 20  # bytes; checkpoints and logs of a small run


def check(configs: Iterable[Config], data: SharedData) -> None:
    """Check the data, candidates, negatives, columns, backbones and disk of every configuration.

    Data sets are built on the way and kept in ``data``.

    Raises:
        UserError: the first mistake that is found.
    """
    for config in configs:
        if is_ours(config["model"]):
            fetch_backbone(config)
            source_configs(config)
        check_disk(config)
        splits = build_splits(config, data)
        check_candidates(config, splits)
        check_attributes(config, splits["train"])
        if is_ours(config["model"]):
            check_negatives(config, splits["train"])
            check_prompts(config, splits["train"])


def build_splits(config: Config, data: SharedData) -> dict[str, TextSequentialDataset]:
    """The splits of ``config``; whatever RecBole's loading of the data raises becomes a sentence, the rest goes to the log."""
    check_memory(config)
    try:
        return data.splits(config)
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:
        getLogger().debug("The data set cannot be loaded", exc_info=True)
        raise UserError(
            f"dataset: {config['dataset']} cannot be loaded with these settings ({type(error).__name__}: {first_line(error)}); "
            f"check the keys that name its columns."
        ) from error


def check_memory(config: Config) -> None:
    """Refuse histories that would not fit the memory: each interaction becomes a row with its whole history.

    Raises:
        UserError: naming MAX_ITEM_LIST_LENGTH.
    """
    file = Path(config["data_path"]) / f"{config['dataset']}.inter"
    if not file.is_file():
        return
    with open(file, "rb") as lines:
        rows = sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
    fields = 2 + (config["like_threshold"] is not None)  # items, times, ratings
    length = config["MAX_ITEM_LIST_LENGTH"]
    needed, available = rows * length * 8 * fields, psutil.virtual_memory().available
    if needed > available:
        fits = max(1, int(available * 0.5 / (rows * 8 * fields)))
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH: {length} items of history for each of {rows:,} interactions take {_gigabytes(needed)}, and "
            f"{_gigabytes(available)} are free; set it to {fits} or lower."
        )


def check_candidates(config: Config, splits: Mapping[str, TextSequentialDataset]) -> None:
    """Check that every user of the validation and test splits has enough items to be candidates.

    Raises:
        UserError: naming the user and the remedy.
    """
    for phase in ("valid", "test"):
        settings = EvaluationSettings.of_config(config)
        if settings.mode(phase) == "labeled":
            continue
        mode = evaluation_mode(settings, phase)
        if mode is not None and settings.sampling == "non_interacted":
            check_pools(splits[phase], mode[1], phase)


def check_negatives(config: Config, train: TextSequentialDataset) -> None:
    """Check that every user has enough free items for a training step's negatives.

    Raises:
        UserError: naming the key, the user and the remedy.
    """
    key, others = "train_negatives", config["train_negatives"]
    if config["recommend_by"] == "generation":
        key, others = "train_candidates", (config["train_candidates"] or 1) - 1
    if others is None or config["recommend_by"] == "yes_no":
        return
    if config["negatives"] == "in_batch" and key == "train_negatives":
        if others > train.item_num - 1:
            raise UserError(
                f"train_negatives: {others} random items are more than the data set has; set it to {train.item_num - 1} or "
                f"lower."
            )
        return
    counts = np.array([len(items) for items in train.user_items])
    user = int(counts.argmax())
    free = train.item_num - 1 - int(counts[user])
    if free < others:
        most = free + (key == "train_candidates")
        raise UserError(
            f"{key}: {config[key]} takes {others} items that a user never interacted with, but user "
            f"'{train.id2token(train.uid_field, user)}' has only {free} of {train.item_num - 1} left; set it to {most} "
            f"or lower, or leave out such users with user_inter_num_interval."
        )


def check_prompts(config: Config, train: TextSequentialDataset) -> None:
    """Read the tokenizer and build the prompts of a model by retrieval, before its teacher is trained and its LLM is read.

    Raises:
        UserError: no tokenizer, or no room for an item.
    """
    model_class = get_model(config["model"])
    forms = getattr(model_class, "forms", {})
    form = forms.get(config["recommend_by"] or next(iter(forms), None))
    if form is None or getattr(form, "build_prompts", None) is not RetrievalForm.build_prompts:
        return
    shown = {name: getattr(model_class, name) for name in ("has_item_vectors", "has_user_vector", "has_marker")}
    RetrievalForm(SimpleNamespace(backbone=load_text_side(config), **shown), config, train).build_prompts()


def check_attributes(config: Config, train: TextSequentialDataset) -> None:
    """Check that the columns which a stock model reads of the items are there (FDSA, S3Rec, ...).

    Raises:
        UserError: naming the key and how to load the column.
    """
    if is_ours(config["model"]):
        return
    for key in ATTRIBUTE_KEYS:
        named = config[key]
        fields = [named] if isinstance(named, str) else named or []
        present = [] if train.item_feat is None else list(train.item_feat.columns)
        for field in fields:
            if field not in present:
                raise UserError(
                    f"{key}: {config['model']} reads the column {field!r} of the .item file, which is not loaded; load it by "
                    f"load_col: {{inter: [...], item: [{train.iid_field}, {field}]}}, or name another column."
                )


def check_disk(config: Config) -> None:
    """Check that the folder of checkpoints can be written and has room.

    Raises:
        UserError: naming checkpoint_dir.
    """
    folder = Path(config["checkpoint_dir"]).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"checkpoint_dir: {folder} cannot be written; set it to a folder of yours.")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_DISK:
        raise UserError(
            f"checkpoint_dir: the disk of {folder} has {_gigabytes(free)} left; make room, or set it to another disk's folder."
        )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**27 else f"{math.ceil(size / 2**20)} MB"
