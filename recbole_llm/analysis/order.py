"""Does a model use the order of a history? The same test users with their histories, or the training data, in another order.

*Shuffled inference*: a trained model ranks each test user's candidates once more, the history perturbed (LLM-SRec section 2,
LLM-STAR section 1; Klenitskiy et al., "Does It Look Sequential? An Analysis of Datasets for Evaluation of Sequential
Recommendations", RecSys 2024). Items move with all that belongs to them, their title and vector; rank and date stay in place.
*Shuffled training*: the model is trained on sequences in another order (``shuffle_training``, its teacher too) and tested on
the original histories.

A perturbation moves the items that a model reads, the latest ``history_length`` of an LLM: a model that reads ten items gets
the same ten in another order, not others.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.analysis import trained
from recbole_llm.analysis.between import compare_models, format_differences
from recbole_llm.analysis.job import PER_USER, Job, read_columns, stored
from recbole_llm.analysis.tables import decimal, format_columns, p_value, percent
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.perturbation import KINDS, perturb_histories
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, unknown_value
from recbole_llm.evaluation.evaluate import RankingResult, evaluate_ranking
from recbole_llm.evaluation.intervals import DRAWS, compare
from recbole_llm.evaluation.ranking import ALL, is_per_user, per_user, split_metric

ORIGINAL = "original"


@dataclass(frozen=True)
class OrderSettings:
    """What is perturbed, and how.

    Attributes:
        inference: perturbations of the test histories, of ``whole``, ``window``, ``last`` and ``reverse``.
        training: perturbations of the training sequences; a model is trained for each.
        draws: random orders of each test history; a user's values are averaged over them.
        within: only the latest so many items may move; None: those that the model reads.
        bootstrap: draws of the intervals.
    """

    inference: tuple[str, ...] = ("whole",)
    training: tuple[str, ...] = ()
    draws: int = 3
    within: int | None = None
    bootstrap: int = DRAWS

    def __post_init__(self) -> None:
        for key in ("inference", "training"):
            for kind in getattr(self, key):
                if kind not in KINDS:
                    raise UserError(unknown_value(key, kind, KINDS))
        for key in ("draws", "within", "bootstrap"):
            value = getattr(self, key)
            if (value is None and key != "within") or (value is not None and (type(value) is not int or value < 1)):
                raise UserError(f"{key}: {value!r} is no whole number above 0.")


@dataclass(frozen=True)
class Ranked:
    """How a model ranks the test users' candidates.

    Attributes:
        ranking: ranks and metrics.
        top: the best items of each user, best first, int64 ``[users, k]``; -1 where there are fewer.
        other: metrics of the whole run, such as ValidRatio.
    """

    ranking: RankingResult
    top: np.ndarray
    other: dict[str, float]


def perturbed(
    split: TextSequentialDataset, kind: str, seed: int, draw: int = 0, most: int | None = None
) -> tuple[TextSequentialDataset, np.ndarray]:
    """A split whose histories are in another order; users, targets and dates stay.

    Args:
        split: rows with histories.
        kind: of the perturbation, see :func:`recbole_llm.data.perturbation.perturb_histories`.
        seed, draw: what the order follows from, beside the user.
        most: only the latest so many items of a history move.

    Returns:
        the split, and whether a row has another order now, bool ``[rows]``.
    """
    rows, suffix = split.inter_feat, split.config["LIST_SUFFIX"]
    start = int.from_bytes(hashlib.blake2b(f"{kind} {seed} {draw}".encode(), digest_size=6).digest(), "little")
    order, changed = perturb_histories(
        rows[split.iid_field + suffix].numpy(),
        rows[split.item_list_length_field].numpy(),
        rows[split.uid_field].numpy(),
        kind,
        start,
        most=most,
    )
    places = torch.from_numpy(order)
    moved = {}
    for name in rows.columns:
        values = rows[name]
        if name.endswith(suffix) and name != split.time_field + suffix:
            index = places.reshape(*places.shape, *[1] * (values.dim() - 2)).expand_as(values)
            values = values.gather(1, index)
        moved[name] = values
    return split.copy(Interaction(moved)), changed


def rank(model: TrainedModel, split: TextSequentialDataset) -> Ranked:
    """Rank the candidates of a test split's users, and keep each user's best items."""
    config = model.config
    tops: list[Tensor] = []
    most = max(np.atleast_1d(config["topk"]).tolist())

    def score(batch: Interaction, candidates: Tensor | None) -> Tensor:
        scores = model.score(batch, candidates)
        tops.append(_best(scores, candidates, most))
        return scores

    form = getattr(model.model, "form", None)
    if form is not None:
        form.reset()
    ranking = evaluate_ranking(
        score, split, config, "test", progress=config["show_progress"], eval_batch_rows=config["eval_batch_rows"] or 512
    )
    return Ranked(ranking, torch.cat(tops).numpy(), form.metrics() if form is not None else {})


def _best(scores: Tensor, candidates: Tensor | None, most: int) -> Tensor:
    """Ids of the best items of each row, int64 ``[rows, most]``; -1 for a repeat, and where no item has a finite score."""
    if candidates is None:  # the whole catalogue; column 0 is the padding
        values, places = scores[:, 1:].topk(min(most, scores.shape[1] - 1), dim=1)
        items = places.cpu() + 1
    else:
        values, places = torch.sort(scores, dim=1, descending=True, stable=True)
        values, places = values[:, :most], places[:, :most]
        items = candidates.gather(1, places.cpu())
    repeats = (items[:, :, None] == items[:, None, :]).tril(-1).any(dim=2)
    return items.masked_fill(torch.isneginf(values).cpu() | repeats, -1)


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard similarity of two lists of items for each user, ``|A and B| / |A or B|``; 1 where both are empty.

    Args:
        a, b: distinct item ids int64 ``[users, k]``, -1 for nothing.

    Returns:
        float64 ``[users]``.
    """
    common = ((a[:, :, None] == b[:, None, :]) & (a[:, :, None] >= 0)).sum(axis=(1, 2))
    union = (a >= 0).sum(axis=1) + (b >= 0).sum(axis=1) - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


