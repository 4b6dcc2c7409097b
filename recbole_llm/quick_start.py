"""Train and compare models on one dataset with the same candidates; load what was trained; recommend.

``compare`` is what ``python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k`` runs. RecBole's own
``run_recbole``, ``objective_function`` and ``HyperTuning`` work as well once ``recbole_llm`` is imported.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import ModelType, get_model, get_trainer, init_seed

from recbole_llm import checkpoint, preflight
from recbole_llm.backbone.load import fetch_backbone
from recbole_llm.config.identity import deciding_settings, own_training_keys
from recbole_llm.config.presets import preset_named, preset_settings
from recbole_llm.config.protocols import protocol_names, under_protocols, without_list
from recbole_llm.config.schema import known_keys, load_yaml, read_schema
from recbole_llm.config.settings import make_config, model_of, settings_for
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line, printable, sentence_for
from recbole_llm.evaluation.evaluate import evaluate, identify_test_set
from recbole_llm.evaluation.fusion import parts_of
from recbole_llm.evaluation.ranking import is_per_user, metrics_from_ranks
from recbole_llm.evaluation.stock_scores import stock_predictions, stock_scores
from recbole_llm.fused import Fusions, KeepScores, check_parts, check_ranked
from recbole_llm.lock import held
from recbole_llm.processes import environment, launch
from recbole_llm.processes import group as processes
from recbole_llm.registry import is_ours
from recbole_llm.results import log, run
from recbole_llm.results.describe import PeakMemory, keep_run, keep_test, settings_of
from recbole_llm.results.run import read_curve
from recbole_llm.results.sources import Sources, digest_of, folders_of, write_sources
from recbole_llm.teacher import stock
from recbole_llm.teacher.teacher import obtain_teacher
from recbole_llm.trainer.checkpoint import load_trained_weights
from recbole_llm.trainer.trainer import LLMTrainer


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
            ``SASRec+LLMSTAR`` is a row of both as one, see :mod:`recbole_llm.evaluation.fusion`.
        dataset: a dataset's name.
        seeds: each model runs once per seed; empty: the configured one.
        config_file_list: YAML files.
        settings: keys for all models, or for one as ``"SASRec.epochs"``. Training keys without a model's name are for the
            LLM recommenders where there is one: a baseline keeps RecBole's training settings. ``protocol`` may name
            several (``"retrieval,full"``): the first decides training and validation, the others only test.
        on_row: called with all rows so far whenever a model is done.

    Returns:
        one row per model, seed and protocol (and per teacher that is not among the models), see
        ``recbole_llm.results.table``. Of several processes (``docs/several-processes.md``) the main one has the rows, the
        others have none.

    Raises:
        UserError: a mistake in the settings or data; checked for every model before the first is trained.
    """
    settings = meet_processes(dict(settings or {}), config_file_list)
    repeated = {name for name in models if list(models).count(name) > 1}
    if repeated:
        name = sorted(repeated)[0]
        raise UserError(f"model: {name} is named twice; call the second a variant, {name}:b, and set --{name}:b.<key>=<value>.")
    labels, fused = list(models), [name for name in models if parts_of(name)]
    models = [name for name in labels if name not in fused]
    for name in models:
        if not re.fullmatch(r"\w+(:[\w-]+)?", name):
            raise UserError(f"model: {name!r} is no name; a model's, or one such as LLMSTAR:plain for a variant of LLMSTAR.")
    for name in fused:
        check_parts(name, models)
    named = protocol_names({**_of_files(config_file_list), **settings}.get("protocol"))
    if len(named) > 1:
        if fused:
            raise UserError(f"model: {fused[0]} is tested under one protocol, not under {', '.join(named)}; name one.")
        settings = without_list(settings, named)
    chosen_seeds: list[int | None] = [*seeds] or [None]
    configs = {
        (seed, name): configure(name, dataset, models, seed, config_file_list, settings)
        for seed in chosen_seeds
        for name in models
    }
    for name in fused:
        check_ranked(name, [configs[seed, part] for seed in chosen_seeds for part in parts_of(name)])
    for config in configs.values():
        log.check_trackers(config)
    tests = {key: under_protocols(config, named[1:]) for key, config in configs.items()}
    start_logging(next(iter(configs.values())), labels, named[1:])
    data = SharedData()
    check_processes(configs.values(), fused)
    fusions = Fusions(fused, configs, data)
    rows: list[dict[str, Any]] = []
    preflight.check(configs.values(), data, tests.values())
    log.mark()
    for key, config in configs.items():
        seed, name = key
        try:
            # A teacher that several models share has one row.
            known = {row.get("checkpoint") for row in rows}
            for row in run_model(config, data, models, tests[key], fusions.keeper(seed, name)):
                if row.get("role") != "teacher":
                    rows.append({**row, "model": name})
                elif row["checkpoint"] not in known:
                    rows.append(row)
        except Exception as error:
            if is_ours(config["model"]):
                processes.fail_together(error)
            if len(configs) == 1 and sentence_for(error) is not None:
                raise
            # What the other models gave, and will give, is not lost because one failed.
            log_traceback(error, config)
            failed = {"model": name, "dataset": dataset, "seed": config["seed"], "error": failure(error)}
            protocols = named if len(named) > 1 else []
            rows += [{**failed, "record": {"protocol": protocol}} for protocol in protocols] or [failed]
        rows += fusions.done_after(seed, name, rows)
        if on_row is not None and processes.is_main():
            on_row(rows)
        gc.collect()
        log.rewind()
    if not processes.is_main():
        return []
    used = list(dict.fromkeys(config["seed"] for config in configs.values()))
    of_models = [row for row in rows if row.get("role") != "teacher"]
    of_models.sort(key=lambda row: (used.index(row["seed"]), labels.index(row["model"])))
    return of_models + [row for row in rows if row.get("role") == "teacher"]


