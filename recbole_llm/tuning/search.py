"""Search for settings by RecBole's ``HyperTuning``: trials are chosen by validation alone, and the winner alone is tested."""

from __future__ import annotations

import csv
import gc
import io
import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recbole.config import Config
from recbole.trainer import HyperTuning

from recbole_llm import preflight
from recbole_llm.analysis.job import digest
from recbole_llm.checkpoint import write_json
from recbole_llm.config.identity import deciding_settings
from recbole_llm.config.schema import Key, known_keys, recbole_arguments
from recbole_llm.config.settings import model_of
from recbole_llm.configure import configure
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, printable
from recbole_llm.files import replace_text
from recbole_llm.quick_start import start_logging
from recbole_llm.run_model import failure, log_traceback, run_model, train_model
from recbole_llm.tuning.space import Space

TRIALS = "trials.json"
ALGORITHMS = ("bayes", "random", "exhaustive")


@dataclass(frozen=True)
class Request:
    """What is to be tuned.

    Attributes:
        model: its name.
        dataset: the dataset's name.
        space: see :func:`recbole_llm.tuning.space.read_space`.
        space_name: where the space came from, for the record.
        trials: how many settings are tried.
        algorithm: ``bayes`` (tree of Parzen estimators; the first 20 are random), ``random`` or ``exhaustive``.
        files: YAML files with settings that hold for every trial.
        settings: settings that hold for every trial.
        output: folder of the results.
        command: the words of the command, for the record.
    """

    model: str
    dataset: str
    space: Space
    space_name: str
    trials: int = 20
    algorithm: str = "bayes"
    files: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: str = "tuned"
    command: Sequence[str] = ()

    def config(self, params: Mapping[str, Any], **more: Any) -> Config:
        """The configuration of a trial."""
        return configure(self.model, self.dataset, [self.model], None, self.files, {**self.settings, **params, **more})


@dataclass
class Tuned:
    """The result of a search.

    Attributes:
        folder: where it is kept.
        file: the winner's settings, for ``--config_files``.
        best: the winning trial.
        trials: all, in their order: ``params``, ``valid``, ``value``, ``seconds``, ``checkpoint``, or ``params``, ``error``.
        row: of the winner's test, as :func:`recbole_llm.run_model.run_model` gives it.
    """

    folder: Path
    file: Path
    best: dict[str, Any]
    trials: list[dict[str, Any]]
    row: dict[str, Any]


class _Search(HyperTuning):
    """RecBole's search, from a seed, without its printing; a trial whose training fails does not end it."""

    def __init__(self, objective: Any, space: Space, trials: int, algorithm: str, seed: int) -> None:
        getLogger("hyperopt").setLevel(WARNING)  # it tells of each of its own steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, which it imports
            super().__init__(objective, params_dict=space, algo=algorithm, max_evals=trials)
        self.max_evals, self.seed = int(min(self.max_evals, trials)), seed

    def trial(self, params: dict[str, Any]) -> dict[str, Any]:
        import hyperopt  # takes a second

        loss = self.objective_function(params)
        if loss is None:
            return {"status": hyperopt.STATUS_FAIL}
        return {"loss": loss, "status": hyperopt.STATUS_OK}

    def run(self) -> None:
        from hyperopt import fmin
        from hyperopt.exceptions import AllTrialsFailed

        rng = np.random.default_rng(self.seed)
        options = {"return_argmin": False, "show_progressbar": False, "verbose": False}
        with suppress(AllTrialsFailed):
            fmin(self.trial, self.space, algo=self.algo, max_evals=self.max_evals, rstate=rng, **options)


def tune(request: Request) -> Tuned:
    """Try settings, choose the best by the validation metric, test it, and write what a comparison can use.

    A trial that was finished before is read from the table, so that a search that was stopped goes on, and one with more
    trials adds to those that there are.

    Raises:
        UserError: a mistake in the settings or data, or no trial succeeded.
    """
    if request.algorithm == "exhaustive" and set(request.space) != {"choice"}:
        raise UserError("algo: exhaustive tries every combination, which takes a space of choices alone; take bayes or random.")
    keys = known_keys(model_of(request.model))
    base = request.config({})
    start_logging(base, [request.model])
    data = SharedData()
    preflight.check([base], data)
    identity = [deciding_settings(base), request.space, request.algorithm]
    folder = Path(request.output) / f"{request.model.replace(':', '-')}-{base['dataset']}-{digest(identity)}"
    folder.mkdir(parents=True, exist_ok=True)
    metric, bigger = str(base["valid_metric"]).lower(), bool(base["valid_metric_bigger"])
    known: list[dict[str, Any]] = _read(folder / TRIALS)
    trials: list[dict[str, Any]] = []

    def objective(drawn: dict[str, Any]) -> float | None:
        params = {key: _plain(value, keys[key]) for key, value in drawn.items()}
        found = next((trial for trial in [*trials, *known] if trial["params"] == params and "error" not in trial), None)
        number = len(trials) + 1
        getLogger().info(f"Trial {number}/{search.max_evals}: {params}" + (" (known)" if found else ""))
        trials.append(found or _trained(request, params, metric, data))
        rest = [trial for trial in known if all(trial["params"] != other["params"] for other in trials)]
        _write(folder, request, metric, bigger, [*trials, *rest])
        gc.collect()
        value = trials[-1].get("value")
        return None if value is None else -value if bigger else value

    search = _Search(objective, request.space, request.trials, request.algorithm, base["seed"])
    search.run()
    finished = [trial for trial in trials if "error" not in trial]
    if not finished:
        raise UserError(f"no trial succeeded; the first: {trials[0]['error']}")
    best = (max if bigger else min)(finished, key=lambda trial: trial["value"])
    tuned_by = {"trials": len(trials), "space": request.space_name, "command": shlex.join(request.command)}
    row = run_model(request.config(best["params"], tuned_by=tuned_by), data, [request.model])[0]
    file = folder / f"{model_of(request.model)}.yaml"
    replace_text(file, _winners_file(request, base, best, tuned_by, metric, row))
    return Tuned(folder, file, best, trials, row)


