"""Train and compare models on one dataset with the same candidates; load what was trained; recommend.

``compare`` is what ``python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k`` runs. RecBole's own
``run_recbole``, ``objective_function`` and ``HyperTuning`` work as well once ``recbole_llm`` is imported.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import ModelType, get_model, get_trainer, init_logger, init_seed
from recbole.utils.argument_list import dataset_arguments, training_arguments

from recbole_llm import checkpoint, stock
from recbole_llm.backbone.foundation import source_configs
from recbole_llm.backbone.llm import fetch_backbone
from recbole_llm.config import load_yaml, make_config, model_of, read_schema, settings_for
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError, closest
from recbole_llm.evaluation import RankingResult, evaluate, stock_predictions, stock_scores
from recbole_llm.registry import TEXT_ARGUMENTS, is_ours
from recbole_llm.trainer import load_trained_weights

# Settings beside RecBole's ``dataset_arguments`` that decide what a split dataset is.
SPLIT_ARGUMENTS = ("data_path", "eval_args", "dataset", *TEXT_ARGUMENTS)


class SharedData:
    """Builds each dataset once, however many models ask for it."""

    def __init__(self) -> None:
        self._built: dict[str, list[TextSequentialDataset]] = {}

    def splits(self, config: Config) -> dict[str, TextSequentialDataset]:
        """The splits for ``config``: ``train`` (every prefix a row), ``valid``, ``test``."""
        return self._build(config)[0].splits

    def train(self, config: Config) -> TextSequentialDataset:
        """The training split with the targets that ``config["train_targets"]`` asks for."""
        last = self._build(config)[0]
        return last if config["train_targets"] == "last" else last.all_rows

    def _build(self, config: Config) -> list[TextSequentialDataset]:
        key = json.dumps({name: config[name] for name in (*dataset_arguments, *SPLIT_ARGUMENTS)}, default=str, sort_keys=True)
        if key not in self._built:
            wanted, config["train_targets"] = config["train_targets"], "last"
            dataset = TextSequentialDataset(config)
            getLogger().info(dataset)
            self._built[key] = dataset.build()
            config["train_targets"] = wanted
        return self._built[key]


def compare(
    models: Sequence[str],
    dataset: str,
    seeds: Sequence[int] = (),
    config_file_list: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_row: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and test several models on one dataset, split and candidate sets.

    Args:
        models: names, ours and stock sequential ones; the first is what the others are compared with. ``LLMSTAR:plain`` is
            LLMSTAR once more, under that name and with the settings ``LLMSTAR:plain.<key>``: an ablation, or another teacher.
        dataset: a dataset's name.
        seeds: each model runs once per seed; empty: the configured one.
        config_file_list: YAML files.
        settings: keys for all models, or for one as ``"SASRec.epochs"``. Training keys without a model's name are for the
            LLM recommenders where there is one: a baseline keeps RecBole's training settings.
        on_row: called with all rows so far whenever a model is done.

    Returns:
        one row per model and seed (and per teacher that is not among the models), see ``recbole_llm.report``.

    Raises:
        UserError: a mistake in the settings or data; checked for every model before the first is trained.
    """
    settings = dict(settings or {})
    repeated = {name for name in models if list(models).count(name) > 1}
    if repeated:
        name = sorted(repeated)[0]
        raise UserError(f"model: {name} is named twice; call the second a variant, {name}:b, and set --{name}:b.<key>=<value>.")
    for name in models:
        if not re.fullmatch(r"\w+(:[\w-]+)?", name):
            raise UserError(f"model: {name!r} is no name; a model's, or one such as LLMSTAR:plain for a variant of LLMSTAR.")
    configs = {
        (seed, name): configure(name, dataset, models, seed, config_file_list, settings)
        for seed in (list(seeds) or [None])
        for name in models
    }
    for config in configs.values():
        if is_ours(config["model"]):
            fetch_backbone(config)  # what is wrong with it shows before a baseline is trained, not after
            source_configs(config)
    start_logging(next(iter(configs.values())), models)
    data, rows = SharedData(), []
    for (_, name), config in configs.items():
        try:
            # A teacher that several models share has one row.
            known = {row.get("checkpoint") for row in rows}
            for row in run_model(config, data, models):
                if row.get("role") != "teacher":
                    rows.append({**row, "model": name})
                elif row["checkpoint"] not in known:
                    rows.append(row)
        except UserError as error:
            if not rows:
                raise
            # What the other models gave is not lost because one failed.
            rows.append({"model": name, "dataset": dataset, "seed": config["seed"], "error": str(error)})
        if on_row is not None:
            on_row(rows)
        gc.collect()
    return [row for row in rows if row.get("role") != "teacher"] + [row for row in rows if row.get("role") == "teacher"]