def meet_processes(settings: dict[str, Any], config_file_list: Sequence[str] | None) -> dict[str, Any]:
    """Meet the other processes that were launched with this one; the settings that remain.

    Raises:
        UserError: keys that start processes, where they were not started; or one of them did not come.
    """
    together = {**_of_files(config_file_list), **settings}
    timeout = together.get("process_timeout", read_schema()["overall"]["process_timeout"].default)
    remaining = {key: value for key, value in settings.items() if key not in launch.KEYS}
    if environment.size() == 1:
        started = next((key for key in ("nproc", "world_size") if (together.get(key) or 1) not in (1, "1")), None)
        if started is not None:
            raise UserError(f"{started}: several processes are started by run_recbole_llm.py or torchrun, not from Python.")
        return remaining
    if not isinstance(timeout, (int, float)) or not timeout > 0:
        raise UserError(f"process_timeout: {timeout!r} is no number of seconds above 0.")
    cpu = together.get("use_gpu", True) is False or together.get("gpu_id", "0") in ("", None)
    processes.start(cpu, float(timeout))
    return remaining


def check_processes(configs: Iterable[Config], fused: Sequence[str]) -> None:
    """Refuse what several processes cannot share.

    Raises:
        UserError: a fused row, an LLM behind an endpoint, or a trainer of another package.
    """
    if environment.size() == 1:
        return
    if fused:
        raise UserError(f"model: {fused[0]} is two models as one, which is made by one process: leave it out, or take one.")
    for config in configs:
        if config["endpoint_url"]:
            raise UserError("endpoint_url: an LLM behind an endpoint is asked by one process: start one.")
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])
        if is_ours(config["model"]) and not issubclass(trainer, LLMTrainer):
            raise UserError(f"{config['model']}: its trainer {trainer.__name__} is for one process: start one.")


def failure(error: BaseException) -> str:
    """What a table says of a model that failed: the sentence of a user's mistake, else the class and first line."""
    return printable(sentence_for(error) or f"{type(error).__name__}: {first_line(error)}", None)


def log_traceback(error: BaseException, config: Config) -> None:
    """Write where an error came from to a log file of the model; the console has its sentence."""
    with log.run_log(config["model"], f"{config['model']}-{config['dataset']}-seed{config['seed']}-failed"):
        log.log_to_files("".join(traceback.format_exception(error)))


