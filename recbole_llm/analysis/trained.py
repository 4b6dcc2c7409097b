"""A trained model for an analysis: found where it was trained before, else trained now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recbole.config import Config
from torch import nn

from recbole_llm import checkpoint
from recbole_llm.backbone.load import fetch_backbone
from recbole_llm.config.identity import deciding_settings
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.shared import SharedData
from recbole_llm.evaluation.evaluate import ScoreRows
from recbole_llm.evaluation.stock_scores import stock_scores
from recbole_llm.loading import load_data_and_model
from recbole_llm.preflight import reads_llm
from recbole_llm.registry import is_ours
from recbole_llm.run_model import run_model
from recbole_llm.teacher import stock


@dataclass
class TrainedModel:
    """A trained model with what an analysis asks of it.

    Attributes:
        name: as it was asked for.
        config: its configuration.
        splits: ``train``, ``valid`` and ``test``.
        model: in evaluation mode.
        score: scores rows, as :func:`recbole_llm.evaluation.evaluate.evaluate_ranking` takes it.
        reads: how many items of a history it reads, the latest ones.
        run: the stock model's run; None for a model of ours.
        record: of its checkpoint.
    """

    name: str
    config: Config
    splits: dict[str, TextSequentialDataset]
    model: nn.Module
    score: ScoreRows
    reads: int
    run: stock.StockRun | None
    record: dict[str, Any]


def identity(name: str, config: Config, data: SharedData) -> dict[str, Any]:
    """What tells a trained model from others, known before it is trained; for JSON."""
    train, settings = data.splits(config)["train"], deciding_settings(config)
    if is_ours(config["model"]):
        llm = {"llm": fetch_backbone(config)} if reads_llm(config) else {}
        fingerprint, settings = train.text_fingerprint, {**settings, **llm}
    else:
        fingerprint, settings = train.column_fingerprint, {**settings, "training": config["teacher_training"] or "prefix"}
    return {
        "model": name,
        "dataset": config["dataset"],
        "seed": config["seed"],
        "data": fingerprint,
        "protocol": {key: config[key] for key in ("eval_args", "candidate_sampling", "metrics", "topk")},
        "settings": settings,
    }


def obtain(name: str, config: Config, data: SharedData, models: Sequence[str] = ()) -> TrainedModel:
    """Load the model of ``config``, training it first where that has not been done.

    Args:
        name: what the model is called in the analysis.
        config: from :func:`recbole_llm.configure.configure`.
        data: builds the dataset.
        models: all models of the analysis.
    """
    splits = data.splits(config)
    if not is_ours(config["model"]):
        run = stock.train_or_load(config, splits, config["teacher_training"] or "prefix")
        reads = config["MAX_ITEM_LIST_LENGTH"]
        record = checkpoint.read_record(run.folder)
        return TrainedModel(name, config, splits, run.model, stock_scores(run.model), reads, run, record)
    folder = run_model(config, data, models)[0]["checkpoint"]  # a finished one is read
    config, model, train, *_ = load_data_and_model(folder)
    reads = min(config["history_length"], config["MAX_ITEM_LIST_LENGTH"])
    record = checkpoint.read_record(folder)
    return TrainedModel(name, config, train.splits, model, model.score, reads, None, record)
