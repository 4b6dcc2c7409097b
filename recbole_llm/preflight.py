"""What is checked of a comparison before the first of its models is trained."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from recbole.config import Config
from recbole.utils import get_model

from recbole_llm.backbone.item_vectors import VectorSource
from recbole_llm.backbone.load import fetch_backbone, load_text_side
from recbole_llm.backbone.settings import read_settings
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.schema import known_keys
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import training_items
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line
from recbole_llm.evaluation.candidates import check_pools
from recbole_llm.evaluation.evaluate import identify_test_set
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode
from recbole_llm.files import is_writable
from recbole_llm.recommender.form import form_of
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.registry import is_ours
from recbole_llm.teacher.item_embedding import catalogue_vectors, has_item_embedding, no_item_embedding
from recbole_llm.teacher.teacher import teacher_config
from recbole_llm.trainer.pretraining import source_configs

ATTRIBUTE_KEYS = ("selected_features", "item_attribute")  # keys by which RecBole's models name columns of the .item file
WIDTH_KEYS = (  # keys of our models by which layers are made
    "head_hidden_size representation_size item_projection_hidden_size teacher_head_hidden_size latent_size embedding_size "
    "lora_r"
).split()
LEAST_WIDTH = 64  # of whatever a layer of a given width is joined to: every LLM's states are wider
LEAST_FREE_DISK = 64 << 20  # bytes; checkpoints and logs of a small run


def check(configs: Iterable[Config], data: SharedData, tests: Iterable[Sequence[Config]] = ()) -> None:
    """Check the data, candidates, negatives, columns, backbones, folders and sizes of every configuration.

    Data sets are built on the way and kept in ``data``. What several configurations share is looked at once.

    Args:
        configs: of the models.
        data: builds the data sets.
        tests: for each of them the configurations of its tests under further protocols.

    Raises:
        UserError: the first mistake that is found.
    """
    once = Once()
    for config, further in zip_longest(configs, tests, fillvalue=()):
        for test in (config, *further):
            check_catalogue(test)
        if is_ours(config["model"]):
            if reads_llm(config):
                once((config["backbone"], config["backbone_revision"], _without_seed(config)), fetch_backbone, config)
            source_configs(config)
            if config["teacher"]:
                once(("teacher", id(config)), teacher_config, config)
            check_widths(config)
        once((config["checkpoint_dir"], config["data_path"]), check_folder, config)
        splits = build_splits(config, data, once)
        for test in (config, *further):
            once((id(splits["test"]), _candidates(test)), check_candidates, test, splits)
        check_attributes(config, splits["train"])
        check_item_vectors(config, splits["train"], once)
        if is_ours(config["model"]):
            check_negatives(config, splits["train"])
            check_prompts(config, splits["train"], once)


class Once:
    """Calls a function once for each key, and returns what it returned again later."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def __call__(self, key: Hashable, function: Callable, *arguments: Any) -> Any:
        key = function.__qualname__, key
        if key not in self._results:
            self._results[key] = function(*arguments)
        return self._results[key]


def reads_llm(config: Config) -> bool:
    """Whether a model of ours reads the LLM of the key ``backbone``, and not a text encoder of its own."""
    return getattr(get_model(config["model"]), "has_llm", True)


def _without_seed(config: Config) -> str:
    """Everything by which the LLMs of two configurations may differ, but the seed of random weights."""
    return repr(replace(read_settings(config), seed=0))


def _candidates(config: Config) -> tuple[Any, ...]:
    settings = EvaluationSettings.of_config(config)
    return settings.mode("valid"), settings.mode("test"), settings.sampling, settings.candidates_file


def build_splits(config: Config, data: SharedData, once: Once) -> dict[str, TextSequentialDataset]:
    """The splits of ``config``; whatever RecBole's loading of the data raises becomes a sentence, the rest goes to the log."""
    check_memory(config, once)
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


def check_memory(config: Config, once: Once) -> None:
    """Refuse histories that would not fit the memory: each interaction becomes a row with its whole history.

    Raises:
        UserError: naming MAX_ITEM_LIST_LENGTH.
    """
    file = Path(config["data_path"]) / f"{config['dataset']}.inter"
    if not file.is_file():
        return
    rows = once(file, lines_of, file)
    fields = 2 + (config["like_threshold"] is not None)  # items, times, ratings
    length = config["MAX_ITEM_LIST_LENGTH"]
    needed, available = rows * length * 8 * fields, psutil.virtual_memory().available
    if needed > available:
        fits = max(1, int(available * 0.5 / (rows * 8 * fields)))
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH: {length} items of history for each of {rows:,} interactions take {_gigabytes(needed)}, and "
            f"{_gigabytes(available)} are free; set it to {fits} or lower."
        )


def lines_of(file: Path) -> int:
    """The number of line breaks in a file."""
    with open(file, "rb") as lines:
        return sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))


def check_widths(config: Config) -> None:
    """Refuse layers that would not fit the memory: a weight, its gradient and two moments for each pair of widths.

    Raises:
        UserError: naming the widest.
    """
    known = known_keys(config["model"])
    widths = {name: config[name] for name in WIDTH_KEYS if name in known and config[name]}
    if not widths:
        return
    name = max(widths, key=lambda key: widths[key])
    others = [LEAST_WIDTH, *(width for other, width in widths.items() if other != name)]
    needed, available = 16 * widths[name] * max(others), psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{name}: layers of width {widths[name]} and {max(others)} take {_gigabytes(needed)} in training, and "
            f"{_gigabytes(available)} are free; set it lower."
        )


