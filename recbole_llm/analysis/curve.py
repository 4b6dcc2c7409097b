"""Validation figures in the course of a training, from the records of checkpoints (LLM-SRec, Figure 7)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job
from recbole_llm.analysis.tables import decimal, format_columns
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.registry import is_ours


def analyze(job: Job) -> list[dict[str, Any]]:
    """The validations of each LLM and seed of a job, in order: ``step``, ``epoch`` and metrics each.

    Raises:
        UserError: no model of this library; RecBole's own keep no log of their validations.
    """
    configs = [(name, config) for name, config in job.configs() if is_ours(config["model"])]
    if not configs:
        raise UserError("analyze curve: name a model of this library, such as LLMSRec; RecBole's own models keep no log.")
    data, results = SharedData(), []
    for name, config in configs:
        record = trained.obtain(name, config, data, job.models).record
        results.append(
            {
                "analysis": "curve",
                "model": name,
                "dataset": config["dataset"],
                "seed": config["seed"],
                "best_step": record["best_step"],
                "validations": record["validations"],
            }
        )
        gc.collect()
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line per validation."""
    metrics = [name for name in results[0]["validations"][0] if "@" in name] if results[0]["validations"] else []
    lines = [
        [
            result["model"],
            str(result["seed"]),
            f"{entry['epoch']:.2f}",
            *(decimal(entry.get(name)) for name in metrics),
            "best" if entry["step"] == result["best_step"] else "",
        ]
        for result in results
        for entry in result["validations"]
    ]
    table = format_columns(["model", "seed", "epoch", *metrics, ""], lines, left=2)
    return f"{results[0]['dataset']} · learning curve\n\n{table}"
