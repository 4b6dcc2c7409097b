"""Runs of MLflow, one for each model and seed, with what TensorBoard and Weights & Biases have.

MLflow decides where they go: its environment variables (``MLFLOW_TRACKING_URI``), or what the caller's program has set.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from recbole_llm.errors import UserError, first_line

_LONGEST_VALUE = 500  # characters of a parameter that every MLflow server takes
_STEPS = ("train_step", "valid_step")


@contextmanager
def mlflow_run(name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the context, a run of MLflow is open under ``name``; one of that name that was ended is gone on with.

    One that is open already, the caller's own, is used instead.

    Raises:
        UserError: MLflow's server or folder cannot be used.
    """
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse their own default folder, mlruns
    import mlflow  # heavy, and of an extra

    if mlflow.active_run() is not None:
        yield
        return
    try:
        experiment = mlflow.set_experiment(settings["mlflow_experiment"]).experiment_id
        query = f"attributes.run_name = '{name}'"
        found = [] if settings.get("fresh") else mlflow.MlflowClient().search_runs([experiment], query, max_results=1)
        mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=name)
        if not found:
            mlflow.log_params({key: str(value)[:_LONGEST_VALUE] for key, value in settings.items()})
            mlflow.log_dict(dict(settings), "settings.json")  # in full
    except Exception as error:  # of MLflow's own, of its server and of its database
        mlflow.end_run("FAILED")
        raise UserError(f"log_mlflow: MLflow cannot open a run ({first_line(error)}); see MLFLOW_TRACKING_URI.") from error
    try:
        yield
    except BaseException:
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()


def log_metrics(metrics: Mapping[str, Any], head: str) -> None:
    """Write metrics to the run that is open, if one is: ``<head>/<name>`` at the step that is among them."""
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or mlflow.active_run() is None:
        return
    step = next((int(metrics[name]) for name in _STEPS if name in metrics), None)
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, tuple):  # parts of a loss, which RecBole adds up one by one
            values |= {f"{head}/{name}{place}": float(part) for place, part in enumerate(value, 1)}
        elif name not in _STEPS:
            values[f"{head}/{_plain(name)}"] = float(value)
    mlflow.log_metrics(values, step=step)


def _plain(name: str) -> str:
    """A metric's name as MLflow takes it: ``hit_at_10``."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


class Trackers:
    """What RecBole's trainers tell of metrics, to Weights & Biases and to MLflow.

    Args:
        wandb: RecBole's logger of Weights & Biases.
        log_mlflow: whether MLflow is told, too.
    """

    def __init__(self, wandb: Any, log_mlflow: bool | None) -> None:
        self._wandb = wandb
        self._log_mlflow = bool(log_mlflow)

    def log_metrics(self, metrics: Mapping[str, Any], head: str = "train", commit: bool = True) -> None:
        """Metrics of a step."""
        self._wandb.log_metrics(metrics, head=head, commit=commit)
        if self._log_mlflow:
            log_metrics(metrics, head)

    def log_eval_metrics(self, metrics: Mapping[str, Any], head: str = "eval") -> None:
        """Metrics of the test."""
        self._wandb.log_eval_metrics(metrics, head=head)
        if self._log_mlflow:
            log_metrics(metrics, head)