def _values(ranked: Ranked) -> dict[str, np.ndarray]:
    """Each user's value of each metric, float64 ``[users]``."""
    names = [name for name in ranked.ranking.metrics if is_per_user(name)]
    return {name: per_user(ranked.ranking.ranks, *split_metric(name)) for name in names}


def _condition(name: str, original: Ranked, others: Sequence[Ranked], settings: OrderSettings, seed: int) -> tuple[dict, dict]:
    """Compare the original ranking with perturbed ones: the aggregates, and each user's values averaged over them."""
    for other in others:
        if other.ranking.test_set != original.ranking.test_set:
            raise ValueError(f"{name}: the users, targets or candidates are not those of the original")
    base = _values(original)
    means = {metric: np.mean([_values(other)[metric] for other in others], axis=0) for metric in base}
    cutoffs = sorted({split_metric(metric)[1] for metric in base if not metric.endswith(ALL)})
    lists = {
        f"jaccard@{k}": np.mean([jaccard(original.top[:, :k], other.top[:, :k]) for other in others], axis=0) for k in cutoffs
    }
    aggregates = {
        "condition": name,
        "draws": len(others),
        "metrics": {
            metric: compare(base[metric], means[metric], seed=seed, draws=settings.bootstrap) for metric in base
        },
        "jaccard": {metric: float(values.mean()) for metric, values in lists.items()},
        "other": {
            metric: [value, float(np.mean([other.other[metric] for other in others]))]
            for metric, value in original.other.items()
        },
    }
    return aggregates, {**means, **lists}


