"""One model of a comparison: trained, found again, tested under each protocol, and its rows.

A run's folder is named by the settings and the data that decide its result, so what was trained or tested before is read.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm import checkpoint
from recbole_llm.backbone.load import fetch_backbone
from recbole_llm.config.identity import deciding_settings
from recbole_llm.config.protocols import under_protocols
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, first_line, printable, sentence_for
from recbole_llm.evaluation.evaluate import evaluate, identify_test_set
from recbole_llm.evaluation.ranking import is_per_user, metrics_from_ranks
from recbole_llm.evaluation.stock_scores import stock_predictions, stock_scores
from recbole_llm.fused import KeepScores
from recbole_llm.lock import held
from recbole_llm.processes import group as processes
from recbole_llm.registry import is_ours
from recbole_llm.results import log, run
from recbole_llm.results.describe import PeakMemory, keep_run, keep_test, settings_of
from recbole_llm.results.run import read_curve
from recbole_llm.results.sources import Sources, digest_of, folders_of, write_sources
from recbole_llm.teacher import stock
from recbole_llm.teacher.teacher import obtain_teacher
from recbole_llm.trainer.checkpoint import load_trained_weights


def failure(error: BaseException) -> str:
    """What a table says of a model that failed: the sentence of a user's mistake, else the class and first line."""
    return printable(sentence_for(error) or f"{type(error).__name__}: {first_line(error)}", None)


def log_traceback(error: BaseException, config: Config) -> None:
    """Write where an error came from to a log file of the model; the console has its sentence."""
    with log.run_log(config["model"], f"{config['model']}-{config['dataset']}-seed{config['seed']}-failed"):
        log.log_to_files("".join(traceback.format_exception(error)))


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
