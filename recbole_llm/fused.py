"""Rows of a comparison that are two of its models as one; :mod:`recbole_llm.evaluation.fusion` says how."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_llm.config.settings import model_of
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, printable, sentence_for
from recbole_llm.evaluation.evaluate import ScoreRows
from recbole_llm.evaluation.fusion import Fusion, PartScores, fuse_parts, parts_of, score_part
from recbole_llm.evaluation.protocols import EvaluationSettings
from recbole_llm.lock import held
from recbole_llm.recommender.form import form_of
from recbole_llm.registry import is_ours
from recbole_llm.results import log
from recbole_llm.results.describe import command, git_state, now, versions
from recbole_llm.results.run import row_of, write_run

KeepScores = Callable[[ScoreRows], None]


def check_parts(label: str, models: Sequence[str]) -> None:
    """Check the name of a fused row.

    Args:
        label: such as ``SASRec+LLMSRec:b``.
        models: labels of the models that are trained.

    Raises:
        UserError: it does not name two different models of the run.
    """
    parts = parts_of(label)
    missing = next((part for part in parts if part not in models), None)
    if missing is not None:
        raise UserError(
            f"model: {label} adds up scores of {missing or 'a model without a name'}, which is no model of this run; name it "
            f"too: --model={','.join(dict.fromkeys([*models, *filter(None, parts)]))},{label}."
        )
    if len(parts) != 2 or parts[0] == parts[1]:
        raise UserError(f"model: {label} must name two different models, such as SASRec+LLMSTAR.")


def check_ranked(label: str, configs: Sequence[Config]) -> None:
    """Check that the models of a fused row score candidates.

    Raises:
        UserError: labels are judged, or a model generates its answer.
    """
    for config in configs:
        if EvaluationSettings.of_config(config).mode("test") == "labeled":
            raise UserError(f"model: {label} adds up scores of candidates, and protocol {config['protocol']} judges labels.")
        if form_of(config)[0] == "generation":
            raise UserError(f"model: {label} adds up scores of candidates, and {config['model']} generates its answer.")


class Fusions:
    """Makes the fused rows of a comparison, each as soon as both its models are done.

    Args:
        labels: of the fused rows.
        configs: of the models, by seed and label.
        data: of the comparison.
    """

    def __init__(self, labels: Sequence[str], configs: Mapping[tuple[int | None, str], Config], data: SharedData) -> None:
        self._labels, self._configs, self._data = labels, configs, data
        self._scores: dict[tuple[int | None, str], PartScores] = {}
        self._seconds: dict[tuple[int | None, str], float] = {}
        self._done: set[tuple[int | None, str]] = set()

    def keeper(self, seed: int | None, name: str) -> KeepScores | None:
        """What a trained model is to be given to: a function that keeps its scores; None where no fused row needs them."""
        label = next((label for label in self._labels if name in parts_of(label)), None)
        if label is None:
            return None

        def keep(score_rows: ScoreRows) -> None:
            started = time.perf_counter()
            splits = self._data.splits(self._configs[seed, name])
            self._scores[seed, name] = score_part(score_rows, splits, self._judged_by(seed, name))
            self._seconds[seed, name] = time.perf_counter() - started

        return keep

    def done_after(self, seed: int | None, name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The fused rows that can be made once ``name`` is done; ``rows`` are those of the models."""
        made = []
        for label in self._labels:
            parts = parts_of(label)
            if name not in parts or (seed, label) in self._done:
                continue
            real = self._configs[seed, name]["seed"]
            found = [next((row for row in rows if (row["model"], row["seed"]) == (part, real)), None) for part in parts]
            if None in found:
                continue
            self._done.add((seed, label))
            made.append(self._row(seed, label, [row for row in found if row is not None]))
        return made

    def _judged_by(self, seed: int | None, name: str) -> Config:
        """The configuration by which all models of one seed are judged here: that of the first LLM recommender in a fused row,
        whose validation takes fewer users than a baseline's, else that of the first model."""
        parts = dict.fromkeys(part for label in self._labels for part in parts_of(label))
        chosen = next((part for part in parts if is_ours(model_of(part))), next(iter(parts), name))
        return self._configs[seed, chosen]

    def _row(self, seed: int | None, label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        parts = parts_of(label)
        config = self._judged_by(seed, parts[0])
        failed = {"model": label, "dataset": config["dataset"], "seed": config["seed"]}
        if any("error" in row for row in rows):
            return {**failed, "error": f"{next(row['model'] for row in rows if 'error' in row)} failed."}
        try:
            splits = self._data.splits(config)
            fusion = fuse_parts(*(self._scores[seed, part] for part in parts), splits, config)
            row = _keep(label, fusion, rows, sum(self._seconds[seed, part] for part in parts), Path(config["checkpoint_dir"]))
        except UserError as error:
            return {**failed, "error": printable(sentence_for(error) or str(error), None)}
        getLogger().info(f"{label} (weight {fusion.weight} of {parts[1]}) test result: {log.decimals(row['metrics'])}")
        return row


def _keep(
    label: str, fusion: Fusion, rows: Sequence[Mapping[str, Any]], seconds: float, checkpoints: Path
) -> dict[str, Any]:
    """Write the run of a fused row, and return its row. Its training is that of both models."""
    parts, records = parts_of(label), [row["record"] for row in rows]
    weights = dict(zip(parts, (round(1 - fusion.weight, 1), fusion.weight), strict=True))
    base = next((record for record in records if record["backbone"]), records[0])
    shared = {key: value for key, value in records[0]["settings"].items() if records[1]["settings"].get(key) == value}
    own = {"fusion_weights": weights, "fusion_runs": [row["checkpoint"] for row in rows]}
    for_evaluation = {key: base["settings"].get(key) for key in ("metrics", "topk", "eval_args")}
    record = {
        **base,
        "model": label,
        "settings": {**shared, **for_evaluation, **own},
        "changed": own,
        "command": command(),
        "versions": versions(),
        "git": git_state(),
        "finished": now(),
        "seconds": {
            "train": sum(record["seconds"].get("train") or 0.0 for record in records),
            "evaluate": sum(record["seconds"].get("evaluate") or 0.0 for record in records) + seconds,
        },
        "trained_parameters": sum(record["trained_parameters"] or 0 for record in records),
        "test_set": fusion.test.test_set,
        "users": len(fusion.test.rows),
        "metrics": {"valid": fusion.valid, "test": dict(fusion.test.metrics)},
    }
    digest = hashlib.sha256("\0".join(Path(row["checkpoint"]).name for row in rows).encode()).hexdigest()[:10]
    name = label.replace(":", "-")  # no file name on Windows has a colon
    folder = checkpoints / f"{name}-{base['dataset']}-seed{base['seed']}-{digest}"
    with held(folder):
        written = write_run(folder, record, [], fusion.test.user_ids, ranks=fusion.test.ranks)
    row = {**row_of(written.record), "metrics": dict(fusion.test.metrics), "checkpoint": str(folder)}
    return {**row, "user_ids": fusion.test.user_ids, "ranks": fusion.test.ranks}
