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
import traceback
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import ModelType, get_model, get_trainer, init_logger, init_seed

from recbole_llm import checkpoint, preflight
from recbole_llm.config.identity import deciding_settings, own_training_keys
from recbole_llm.config.schema import load_yaml, read_schema
from recbole_llm.config.settings import make_config, model_of, settings_for
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line, printable, sentence_for
from recbole_llm.evaluation.evaluate import RankingResult, evaluate
from recbole_llm.evaluation.stock_scores import stock_predictions, stock_scores
from recbole_llm.lock import held
from recbole_llm.registry import is_ours
from recbole_llm.teacher import stock


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
        one row per model and seed (and per teacher that is not among the models), see ``recbole_llm.results.table``.

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
    chosen_seeds: list[int | None] = [*seeds] or [None]
    configs = {
        (seed, name): configure(name, dataset, models, seed, config_file_list, settings)
        for seed in chosen_seeds
        for name in models
    }
    start_logging(next(iter(configs.values())), models)
    data = SharedData()
    rows: list[dict[str, Any]] = []
    preflight.check(configs.values(), data)
    for (_, name), config in configs.items():
        try:
            # A teacher that several models share has one row.
            known = {row.get("checkpoint") for row in rows}
            for row in run_model(config, data, models):
                if row.get("role") != "teacher":
                    rows.append({**row, "model": name})
                elif row["checkpoint"] not in known:
                    rows.append(row)
        except Exception as error:
            if len(configs) == 1 and sentence_for(error) is not None:
                raise
            # What the other models gave, and will give, is not lost because one failed.
            log_traceback(error)
            rows.append({"model": name, "dataset": dataset, "seed": config["seed"], "error": failure(error)})
        if on_row is not None:
            on_row(rows)
        gc.collect()
    return [row for row in rows if row.get("role") != "teacher"] + [row for row in rows if row.get("role") == "teacher"]


def failure(error: BaseException) -> str:
    """What a table says of a model that failed: the sentence of a user's mistake, else the class and first line."""
    return printable(sentence_for(error) or f"{type(error).__name__}: {first_line(error)}", None)


def log_traceback(error: BaseException) -> None:
    """Write where an error came from to the log file; the console has its sentence."""
    lines = "".join(traceback.format_exception(error))
    record = logging.LogRecord("recbole_llm", logging.ERROR, __file__, 0, lines, None, None)
    for handler in getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


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
    known = list(dict.fromkeys([*models, *teachers.values()]))
    from_files = {"protocol": default_protocol(ours, together), **settings_for(name, files, known)}
    given = settings_for(name, settings, known)
    if seed is not None:
        given["seed"] = seed
    if name not in ours and ours:
        # A baseline beside LLM recommenders keeps RecBole's training settings, as their teacher does: the LLM's learning rate
        # or epochs would not make it a fair baseline. What is given in its own name holds.
        own = {key.rpartition(".")[2] for key in together if key.startswith((f"{name}.", f"{model_of(name)}."))}
        for values in (from_files, given):
            for key in own_training_keys() - own:
                values.pop(key, None)
    if name in ours:
        teacher = f"{teachers[name]}."
        for_teacher = {key.removeprefix(teacher): value for key, value in together.items() if key.startswith(teacher)}
        named = [values.get("teacher_settings") or {} for values in (from_files, given)]
        if for_teacher and all(isinstance(values, Mapping) for values in named):  # else a mistake, told by make_config
            given["teacher_settings"] = {**named[0], **named[1], **for_teacher}
    of_teacher = together.get("teacher_settings")
    if name in teachers.values() and isinstance(of_teacher, dict):  # as the teacher of the others, so that it is trained once
        given = {**of_teacher, **given}
    config = make_config(model_of(name), dataset, config_dict=from_files, command_line=given)
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        raise UserError(f"model: {name} is no sequential model; compare it with RecBole's own run_recbole.")
    return config


def _teacher_of(label: str, settings: Mapping[str, Any]) -> str:
    """The name of the teacher of one of our models, or of a variant."""
    keys = (f"{label}.teacher", f"{model_of(label)}.teacher", "teacher")
    return str(next((settings[key] for key in keys if settings.get(key)), "SASRec"))


def default_protocol(ours: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The protocol of a comparison that names none: that of the form in which models are asked, or of the first of our models
    which has one of its own."""
    for label in ours:
        form = getattr(get_model(model_of(label)), "forms", {}).get(str(settings.get("recommend_by")))
        if form is not None and form.protocol is not None:
            return form.protocol
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
    train_data, valid_data, test_data = dataloaders(config, train, splits)
    folder = run_folder(config, identity_of(model))
    trainer.saved_model_file = str(folder)
    with held(folder):
        train_or_find(trainer, config, folder, train_data, valid_data)
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


def train_or_find(trainer: Any, config: Config, folder: Path, train_data: Any, valid_data: Any) -> None:
    """Train a model, go on with its unfinished training, or take what was trained before in ``folder``, which must be held."""
    if checkpoint.exists(folder) and not config["fresh"]:
        record = checkpoint.read_record(folder)
        if record.get("finished"):
            trainer.load_weights(folder)
            trainer.train_seconds = record["train_seconds"]
            getLogger().info(f"{config['model']}: using the trained model in {folder}; --fresh=True trains it anew")
            return
    if trainer.can_resume(folder):
        if config["resume"]:
            trainer.resume_checkpoint(folder)
        else:
            getLogger().warning(
                f"{folder} holds an unfinished training of these settings, which starts again; --resume=True goes on with it."
            )
    trainer.fit(train_data, valid_data, saved=True, show_progress=config["show_progress"])


def identity_of(model: Any) -> dict[str, Any]:
    """What a model's result depends on beside its settings: the data with the items' texts, its LLMs and its teacher."""
    return {
        "data": model.fingerprint,
        "llms": {name: backbone.identity for name, backbone in model.backbones.items()},
        "teacher": None if model.teacher is None else model.teacher.identity,
    }


def run_folder(config: Config, identity: Any) -> Path:
    """Where a run keeps its checkpoint: the same settings and the same ``identity`` (for JSON) give the same folder."""
    text = json.dumps([deciding_settings(config), identity], default=str, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(config["checkpoint_dir"]) / f"{config['model']}-{config['dataset']}-seed{config['seed']}-{digest}"


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