def inference_sensitivity(
    model: TrainedModel, settings: OrderSettings, original: Ranked | None = None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """Shuffled inference of one trained model.

    Args:
        model: the model.
        settings: what is perturbed.
        original: its ranking of the original histories, where that is known.

    Returns:
        the aggregates of each condition, and each user's values by condition.
    """
    test, seed = model.splits["test"], model.config["seed"]
    original = original or rank(model, test)
    conditions, by_user = [], {}
    for kind in settings.inference:
        others, unchanged = [], 0
        for draw in range(1 if kind == "reverse" else settings.draws):
            split, changed = perturbed(test, kind, seed, draw, settings.within or model.reads)
            unchanged = int((~changed).sum())  # the same in each draw: too short a history, or one of equal items
            others.append(rank(model, split))
        name = f"inference {kind}"
        aggregates, by_user[name] = _condition(name, original, others, settings, seed)
        conditions.append({**aggregates, "unchanged": unchanged})
    return conditions, by_user


def analyze(job: Job, settings: OrderSettings) -> list[dict[str, Any]]:
    """Order sensitivity of each model and seed of a job.

    Models that were trained before are found again; results that were computed before, for the same models, data and
    settings, are read.

    Returns:
        one result per model and seed: ``model``, ``dataset``, ``seed``, ``users`` and ``conditions``, each with ``metrics``
        (see :func:`recbole_llm.evaluation.intervals.compare`), ``jaccard`` (the mean of the users' similarities of the lists of
        the best k), and ``unchanged``: how many histories have no other order. ``against`` has the differences to the models
        before, see :func:`recbole_llm.analysis.between.compare_models`. Each user's values are in ``per_user.tsv`` of the
        result's ``folder``.
    """
    configs = job.configs()
    shuffled = {kind: job.configs(shuffle_training=kind) for kind in settings.training}
    for _, config in configs:
        mode = config["eval_args"]["mode"]
        if "labeled" in (mode.values() if isinstance(mode, dict) else [mode]):
            raise UserError("protocol: yes_no ranks no items that could be compared; use retrieval, full or generation.")
    data, results = SharedData(), []
    for place, (name, config) in enumerate(configs):
        retrained = {kind: pairs[place][1] for kind, pairs in shuffled.items()}
        identities = [trained.identity(name, other, data) for other in (config, *retrained.values())]
        known = [identities, asdict(settings)]
        folder = job.folder("order", name, config, known)

        def compute(name=name, config=config, retrained=retrained):
            return _analyze_model(name, config, retrained, data, job.models, settings)

        results.append(stored(folder, known, compute))
        state = "read from" if results[-1]["read"] else "kept in"
        getLogger().info(f"{name}: order sensitivity {state} {folder}")
        gc.collect()
    between = compare_models(results, ORIGINAL)
    return [{**result, "against": against} for result, against in zip(results, between, strict=True)]


def _analyze_model(name, config, retrained, data, models, settings: OrderSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    model = trained.obtain(name, config, data, models)
    original = rank(model, model.splits["test"])
    conditions, by_user = inference_sensitivity(model, settings, original)
    del model
    for kind, other_config in retrained.items():
        gc.collect()
        other = trained.obtain(name, other_config, data, models)
        condition = f"training {kind}"
        aggregates, by_user[condition] = _condition(
            condition, original, [rank(other, other.splits["test"])], settings, config["seed"]
        )
        conditions.append({**aggregates, "unchanged": None})
        del other
    values = _values(original)
    cutoffs = {metric: np.ones(len(original.top)) for metric in (conditions[0]["jaccard"] if conditions else {})}
    by_user = {ORIGINAL: {**values, **cutoffs}, **by_user}
    users = original.ranking.user_ids
    columns: dict[str, Any] = {
        "model": [name] * len(users) * len(by_user),
        "seed": [config["seed"]] * len(users) * len(by_user),
        "condition": [condition for condition in by_user for _ in users],
        "user": list(users) * len(by_user),
    }
    for metric in by_user[ORIGINAL]:
        columns[metric] = np.concatenate([found[metric] for found in by_user.values()])
    result = {
        "analysis": "order",
        "model": name,
        "dataset": config["dataset"],
        "seed": config["seed"],
        "protocol": config["protocol"],
        "users": len(users),
        "test_set": original.ranking.test_set,
        "metrics": original.ranking.metrics | original.other,
        "settings": asdict(settings),
        "conditions": conditions,
    }
    return result, columns


def per_user_columns(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """The users' values behind a result of :func:`analyze`."""
    return read_columns(Path(result["folder"]) / PER_USER)


def format_results(results: Sequence[dict[str, Any]], metrics: Sequence[str] | None = None) -> str:
    """A table of results, one line per model, condition and metric."""
    lines = []
    for result in results:
        for condition in result["conditions"]:
            for metric, found in condition["metrics"].items():
                if metrics and metric not in metrics:
                    continue
                interval = found["change_interval"]
                lines.append(
                    [
                        result["model"],
                        str(result["seed"]),
                        condition["condition"],
                        metric,
                        decimal(found["original"]),
                        decimal(found["perturbed"]),
                        percent(found["change"]),
                        f"[{percent(interval[0])}, {percent(interval[1])}]" if interval else "-",
                        p_value(found["p_value"]),
                        "-" if metric.endswith(ALL) else decimal(condition["jaccard"][f"jaccard@{split_metric(metric)[1]}"], 2),
                    ]
                )
    if not lines:
        return "No condition was asked for: set --inference or --training."
    first = results[0]
    draws = max((condition["draws"] for result in results for condition in result["conditions"]), default=1)
    head = ["model", "seed", "condition", "metric", "original", "perturbed", "change", "95 % interval", "p", "Jaccard@k"]
    bootstrap = f"{first['settings']['bootstrap']:,}"
    return (
        f"{first['dataset']} · order sensitivity · protocol {first['protocol']} · {first['users']:,} users\n\n"
        + format_columns(head, lines, left=4)
        + f"\n\nperturbed: the mean of up to {draws} draws. Intervals of the change: bootstrap over users, {bootstrap} draws.\n"
        "p: two-sided sign-flip test, paired by user, not corrected for the number of lines.\n"
        "Jaccard: of the lists of the best k items of the original and the perturbed history."
        + format_differences(results)
    )
