"""Does one model use order more than another? The difference of two models' changes in another order, paired by user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.analysis.job import PER_USER, read_columns
from recbole_llm.analysis.tables import format_columns, percent
from recbole_llm.evaluation.intervals import DRAWS, bootstrap_means


def change_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], seed: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """The change ratio of the first model less that of the second; below 0, the first one loses the larger share.

    Args:
        first, second: a metric's values from original and perturbed histories, float64 ``[users]`` each, of the same users.
        seed, draws: of the bootstrap.

    Returns:
        ``difference`` and ``interval``, 95 %, users drawn together for both models; both None where a model's original
        value is 0, which has no change ratio.
    """
    values = np.stack([np.asarray(column, np.float64) for column in (*first, *second)], axis=1)
    base = values.mean(axis=0)
    if base[0] <= 0 or base[2] <= 0:
        return {"difference": None, "interval": None}
    means = bootstrap_means(values, seed, draws)
    means = means[(means[:, 0] > 0) & (means[:, 2] > 0)]
    low, high = np.percentile(means[:, 1] / means[:, 0] - means[:, 3] / means[:, 2], [2.5, 97.5])
    return {"difference": float(base[1] / base[0] - base[3] / base[2]), "interval": [float(low), float(high)]}


def compare_models(results: Sequence[Mapping[str, Any]], original: str) -> list[list[dict[str, Any]]]:
    """Compare each result of an order analysis with those before it that have its seed, users, targets and candidates.

    Args:
        results: of :func:`recbole_llm.analysis.order.analyze`, with the folders of their results by user.
        original: the name of the condition of unchanged order.

    Returns:
        for each result a list of ``against`` (the earlier model), ``condition``, ``metric`` (the first one), ``difference``
        and ``interval``, see :func:`change_difference`.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in results]
    columns = [read_columns(Path(result["folder"]) / PER_USER) for result in results] if len(results) > 1 else []
    for earlier, later in combinations(range(len(results)), 2):
        one, other = results[later], results[earlier]
        if one["seed"] != other["seed"] or one["test_set"] != other["test_set"] or not one["conditions"]:
            continue
        metric = next(iter(one["conditions"][0]["metrics"]))
        for condition in [condition["condition"] for condition in one["conditions"]]:
            values = [
                tuple(_by_user(columns[place], name, metric) for name in (original, condition)) for place in (later, earlier)
            ]
            draws = one["settings"]["bootstrap"]
            compared = change_difference(values[0], values[1], one["seed"], draws)  # type: ignore[arg-type]
            found[later].append({"against": other["model"], "condition": condition, "metric": metric, **compared})
    return found


def _by_user(columns: Mapping[str, np.ndarray], condition: str, metric: str) -> np.ndarray:
    """A metric's values in one condition, in the order of the users' names."""
    rows = np.flatnonzero(columns["condition"] == condition)
    return columns[metric][rows[np.argsort(columns["user"][rows], kind="stable")]]


def format_differences(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of the differences between models, one line per pair and condition; empty where there are none."""
    lines = []
    for result in results:
        for entry in result["against"]:
            interval = entry["interval"]
            bounds = f"[{percent(interval[0])}, {percent(interval[1])}]" if interval else "-"
            pair = [result["model"], entry["against"], str(result["seed"]), entry["condition"], entry["metric"]]
            lines.append([*pair, percent(entry["difference"]), bounds])
    if not lines:
        return ""
    head = ["model", "against", "seed", "condition", "metric", "difference", "95 % interval"]
    return (
        "\n\nDifferences between models: the change of the first less that of the second; below 0, the first loses more.\n\n"
        + format_columns(head, lines, left=5)
    )
