"""A key over several values, with several seeds: how much does it matter, beside what a seed does? (LLM-STAR, Figure 4)"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any

import numpy as np
import yaml

from recbole_llm import preflight
from recbole_llm.analysis.job import Job
from recbole_llm.analysis.tables import decimal, format_columns
from recbole_llm.config.schema import parse_value
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.run_model import failure, log_traceback, run_model


@dataclass(frozen=True)
class SweepSettings:
    """What is varied.

    Attributes:
        over: a key and its values, ``beta:0,0.3,0.7``; values are read as those of the command line.
    """

    over: str = ""

    @property
    def key(self) -> str:
        return self._parts[0]

    @property
    def values(self) -> list[Any]:
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, list[Any]]:
        found = re.fullmatch(r"([A-Za-z_]\w*(?::[\w-]+(?=\.))?[\w.]*):(.*)", str(self.over))  # a variant's name has a colon too
        key, text = found.groups() if found else ("", "")
        try:
            values = parse_value(f"[{text}]") if text.strip() else []
        except (yaml.YAMLError, ValueError):
            values = []
        values = [None if value == "None" else value for value in values]
        if not values or any(values.count(value) > 1 for value in values):
            raise UserError(f"over: {self.over!r} names no key with different values; write --over=beta:0,0.3,0.7.")
        return key, values

    def __post_init__(self) -> None:
        _ = self._parts


def analyze(job: Job, settings: SweepSettings) -> list[dict[str, Any]]:
    """Train and test each model with each value and seed. What was trained before is found again, so that a sweep that was
    stopped goes on, and one that is widened trains only what is new.

    Returns:
        one result per model, value and seed: ``key``, ``value``, ``metrics`` of the test, ``checkpoint``; or ``error``, a
        sentence, where a run failed: the others go on.

    Raises:
        UserError: a mistake in the settings or data, told before anything is trained; or no run succeeded.
    """
    key, configs = settings.key, []
    for value in settings.values:
        changed = replace(job, settings={**job.settings, key: value})
        configs += [(name, value, config) for name, config in changed.configs()]
    data, results = SharedData(), []
    preflight.check([config for _, _, config in configs], data)
    for name, value, config in configs:
        result = {
            "analysis": "sweep",
            "model": name,
            "dataset": config["dataset"],
            "seed": config["seed"],
            "key": key,
            "value": value,
        }
        getLogger().info(f"{name}: {key} = {value}, seed {config['seed']}")
        try:
            row = run_model(config, data, job.models)[0]
            result |= {"metrics": dict(row["metrics"]), "valid_metric": row["valid_metric"], "checkpoint": row["checkpoint"]}
        except Exception as error:
            log_traceback(error, config)
            result["error"] = failure(error)
        results.append(result)
        gc.collect()
    if all("error" in result for result in results):
        raise UserError(f"no run of the sweep succeeded; {results[0]['model']}: {results[0]['error']}")
    return results


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds of each model and value together: ``seeds``, and by metric ``mean``, ``low``, ``high`` (lowest and highest
    seed) and ``deviation`` (standard deviation over the seeds; None for one seed)."""
    lines: list[dict[str, Any]] = []
    for result in results:
        if "error" in result:
            continue
        line = next((line for line in lines if (line["model"], line["value"]) == (result["model"], result["value"])), None)
        if line is None:
            line = {"model": result["model"], "value": result["value"], "runs": []}
            lines.append(line)
        line["runs"].append(result["metrics"])
    for line in lines:
        runs = line.pop("runs")
        line["seeds"], line["metrics"] = len(runs), {}
        for metric in runs[0]:
            values = np.array([found[metric] for found in runs if metric in found], dtype=np.float64)
            line["metrics"][metric] = {
                "mean": float(values.mean()),
                "low": float(values.min()),
                "high": float(values.max()),
                "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
            }
    return lines


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line per model and value."""
    lines = summarize(results)
    metrics = list(lines[0]["metrics"])
    rows = []
    for line in lines:
        cells = []
        for metric in metrics:
            found = line["metrics"].get(metric)
            spread = "" if found is None or found["deviation"] is None else f" ± {decimal(found['deviation'])}"
            cells.append(decimal(found["mean"]) + spread if found else "-")
        rows.append([line["model"], str(line["value"]), str(line["seeds"]), *cells])
    first = results[0]
    failed = [
        f"\n{result['model']}, {result['key']} = {result['value']}, seed {result['seed']} FAILED: {result['error']}"
        for result in results
        if "error" in result
    ]
    return (
        f"{first['dataset']} · sweep over {first['key']}\n\n"
        + format_columns(["model", first["key"], "seeds", *metrics], rows, left=2)
        + ("\n\n±: standard deviation over the seeds." if any(line["seeds"] > 1 for line in lines) else "")
        + "".join(failed)
    )
