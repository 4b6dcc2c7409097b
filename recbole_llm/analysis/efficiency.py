"""What training and inference cost (LLM-SRec, Table 9)."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.order import rank
from recbole_llm.analysis.tables import decimal, format_columns
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.shared import SharedData


def measure(model: TrainedModel) -> dict[str, Any]:
    """Time and memory of a trained model: training as its record says, inference as it is now.

    Returns:
        ``train_minutes``, ``epochs`` (None where the record holds no validations: a stock model) and ``minutes_per_epoch``;
        ``users_per_second`` and, for an LLM, ``tokens_per_second`` of ranking all test users; ``trained_parameters``;
        ``peak_memory_gb`` of the process (on a GPU: of the GPU).
    """
    device = torch.device(model.config["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    encoder = getattr(model.model, "encoder", None)
    before, started = encoder.counts.tokens if encoder else 0, time.perf_counter()
    ranked = rank(model, model.splits["test"])
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:  # kilobytes on Linux, bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    epochs = max((entry["epoch"] for entry in model.record.get("validations") or []), default=None)
    minutes = model.record["train_seconds"] / 60
    if model.run is None:
        parameters = model.model.trained_parameters().values()
    else:
        parameters = model.model.parameters()
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "users": len(ranked.top),
        "train_minutes": minutes,
        "epochs": epochs,
        "minutes_per_epoch": minutes / epochs if epochs else None,
        "inference_seconds": seconds,
        "users_per_second": len(ranked.top) / seconds,
        "tokens_per_second": (encoder.counts.tokens - before) / seconds if encoder else None,
        "trained_parameters": int(np.sum([parameter.numel() for parameter in parameters])),
        "peak_memory_gb": peak / 1e9,
    }


def analyze(job: Job) -> list[dict[str, Any]]:
    """Costs of each model and seed of a job; what was measured before is read."""
    data, results = SharedData(), []
    for name, config in job.configs():
        known = [trained.identity(name, config, data), str(config["device"])]
        head = {"analysis": "efficiency", "model": name, "dataset": config["dataset"], "seed": config["seed"]}

        def compute(name=name, config=config, head=head):
            return head | measure(trained.obtain(name, config, data, job.models)), None

        results.append(stored(job.folder("efficiency", name, config, known), known, compute))
        gc.collect()
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line per model and seed."""
    lines = [
        [
            result["model"],
            str(result["seed"]),
            decimal(result["train_minutes"], 2),
            decimal(result["minutes_per_epoch"], 2),
            f"{result['users_per_second']:,.0f}",
            f"{result['tokens_per_second']:,.0f}" if result["tokens_per_second"] else "-",
            f"{result['trained_parameters']:,}",
            decimal(result["peak_memory_gb"], 2),
        ]
        for result in results
    ]
    header = ["model", "seed", "train min", "min / epoch", "users/s", "tokens/s", "trained parameters", "peak GB"]
    first = results[0]
    return (
        f"{first['dataset']} · efficiency · {first['device']}, {first['threads']} threads, {first['users']:,} test users\n\n"
        + format_columns(header, lines, left=2)
        + "\n\npeak GB: of the whole process so far, all models before included (on a GPU: of this model's inference)."
    )