def configure(
    name: str,
    dataset: str,
    models: Sequence[str],
    seed: int | None,
    config_file_list: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> Config:
    """The configuration of one model, or variant of one, of a comparison."""
    files = {}
    for file in config_file_list or ():
        files.update(load_yaml(file))
    together = {**files, **settings}
    ours = [label for label in models if is_ours(model_of(label))]
    # A teacher may be addressed by its name ("SASRec.epochs") whether or not it is among the models.
    teachers = {label: _teacher_of(label, together) for label in ours}
    named = list(dict.fromkeys([*models, *teachers.values()]))
    from_files = {"protocol": default_protocol(ours, together), **settings_for(name, files, named)}
    given = settings_for(name, settings, named)
    if seed is not None:
        given["seed"] = seed
    if name not in ours and ours:
        # A baseline beside LLM recommenders keeps RecBole's training settings, as their teacher does: the LLM's learning rate
        # or epochs would not make it a fair baseline. What is given in its own name holds.
        own = {key.rpartition(".")[2] for key in together if key.startswith((f"{name}.", f"{model_of(name)}."))}
        for values in (from_files, given):
            for key in {*training_arguments, "valid_users", "valid_items"} - own:
                values.pop(key, None)
    if name in ours:
        teacher = f"{teachers[name]}."
        for_teacher = {key.removeprefix(teacher): value for key, value in together.items() if key.startswith(teacher)}
        if for_teacher:
            given["teacher_settings"] = {**(from_files.get("teacher_settings") or {}), **(given.get("teacher_settings") or {})}
            given["teacher_settings"].update(for_teacher)
    config = make_config(model_of(name), dataset, config_dict=from_files, command_line=given)
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        raise UserError(f"model: {name} is no sequential model; compare it with RecBole's own run_recbole.")
    if name in teachers.values():  # as the teacher of the others, so that it is trained once
        for key, value in (config["teacher_settings"] or {}).items():
            given.setdefault(key, value)
        config = make_config(name, dataset, config_dict=from_files, command_line=given)
    return config


def _teacher_of(label: str, settings: Mapping[str, Any]) -> str:
    """The name of the teacher of one of our models, or of a variant."""
    keys = (f"{label}.teacher", f"{model_of(label)}.teacher", "teacher")
    return str(next((settings[key] for key in keys if settings.get(key)), "SASRec"))


def default_protocol(ours: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The protocol of a comparison that names none: that of the first of our models which has one of its own."""
    if settings.get("recommend_by") in ("generation", "yes_no"):
        return settings["recommend_by"]
    schema = read_schema()
    keys = (schema[f"model/{model_of(label)}"].get("protocol") for label in ours)
    return next((key.default for key in keys if key is not None), "retrieval")


def start_logging(config: Config, models: Sequence[str]) -> None:
    """RecBole's log file and console messages, for a run of several models."""
    root = getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    init_logger(config)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    root.info(f"Comparing {', '.join(models)} on {config['dataset']}, protocol {config['protocol']}")


def run_model(config: Config, data: SharedData, models: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and test one model; returns its row, and its teacher's where the teacher is not among ``models``."""
    splits = data.splits(config)
    if not is_ours(config["model"]):
        return [stock_row(stock.train_or_load(config, splits, config["teacher_training"] or "prefix"))]
    init_seed(config["seed"], config["reproducibility"])
    train = data.train(config)
    model = get_model(config["model"])(config, train).to(config["device"])
    getLogger().info(model)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.saved_model_file = str(run_folder(config, model.fingerprint))
    if trainer.can_resume(trainer.saved_model_file):
        if config["resume"]:
            trainer.resume_checkpoint(trainer.saved_model_file)
        else:
            getLogger().warning(
                f"{trainer.saved_model_file} holds an unfinished training of these settings, which now starts again; "
                f"--resume=True goes on with it."
            )
    train_data, valid_data, test_data = dataloaders(config, train, splits)
    trainer.fit(train_data, valid_data, saved=True, show_progress=config["show_progress"])
    metrics = trainer.evaluate(test_data, show_progress=config["show_progress"])
    getLogger().info(f"{config['model']} test result: {metrics}")
    row = {
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "role": "model",
        "trained_parameters": sum(parameter.numel() for parameter in model.trained_parameters().values()),
        "train_seconds": trainer.train_seconds,
        "checkpoint": trainer.saved_model_file,
        **_ranked(trainer.last_ranking, config),
    }
    rows = [row]
    if model.teacher is not None and model.teacher.name not in models:
        rows.append({**stock_row(model.teacher_run), "role": "teacher"})
    return rows


def run_folder(config: Config, fingerprint: str) -> Path:
    """Where a run keeps its checkpoint: the same settings give the same folder, so that a killed run is found again."""
    settings = {key: value for key, value in config.external_config_dict.items() if key not in NOT_SETTINGS}
    text = json.dumps([settings, fingerprint], default=str, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(config["checkpoint_dir"]) / f"{config['model']}-{config['dataset']}-seed{config['seed']}-{digest}"


NOT_SETTINGS = frozenset(
    "resume show_progress results_file per_user_file state log_wandb wandb_project checkpoint_dir data_path gpu_id "
    "use_gpu".split()
)


def dataloaders(config: Config, train: TextSequentialDataset, splits: Mapping[str, TextSequentialDataset]) -> tuple:
    """RecBole's dataloaders over our splits, without a sampler: the trainers here draw candidates themselves."""
    config["train_neg_sample_args"] = {"distribution": "none", "sample_num": "none", "dynamic": False}
    return (
        TrainDataLoader(config, train, None, shuffle=config["shuffle"]),
        *(EvaluationRows(config, splits[phase]) for phase in ("valid", "test")),
    )


class EvaluationRows:
    """Stands where RecBole's trainers take an evaluation dataloader; the rows are read from ``_dataset``."""

    def __init__(self, config: Config, split: TextSequentialDataset) -> None:
        self.config, self._dataset = config, split

    def __len__(self) -> int:
        return len(self._dataset)


def stock_row(run: stock.StockRun) -> dict[str, Any]:
    """The results row of a trained stock model."""
    run.model.eval()
    ranking = evaluate(
        stock_scores(run.model),
        stock_predictions(run.model),
        run.splits["test"],
        run.config,
        "test",
        progress=run.config["show_progress"],
    )
    getLogger().info(f"{run.config['model']} test result: {ranking.metrics}")
    return {
        "model": run.config["model"],
        "dataset": run.config["dataset"],
        "seed": run.config["seed"],
        "role": "model",
        "trained_parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "train_seconds": run.train_seconds,
        "checkpoint": str(run.folder),
        **_ranked(ranking, run.config),
    }


def _ranked(ranking, config: Config) -> dict[str, Any]:
    names = ("ranks",) if isinstance(ranking, RankingResult) else ("labels", "values")
    return {
        "metrics": ranking.metrics,
        "users": len(ranking.rows),
        "eval_seconds": ranking.seconds,
        "user_ids": ranking.user_ids,
        "test_set": ranking.test_set,
        **{name: getattr(ranking, name) for name in names},
        "valid_metric": config["valid_metric"],
    }


def load(model_file: str | Path) -> tuple[Config, Any, TextSequentialDataset, Any, Any, Any]:
    """Load a trained LLM recommender with its data; the same six things as RecBole's ``load_data_and_model``.

    Args:
        model_file: a checkpoint folder of this library, or the weights file in it.

    Raises:
        UserError: no checkpoint, a truncated or foreign one, or data that is no longer the same.
    """
    folder = checkpoint.folder_of(model_file)
    record = checkpoint.read_record(folder)
    if record.get("kind") != "llm":
        raise UserError(f"{folder} holds a stock {record['model']}, not an LLM recommender: give the folder of one.")
    settings = dict(record["settings"])
    settings.pop("model", None)
    settings.pop("dataset", None)
    teacher = (record["teacher"] or {}).get("folder")
    if teacher and not settings.get("teacher_checkpoint") and checkpoint.exists(teacher):
        settings["teacher_checkpoint"] = teacher
    foundation = (record.get("foundation") or {}).get("folder")
    if foundation and checkpoint.exists(foundation):
        settings |= {"pretrained": foundation, "pretrain_datasets": None}
    config = make_config(record["model"], record["dataset"], config_dict=settings)
    data = SharedData()
    splits, train = data.splits(config), data.train(config)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train).to(config["device"])
    load_trained_weights(model, folder, config["model"])
    model.eval()
    return config, model, splits["train"], *dataloaders(config, train, splits)


def recommend(
    model_file: str | Path,
    user: str | None = None,
    history: Sequence[str] | None = None,
    topk: int = 10,
    exclude_history: bool = True,
) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Recommend items to a user of the dataset, or for a history given by titles.

    Args:
        model_file: a checkpoint folder.
        user: the user's id in the dataset; their whole history is read, the test item included.
        history: titles, oldest first.
        topk: how many items.
        exclude_history: leave out items of the history.

    Returns:
        the history's titles, and (item id, title, score) of the best items, best first.

    Raises:
        UserError: unknown user or title, or neither or both of them given.
    """
    if (user is None) == (history is None):
        raise UserError("Give either --user=<id> or --history='[title, title]'.")
    if topk < 1:
        raise UserError(f"topk is {topk}: give a whole number above 0.")
    config, model, dataset, *_ = load(model_file)
    splits = dataset.splits
    items = _items_of_user(splits["test"], user) if user is not None else _items_of_titles(dataset, history)
    length = config["MAX_ITEM_LIST_LENGTH"]
    kept = items[-length:]
    row = np.zeros((1, length), dtype=np.int64)
    row[0, : len(kept)] = kept
    interaction = Interaction(
        {
            model.USER_ID: torch.zeros(1, dtype=torch.long),
            model.ITEM_SEQ: torch.from_numpy(row),
            model.ITEM_SEQ_LEN: torch.tensor([len(kept)]),
        }
    )
    if user is not None:
        times = _with_target(splits["test"], user, dataset.time_field)[-length:]
    else:  # titles come without dates: the history ends where the data ends
        times = splits["test"].inter_feat[dataset.time_field].max().expand(len(kept))
    times = torch.nn.functional.pad(times, (0, length - len(times)))[None]
    interaction.update(Interaction({model.time_list_field: times}))
    scores = model.score(interaction.to(config["device"]), None)[0].cpu()
    if exclude_history:
        scores[torch.from_numpy(np.unique(items))] = float("-inf")
    best = scores.topk(min(topk, int(torch.isfinite(scores).sum())))
    tokens = dataset.field2id_token[dataset.iid_field]
    found = [
        (str(tokens[item]), dataset.item_texts[item], float(score))
        for score, item in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return [dataset.item_texts[item] for item in items], found


def _row_of_user(test: TextSequentialDataset, user: str) -> int:
    known = test.field2token_id[test.uid_field]
    if str(user) not in known or known[str(user)] == 0:
        near = closest(str(user), list(known)[1:])
        raise UserError(f"user: {test.dataset_name} has no user {user!r}" + (f"; the nearest is {near!r}." if near else "."))
    rows = np.flatnonzero(test.inter_feat[test.uid_field].numpy() == known[str(user)])
    if len(rows) == 0:
        raise UserError(f"user: {user!r} has too short a history in {test.dataset_name} to recommend from.")
    return int(rows[-1])


def _with_target(test: TextSequentialDataset, user: str, field: str) -> torch.Tensor:
    """A user's history in the test row with the test item behind it."""
    row = _row_of_user(test, user)
    length = int(test.inter_feat[test.item_list_length_field][row])
    history = test.inter_feat[field + test.config["LIST_SUFFIX"]][row, :length]
    return torch.cat([history, test.inter_feat[field][row : row + 1]])


def _items_of_user(test: TextSequentialDataset, user: str) -> np.ndarray:
    return _with_target(test, user, test.iid_field).numpy()


def _items_of_titles(dataset: TextSequentialDataset, titles: Sequence[str]) -> np.ndarray:
    if not titles:
        raise UserError("history: give at least one title.")
    by_title: dict[str, int] = {}
    for item, text in enumerate(dataset.item_texts[1:], start=1):
        by_title.setdefault(text.strip().casefold(), item)
    items = []
    for title in titles:
        item = by_title.get(str(title).strip().casefold())
        if item is None:
            near = closest(str(title), [text for text in dataset.item_texts[1:]])
            hint = f"; the nearest is {near!r}." if near else "."
            raise UserError(f"history: {dataset.dataset_name} has no item titled {title!r}{hint}")
        items.append(item)
    return np.array(items, dtype=np.int64)