def configure(
    name: str,
    dataset: str,
    models: Sequence[str],
    seed: int | None,
    config_file_list: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> Config:
    """The configuration of one model, or variant of one, of a comparison."""
    files = _of_files(config_file_list)
    together = {**files, **settings}
    ours = [label for label in models if is_ours(model_of(label))]
    # A teacher may be addressed by its name ("SASRec.epochs") whether or not it is among the models.
    teachers = {label: _teacher_of(label, together) for label in ours}
    named = list(teachers.values())
    from_files = {"protocol": default_protocol(ours, together), **settings_for(name, files, models, named)}
    given = settings_for(name, settings, models, named)
    if seed is not None:
        given["seed"] = seed
    if not processes.is_main():
        given |= {"show_progress": False, "log_wandb": False}
    if name not in ours and ours:
        # A baseline beside LLM recommenders keeps RecBole's training settings, as their teacher does: the LLM's learning rate
        # or epochs would not make it a fair baseline. What is given in its own name holds.
        for values, source in ((from_files, files), (given, settings)):
            own = {key.rpartition(".")[2] for key in source if key.startswith((f"{name}.", f"{model_of(name)}."))}
            for key in own_training_keys() - own:
                values.pop(key, None)
    if name in ours:
        teacher = f"{teachers[name]}."
        for_teacher = {key.removeprefix(teacher): value for key, value in together.items() if key.startswith(teacher)}
        if teachers[name] in models:  # what is said of all models that know a key is said of it, as a teacher too
            of_both = known_keys(teachers[name]).keys() - known_keys(model_of(name)).keys()
            for_teacher = {**{key: together[key] for key in together if key in of_both}, **for_teacher}
        named_settings = [values.get("teacher_settings") or {} for values in (from_files, given)]
        if for_teacher and all(isinstance(values, Mapping) for values in named_settings):  # else a mistake, told by make_config
            given["teacher_settings"] = {**named_settings[0], **named_settings[1], **for_teacher}
    of_teacher = together.get("teacher_settings")
    if name in teachers.values() and isinstance(of_teacher, dict):  # as the teacher of the others, so that it is trained once
        given = {**of_teacher, **given}
    if name in teachers.values():
        recipes = {_preset_of(label, together).get("teacher_preset") for label in ours if teachers[label] == name}
        if len(recipes) == 1 and "teacher_preset" not in together:
            from_files["teacher_preset"] = recipes.pop()
    config = make_config(model_of(name), dataset, config_dict=from_files, command_line=given)
    if config["MODEL_TYPE"] not in (ModelType.SEQUENTIAL, ModelType.GENERAL, ModelType.TRADITIONAL):
        raise UserError(
            f"model: {name} reads features or knowledge of users and items, which a comparison here has none of; take a "
            f"sequential or a general recommender, or compare it with RecBole's own run_recbole."
        )
    return config


def _of_files(config_file_list: Sequence[str] | None) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for file in config_file_list or ():
        files.update(load_yaml(file))
    return files


def _teacher_of(label: str, settings: Mapping[str, Any]) -> str:
    """The name of the teacher of one of our models, or of a variant."""
    keys = (f"{label}.teacher", f"{model_of(label)}.teacher", "teacher")
    return str(next((settings[key] for key in keys if settings.get(key)), "SASRec"))


def _preset_of(label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the recipe that a comparison names for one of our models, or for a variant."""
    model = model_of(label)
    return preset_settings(model, preset_named(settings, label, model), None)


def default_protocol(ours: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The protocol of a comparison that names none: that of the form in which models are asked, or of the first of our models
    which has one of its own."""
    schema, own = read_schema(), []
    for label in ours:
        model = model_of(label)
        preset = _preset_of(label, settings)
        asked = settings.get("recommend_by", preset.get("recommend_by"))
        form = getattr(get_model(model), "forms", {}).get(str(asked))
        if form is not None and form.protocol is not None:
            return form.protocol
        usual = {key: said.default for key, said in schema[f"model/{model}"].items()} | preset
        if "protocol" in usual and asked in (None, usual.get("recommend_by", asked)):
            own.append(usual["protocol"])
    return own[0] if own else "retrieval"


def start_logging(config: Config, models: Sequence[str], further: Sequence[str] = ()) -> None:
    """Console messages for a run of several models; each has a log file of its own."""
    log.start_console(config["state"])
    protocol = f", protocol {', '.join([config['protocol'], *further])}" if config["protocol"] else ""
    getLogger().info(f"Comparing {', '.join(models)} on {config['dataset']}{protocol}")


def run_model(
    config: Config,
    data: SharedData,
    models: Sequence[str] = (),
    tests: Sequence[Config] = (),
    keep_scores: KeepScores | None = None,
) -> list[dict[str, Any]]:
    """Train and test one model, or read the result of what was; its rows, and its teacher's if that is not among ``models``.

    Args:
        config: of the model.
        data: builds the dataset.
        models: all models of the comparison.
        tests: configurations of the test under further protocols, see :func:`under_protocols`.
        keep_scores: is given the trained model's ``score_rows``.
    """
    if not is_ours(config["model"]) and not processes.is_main():
        return []  # the main process trains it, or finds it
    splits = data.splits(config)
    if not is_ours(config["model"]):
        trained = stock.train_or_load(config, splits, config["teacher_training"] or "prefix")
        rows = stock_rows(trained, tests)
        if keep_scores is not None:
            keep_scores(stock_scores(trained.model.eval()))
        return rows
    train, given = data.train(config), deciding_settings(config)
    if keep_scores is None and not config["fresh"] and not config["endpoint_url"] and processes.size() == 1:
        found = _find_tested(config, given, train, models, tests)
        if found is not None:
            return found
    memory = PeakMemory()
    model, trainer_class, folder = _built(config, train)
    with log.run_log(config["model"], folder.name, config["fresh"]), processes.main_only(held(folder)):
        kept = _kept_rows(folder, [config, *tests], splits["test"]) if is_trained(folder) else []
        rows = [row for row in kept if row is not None]
        if processes.decide(len(rows) <= len(tests)):  # some are missing
            loaders = dataloaders(config, train, splits)
            rows = _train_and_test(trainer_class, config, model, loaders, folder, memory, tests)
        else:
            getLogger().info(f"{config['model']}: using the trained model in {folder}; --fresh=True trains it anew")
        if set(model.backbones) == {"backbone"} and not config["endpoint_url"] and processes.is_main():
            teacher = None if model.teacher is None else model.teacher.identity
            write_sources(folder, Sources(_digest_of_sources(config, given, train), teacher))
        _tell_results(rows, tests)
        if keep_scores is not None:
            load_trained_weights(model, folder, config["model"])
            keep_scores(model.eval().score)
    if not processes.is_main():
        return []
    if model.teacher is not None and model.teacher.name not in models:
        rows += _teacher_rows(model.teacher_run, tests)
    return rows


def _built(config: Config, train: Any) -> tuple[Any, Any, Path]:
    """A model of ours, untrained, its trainer's class and its run's folder."""
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train).to(config["device"])
    getLogger().info(model, extra=log.FILE_ONLY)
    trainer_class = get_trainer(config["MODEL_TYPE"], config["model"])
    complete_settings = getattr(trainer_class, "complete_settings", None)  # a trainer of another package may have none
    if complete_settings is not None:
        complete_settings(config, model)
    folder = run_folder(config, identity_of(model))
    processes.agree("the name that settings and data give the run's folder", folder.name)
    return model, trainer_class, folder


def train_model(config: Config, data: SharedData) -> tuple[Path, dict[str, float], float]:
    """Train one model, or find what was, and leave the test out: its folder, metrics on validation and seconds of training."""
    splits = data.splits(config)
    if not is_ours(config["model"]):
        trained = stock.train_or_load(config, splits, config["teacher_training"] or "prefix")
        return trained.folder, dict(trained.valid_result), trained.train_seconds
    train = data.train(config)
    model, trainer_class, folder = _built(config, train)
    settings, _ = settings_of(config)
    with log.run_log(config["model"], folder.name, config["fresh"]), held(folder), log.tracked(folder.name, settings):
        trainer = trainer_class(config, model)
        trainer.saved_model_file = str(folder)
        train_data, valid_data, _ = dataloaders(config, train, splits)
        train_or_find(trainer, config, folder, train_data, valid_data)
        trainer.tensorboard.close()
        return folder, dict(trainer.best_valid_result or {}), trainer.train_seconds


def _teacher_rows(trained: stock.StockRun, tests: Sequence[Config]) -> list[dict[str, Any]]:
    return [{**row, "role": "teacher"} for row in stock_rows(trained, _for_teacher(trained.config, tests))]


def _digest_of_sources(config: Config, given: Mapping[str, Any], train: Any) -> str:
    return digest_of(given, train.text_fingerprint, fetch_backbone(config), str(config["device"]))


def _find_tested(
    config: Config, given: Mapping[str, Any], train: Any, models: Sequence[str], tests: Sequence[Config]
) -> list[dict[str, Any]] | None:
    """:func:`run_model` of what was trained and tested with the same settings, data, LLM and teacher; None of all else.

    The LLM, which only says once more what it is, is not loaded.
    """
    of_model = list(folders_of(Path(config["checkpoint_dir"]), config["model"], config["dataset"]))
    digest = _digest_of_sources(config, given, train) if of_model else None
    for folder, sources in of_model:
        if sources.digest != digest or not is_trained(folder):
            continue
        teacher_run = None
        if sources.teacher is not None:
            teacher, teacher_run = obtain_teacher(config, train.splits)
            if teacher.identity != sources.teacher:
                continue
        with log.run_log(config["model"], folder.name), held(folder):
            rows = [row for row in _kept_rows(folder, [config, *tests], train.splits["test"]) if row is not None]
            if len(rows) <= len(tests):
                return None
            getLogger().info(f"{config['model']}: using the trained model in {folder}; --fresh=True trains it anew")
            _tell_results(rows, tests)
        if teacher_run is not None and teacher_run.config["model"] not in models:
            rows += _teacher_rows(teacher_run, tests)
        return rows
    return None


def _for_teacher(config: Config, tests: Sequence[Config]) -> list[Config]:
    """The configurations of a teacher's tests under the further protocols of its model's."""
    return under_protocols(config, [test["protocol"] for test in tests])


def _kept_rows(folder: Path, configs: Sequence[Config], split: Any) -> list[dict[str, Any] | None]:
    """:func:`row_of_test` under each protocol; None in all places where the first has to be made anew."""
    first = row_of_test(folder, configs[0], split)
    if first is None:  # its record goes, and with it those of the others
        return [None] * len(configs)
    return [first, *(row_of_test(folder, config, split) for config in configs[1:])]


def _tell_results(rows: Sequence[Mapping[str, Any]], tests: Sequence[Config]) -> None:
    for row in rows:
        under = f" ({row['record']['protocol']})" if tests else ""
        getLogger().info(f"{row['record']['model']} test result{under}: {log.decimals(row['metrics'])}")


def is_trained(folder: Path) -> bool:
    """Whether ``folder`` holds an LLM recommender whose training is finished."""
    return checkpoint.exists(folder) and bool(checkpoint.read_record(folder).get("finished"))


def _train_and_test(
    trainer_class: Any,
    config: Config,
    model: Any,
    loaders: tuple[Any, Any, Any],
    folder: Path,
    memory: PeakMemory,
    tests: Sequence[Config],
) -> list[dict[str, Any]]:
    """Train a model of ours and test it, where that is not done, and write its record; ``folder`` must be held."""
    train_data, valid_data, test_data = loaders
    settings, _ = settings_of(config)
    with log.tracked(folder.name, settings):
        log.note_settings(folder.name, settings, main_backbone(model))
        trainer = trainer_class(config, model)
        trainer.saved_model_file = str(folder)
        train_or_find(trainer, config, folder, train_data, valid_data)
        kept = _kept_rows(folder, [config, *tests], test_data._dataset) if processes.is_main() else []
        missing = processes.decide([row is None for row in kept])
        rows: list[dict[str, Any]] = []
        for place, test in enumerate([config, *tests]):
            row = kept[place] if kept else None
            if missing[place]:
                trainer.test_config = test if place else None
                trainer.evaluate(test_data, show_progress=config["show_progress"])
                if not processes.is_main():
                    continue
                row = keep_test(rows[0], test, trainer.last_ranking) if place else _keep_first(
                    trainer, config, model, folder, train_data, memory
                )
            if row is not None:
                rows.append(row)
        trainer.tensorboard.close()
        if processes.is_main():
            log.note_result(folder.name, settings, rows[0]["metrics"], trainer.step)
    return rows


def _keep_first(
    trainer: Any, config: Config, model: Any, folder: Path, train_data: Any, memory: PeakMemory
) -> dict[str, Any]:
    """Write the record of a model of ours that was tested under the protocol that it was trained for."""
    return keep_run(
        folder,
        config,
        train_data._dataset,
        trainer.last_ranking,
        read_curve(folder),
        fingerprint=model.fingerprint,
        started=trainer.started,
        train_seconds=trainer.train_seconds,
        valid=trainer.best_valid_result,
        trained_parameters=sum(parameter.numel() for parameter in model.trained_parameters().values()),
        memory=memory,
        backbone=main_backbone(model),
        teacher=None if model.teacher is None else {"model": model.teacher.name, "folder": str(model.teacher_run.folder)},
    )


def main_backbone(model: Any) -> dict[str, Any] | None:
    """The identity of a model's usual LLM, of the first where none is."""
    backbones = model.backbones
    backbone = backbones.get("backbone") or next(iter(backbones.values()), None)
    return None if backbone is None else dict(backbone.identity)


def train_or_find(trainer: Any, config: Config, folder: Path, train_data: Any, valid_data: Any) -> None:
    """Train a model, go on with its unfinished training, or take what was trained before in ``folder``, which must be held."""
    if processes.decide(is_trained(folder) and not config["fresh"]):
        record = checkpoint.read_record(folder)
        trainer.load_weights(folder)
        trainer.train_seconds, trainer.started = record["train_seconds"], record.get("started")
        trainer.best_valid_result = record.get("best_valid_result")
        getLogger().info(f"{config['model']}: using the trained model in {folder}; --fresh=True trains it anew")
        return
    if processes.decide(trainer.can_resume(folder)):
        if config["resume"]:
            trainer.resume_checkpoint(folder)
        else:
            getLogger().warning(
                f"{folder} holds an unfinished training of these settings, which starts again; --resume=True goes on with it."
            )
    trainer.fit(train_data, valid_data, saved=True, show_progress=config["show_progress"])


def row_of_test(folder: Path, config: Config, split: Any) -> dict[str, Any] | None:
    """The row of a trained model that was tested before on the same candidates; None where it must be tested.

    Other ``metrics`` and ``topk`` than were asked for then are computed from the users' ranks.
    """
    if config["fresh"] or not run.exists(folder):
        return None
    if config["endpoint_url"]:  # what was not answered is asked again; the answers are in a file of their own
        return None
    try:
        found = run.read_run(folder)
        if config["protocol"] not in found.protocols:
            return None
        row = found.under(config["protocol"]).row()
    except UserError as error:
        getLogger().warning(f"{error} It is tested again.")
        return None
    record = row["record"]
    if row["test_set"] != identify_test_set(split, config):
        return None
    wanted = {"metrics": config["metrics"], "topk": config["topk"]}
    if all(record["settings"].get(key) == run.plain(value) for key, value in wanted.items()):
        return row
    if "ranks" not in row:
        return None
    metrics = metrics_from_ranks(row["ranks"], config["metrics"], config["topk"])
    metrics.update({name: value for name, value in row["metrics"].items() if not is_per_user(name)})
    settings, of_both = {**record["settings"], **run.plain(wanted)}, {**record["metrics"], "test": metrics}
    return {**row, "metrics": metrics, "record": {**record, "settings": settings, "metrics": of_both}}


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


def stock_rows(trained: stock.StockRun, tests: Sequence[Config] = ()) -> list[dict[str, Any]]:
    """The rows of a trained stock model, one for each protocol: read where it was tested before on the same candidates."""
    config, folder = trained.config, trained.folder
    own = folder.parent == Path(config["checkpoint_dir"])  # else it is somebody's teacher_checkpoint
    memory = PeakMemory()
    with log.run_log(config["model"], folder.name, config["fresh"]), held(folder) if own else nullcontext():
        kept = _kept_rows(folder, [config, *tests], trained.splits["test"])
        rows = [kept[0] or _test_stock(trained, own, memory)]
        for test, row in zip(tests, kept[1:], strict=True):
            rows.append(row or keep_test(rows[0], test, _ranking_of_stock(trained, test), write=own))
        _tell_results(rows, tests)
    return rows


def _ranking_of_stock(trained: stock.StockRun, config: Config) -> Any:
    trained.model.eval()
    return evaluate(
        stock_scores(trained.model),
        stock_predictions(trained.model),
        trained.splits["test"],
        config,
        "test",
        progress=config["show_progress"],
    )


def _test_stock(trained: stock.StockRun, own: bool, memory: PeakMemory) -> dict[str, Any]:
    config, splits, settings = trained.config, trained.splits, settings_of(trained.config)[0]
    ranking = _ranking_of_stock(trained, config)
    row = keep_run(
        trained.folder,
        config,
        splits["train"],
        ranking,
        trained.curve,
        fingerprint=splits["train"].column_fingerprint,
        started=trained.started,
        train_seconds=trained.train_seconds,
        valid=trained.valid_result,
        trained_parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        memory=memory,
        write=own,
    )
    with log.tracked(trained.folder.name, settings):
        log.note_result(trained.folder.name, settings, ranking.metrics, trained.curve[-1]["step"] if trained.curve else 0)
    return row