def check_catalogue(config: Config) -> None:
    """Check that a model which is to rank the whole catalogue is asked in a form that can.

    Raises:
        UserError: naming the form.
    """
    settings = EvaluationSettings.of_config(config)
    if not is_ours(config["model"]) or "full" not in (settings.mode("valid"), settings.mode("test")):
        return
    name, form = form_of(config)
    if form is not None and not form.ranks_catalogue:
        forms = get_model(config["model"]).forms
        others = [other for other, form in forms.items() if form.ranks_catalogue]
        remedy = f"set recommend_by: {others[0]}, or " if others else ""
        raise UserError(
            f"protocol: {config['protocol']} ranks the whole catalogue, and {config['model']} by {name} chooses among listed "
            f"candidates; {remedy}leave this protocol out."
        )


def check_candidates(config: Config, splits: Mapping[str, TextSequentialDataset]) -> None:
    """Check that every user of the validation and test splits has enough items to be candidates.

    Raises:
        UserError: naming the user and the remedy.
    """
    for phase in ("valid", "test"):
        settings = EvaluationSettings.of_config(config)
        if settings.mode(phase) == "labeled" and not settings.candidates_file:
            continue
        if phase == "test" and settings.candidates_file:
            identify_test_set(splits[phase], config)  # reads the file, or writes it
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
        if others > train.item_num - 1 and "train_negatives" in config.external_config_dict:  # else as many as there are
            raise UserError(
                f"train_negatives: {others} random items are more than the data set has; set it to {train.item_num - 1} or "
                f"lower."
            )
        return
    counts = (train.user_items if config["negatives_leave_out"] == "all" else training_items(train)).lengths
    user = int(counts.argmax())
    free = train.item_num - 1 - int(counts[user])
    if free < others:
        most = free + (key == "train_candidates")
        raise UserError(
            f"{key}: {config[key]} takes {others} items that a user never interacted with, but user "
            f"'{train.id2token(train.uid_field, user)}' has only {free} of {train.item_num - 1} left; set it to {most} "
            f"or lower, or leave out such users with user_inter_num_interval."
        )


def check_prompts(config: Config, train: TextSequentialDataset, once: Once) -> None:
    """Read the tokenizer, and build the prompts of a model by retrieval, before its teacher is trained and its LLM is read.

    The tokenizer is read once for each LLM, and the catalogue is tokenized once for each LLM and data set.

    Raises:
        UserError: no tokenizer, or no room for an item.
    """
    if config["endpoint_url"] or not reads_llm(config):
        return
    llm = config["backbone"], config["backbone_revision"]
    text_side = once(llm, load_text_side, config)
    model_class, (_, form) = get_model(config["model"]), form_of(config)
    if form is None or getattr(form, "build_prompts", None) is not RetrievalForm.build_prompts:
        return
    shown = {name: getattr(model_class, name) for name in ("has_item_vectors", "has_user_vector", "has_marker")}
    shown["has_user_vector"] = shown["has_user_vector"] or bool(config["user_vector"])

    def encode(texts: list[str]) -> list[list[int]]:
        return once((llm, tuple(texts)), encode_text, text_side.tokenizer, texts)

    stand_in = RetrievalForm(SimpleNamespace(backbone=text_side, **shown), config, train)
    settings = stand_in.settings, tuple(shown.items()), train.max_item_list_len
    once((llm, id(train), settings), stand_in.build_prompts, encode)


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


def check_item_vectors(config: Config, train: TextSequentialDataset, once: Once) -> None:
    """Check that a stock model, or a teacher, has item embeddings, and that the encoder or the file of their vectors is there.

    Raises:
        UserError: naming the model, the encoder or what is wrong with the file.
    """
    if is_ours(config["model"]):
        if config["teacher"] and not config["teacher_checkpoint"]:
            check_item_vectors(once(("teacher", id(config)), teacher_config, config), train, once)
        return
    if not config["item_vectors"]:
        return
    if not has_item_embedding(get_model(config["model"])):
        raise no_item_embedding(config["model"])
    source = select(VectorSource, config)
    if source.is_file:
        once((source.item_vectors, source.item_vectors_rows, id(train)), catalogue_vectors, config, train)
    else:
        once(replace(source, seed=0), source.identity)


def check_folder(config: Config) -> None:
    """Check that the folder of checkpoints can be written, has room, and is not the data set's own.

    Raises:
        UserError: naming checkpoint_dir.
    """
    folder = Path(os.path.realpath(config["checkpoint_dir"]))
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not is_writable(there):
        raise UserError(f"checkpoint_dir: {folder} cannot be written; set it to a folder of yours.")
    if folder == Path(os.path.realpath(config["data_path"])):
        raise UserError(f"checkpoint_dir: {folder} is the folder of the data set; set it to another.")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE_DISK:
        raise UserError(
            f"checkpoint_dir: the disk of {folder} has {_gigabytes(free)} left; make room, or set it to another disk's folder."
        )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**27 else f"{math.ceil(size / 2**20)} MB"
