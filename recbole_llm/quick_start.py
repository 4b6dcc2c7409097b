"""Train and compare models on one dataset with the same candidates; load what was trained; recommend.

``compare`` is what ``python run_recbole_llm.py --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k`` runs. RecBole's own
``run_recbole``, ``objective_function`` and ``HyperTuning`` work as well once ``recbole_llm`` is imported.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from typing import Any

from recbole.config import Config
from recbole.utils import get_trainer

from recbole_llm import preflight
from recbole_llm.config.protocols import protocol_names, under_protocols, without_list
from recbole_llm.config.schema import read_schema
from recbole_llm.configure import configure, settings_of_files
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, sentence_for
from recbole_llm.evaluation.fusion import parts_of
from recbole_llm.fused import Fusions, check_parts, check_ranked
from recbole_llm.processes import environment, launch
from recbole_llm.processes import group as processes
from recbole_llm.registry import is_ours
from recbole_llm.results import log
from recbole_llm.run_model import failure, log_traceback, run_model
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
    named = protocol_names({**settings_of_files(config_file_list), **settings}.get("protocol"))
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
    together = {**settings_of_files(config_file_list), **settings}
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


def start_logging(config: Config, models: Sequence[str], further: Sequence[str] = ()) -> None:
    """Console messages for a run of several models; each has a log file of its own."""
    log.start_console(config["state"])
    protocol = f", protocol {', '.join([config['protocol'], *further])}" if config["protocol"] else ""
    getLogger().info(f"Comparing {', '.join(models)} on {config['dataset']}{protocol}")