def _trained(request: Request, params: dict[str, Any], metric: str, data: SharedData) -> dict[str, Any]:
    """Train the model with ``params``; a trial of the table."""
    config = None
    try:
        config = request.config(params)
        folder, valid, seconds = train_model(config, data)
        value = valid.get(metric)
        if value is None:
            raise UserError(f"valid_metric: the training of {request.model} gave no {metric}.")
    except Exception as error:
        if config is not None:
            log_traceback(error, config)
        getLogger().warning(f"This trial failed: {failure(error)}")
        return {"params": params, "error": failure(error)}
    valid = {name: float(number) for name, number in valid.items()}
    return {"params": params, "value": float(value), "valid": valid, "seconds": seconds, "checkpoint": str(folder)}


def _plain(value: Any, key: Key) -> Any:
    """A drawn value as a setting: a whole number where the key takes no other, lists for hyperopt's tuples."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.generic):
        value = value.item()
    whole = "float" not in key.types or (isinstance(key.default, int) and not isinstance(key.default, bool))
    return int(value) if isinstance(value, float) and value.is_integer() and whole else value


def _read(file: Path) -> list[dict[str, Any]]:
    """The trials of a table that was written before."""
    if not file.is_file():
        return []
    try:
        trials = json.loads(file.read_text(encoding="utf-8"))["trials"]
        for trial in trials:
            dict(trial["params"])
            if "error" not in trial:
                float(trial["value"]), float(trial["seconds"]), dict(trial["valid"])
        return trials
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{file} is damaged: remove it, and the trials whose models are still there are found again.")


def _write(folder: Path, request: Request, metric: str, bigger: bool, trials: list[dict[str, Any]]) -> None:
    """Write the trials as JSON and as CSV, each in one step."""
    head = {"model": request.model, "dataset": request.dataset, "command": shlex.join(request.command), "metric": metric}
    space = {"algorithm": request.algorithm, "space": request.space, "bigger_is_better": bigger}
    write_json(folder / TRIALS, {**head, **space, "trials": trials})
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.get("valid", {})))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*names, *metrics, "seconds", "error"])
    for trial in trials:
        cells = [trial["params"].get(name, "") for name in names] + [trial.get("valid", {}).get(name, "") for name in metrics]
        table.writerow([*cells, trial.get("seconds", ""), trial.get("error", "")])
    replace_text(folder / "trials.csv", text.getvalue())


def _winners_file(
    request: Request, base: Config, best: dict[str, Any], tuned_by: dict[str, Any], metric: str, row: dict[str, Any]
) -> str:
    """The winner's settings in its own name, so that they hold for no other model of a comparison."""
    name, test = model_of(request.model), ", ".join(f"{key} {value:.4f}" for key, value in row["metrics"].items())
    lines = [
        f"# {name} on {request.dataset}: best of {tuned_by['trials']} trials by {metric} on validation ({best['value']:.4f}).",
        f"# Test: {test}.",
        f"# {printable(tuned_by['command'], None)}",
    ]
    settings = {**_of_training(request, base), **best["params"], "tuned_by": tuned_by}
    named = {f"{name}.{key}": value for key, value in settings.items()}
    return "\n".join(lines) + "\n" + yaml.safe_dump(named, sort_keys=False, allow_unicode=True, width=120)


def _of_training(request: Request, base: Config) -> dict[str, Any]:
    """What the user set for all trials that decides the training, and not the data, the evaluation or the machine."""
    keys, arguments = known_keys(model_of(request.model)), recbole_arguments()
    left_out = {*arguments["evaluation"], *arguments["dataset"], *arguments["general"], "protocol", "MAX_ITEM_LIST_LENGTH"}
    marks = ("", "training", "teacher")
    return {
        name: value
        for name, value in base.external_config_dict.items()
        if name in keys and keys[name].mark in marks and name not in left_out and value is not None
    }
