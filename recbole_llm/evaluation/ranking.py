"""Ranks of targets, ties broken at random, and the metrics that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from recbole.evaluator.register import metrics_dict
from torch import Tensor

from recbole_llm.errors import UserError, unknown_value
from recbole_llm.evaluation.randomness import CHUNK_ELEMENTS, row_key, uniform

logger = logging.getLogger(__name__)

ALL = "@all"  # ends the name of a metric without a cut-off, ``MRR@all``

# With one target per row each of RecBole's top-k metrics is a function of the target's rank r, and 0 beyond k:
# the ideal DCG is 1, average precision is the precision at the target's place, and recall is a hit.
METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "ndcg": lambda ranks, k: 1.0 / np.log2(ranks + 1.0),
    "hit": lambda ranks, k: np.ones(ranks.shape),
    "mrr": lambda ranks, k: 1.0 / ranks,
    "recall": lambda ranks, k: np.ones(ranks.shape),
    "precision": lambda ranks, k: np.full(ranks.shape, 1.0 / k),
    "map": lambda ranks, k: 1.0 / ranks,
}
WITHOUT_CUT = "mrr" + ALL
_NO_CUT = 2**62



def rank_of_target(
    scores: Tensor | np.ndarray,
    seed: int,
    positions: np.ndarray | None = None,
    counted: Tensor | None = None,
) -> np.ndarray:
    """Rank the target among its candidates, from 1 = best.

    The rank is 1 + the number of candidates with a strictly higher score + a uniformly random share of those with the
    same score. A row that holds a NaN ranks last, with a warning. A row of -inf alone ranks last too: in generation, the
    LLM named none of the candidates.

    Args:
        scores: ``[rows, C]``, column 0 = the target.
        seed: of the tie draws.
        positions: ``[rows]`` integers that name the rows for the tie draw (the same for every model); default 0, 1, ...
        counted: ``[rows, C]`` bool, False where a column is left out (a repeat of another); default all True.

    Returns:
        ``[rows]`` int64 in 1 .. C.
    """
    scores = torch.as_tensor(scores)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [rows, candidates], not {tuple(scores.shape)}")
    target = scores[:, :1]
    counted = torch.ones_like(scores, dtype=torch.bool) if counted is None else counted.to(scores.device)
    better = ((scores > target) & counted).sum(dim=1)
    equal = ((scores == target) & counted)[:, 1:].sum(dim=1)
    invalid = torch.isnan(scores).any(dim=1)
    last = counted[:, 1:].sum(dim=1) + 1
    unanswered = torch.isneginf(scores).all(dim=1)
    better, equal = better.where(~unanswered, last - 1), equal.where(~unanswered, 0)
    return _break_ties(better, equal, invalid, last, seed, positions)


def rank_in_catalogue(
    scores: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    seed: int,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Rank the target among all items, as :func:`rank_of_target` does; the padding id 0 is left out.

    Args:
        scores: ``[rows, n_items]``, column = internal item id.
        targets: ``[rows]`` internal item ids.
        seed: of the tie draws.
        positions: ``[rows]`` integers that name the rows for the tie draw; default 0, 1, ...

    Returns:
        ``[rows]`` int64 in 1 .. n_items - 1.
    """
    scores = torch.as_tensor(scores)
    targets = torch.as_tensor(targets).to(device=scores.device, dtype=torch.int64)
    if scores.ndim != 2 or len(scores) != len(targets):
        raise ValueError(f"scores {tuple(scores.shape)} do not fit {len(targets)} targets")
    parts = []
    step = max(1, CHUNK_ELEMENTS // scores.shape[1])
    for start in range(0, len(scores), step):
        part = scores[start : start + step, 1:]
        target = part.gather(1, targets[start : start + step, None] - 1)
        parts.append(((part > target).sum(1), (part == target).sum(1) - 1, torch.isnan(part).any(1)))
    if not parts:
        return np.empty(0, dtype=np.int64)
    better, equal, invalid = (torch.cat(column) for column in zip(*parts, strict=True))
    return rank_from_counts(better, equal.masked_fill(invalid, -1), scores.shape[1] - 1, seed, positions)


def rank_from_counts(
    greater: Tensor, equal: Tensor, items: int, seed: int, positions: np.ndarray | None = None
) -> np.ndarray:
    """Rank the target among all items, as :func:`rank_in_catalogue` does, where its scores were counted and not stored.

    Args:
        greater: ``[rows]`` int64, how many items score higher than the target.
        equal: ``[rows]`` int64, how many others score the same; -1 where a score of the row is NaN.
        items: how many items there are, without the padding.
        seed: of the tie draws.
        positions: ``[rows]`` integers that name the rows for the tie draw; default 0, 1, ...

    Returns:
        ``[rows]`` int64 in 1 .. items.
    """
    return _break_ties(greater, equal, equal < 0, torch.full_like(greater, items), seed, positions)


def _break_ties(
    better: Tensor, equal: Tensor, invalid: Tensor, last: Tensor, seed: int, positions: np.ndarray | None
) -> np.ndarray:
    greater, same, wrong, worst = (tensor.cpu().numpy() for tensor in (better, equal, invalid, last))
    positions = np.arange(len(greater)) if positions is None else np.asarray(positions)
    share = uniform(row_key("ties", seed, positions))
    ranks = 1 + greater + np.floor(share * (same + 1)).astype(np.int64)
    if wrong.any():
        logger.warning("%d of %d rows have scores that are NaN; they rank last.", wrong.sum(), len(wrong))
        ranks = np.where(wrong, worst, ranks)
    return ranks.astype(np.int64)


def per_user(ranks: np.ndarray, metric: str, k: int) -> np.ndarray:
    """Return the value of a metric for each row.

    Args:
        ranks: ``[rows]`` from 1.
        metric: ndcg, hit, mrr, recall, precision or map, in any case.
        k: cut-off: a target below rank k counts 0.

    Returns:
        ``[rows]`` float64.

    Raises:
        UserError: a metric that needs more than the target's rank.
    """
    name = metric.lower()
    if name not in METRICS:
        supported = ", ".join(METRICS)
        if name in metrics_dict:
            raise UserError(
                f"metrics: '{metric}' needs more than the rank of the target and is not computed here; use {supported}."
            )
        raise UserError(unknown_value("metrics", metric, METRICS))
    if k < 1:
        raise UserError(f"topk: {k} is not a cut-off; use integers from 1.")
    ranks = np.asarray(ranks)
    return np.where(ranks <= k, METRICS[name](ranks, k), 0.0)


def metrics_from_ranks(
    ranks: np.ndarray, metrics: Sequence[str], topk: Sequence[int], decimals: int | None = None
) -> dict[str, float]:
    """Average each metric over the rows, under RecBole's names: ``{"ndcg@10": ..., "hit@10": ...}``.

    Args:
        ranks: ``[rows]`` from 1, at least one row.
        metrics: names, in any case; the order is kept.
        topk: cut-offs.
        decimals: round to so many places (RecBole's ``metric_decimal_place``); None keeps the values whole.
    """
    if len(ranks) == 0:
        raise ValueError("metrics need at least one row")
    values = {}
    for metric in metrics:
        if metric.lower() == WITHOUT_CUT:
            mean = float(per_user(ranks, "mrr", _NO_CUT).mean())
            values[WITHOUT_CUT] = mean if decimals is None else round(mean, decimals)
            continue
        for k in topk:
            mean = float(per_user(ranks, metric, k).mean())
            values[f"{metric.lower()}@{k}"] = mean if decimals is None else round(mean, decimals)
    return values


def split_metric(name: str) -> tuple[str, int]:
    """Split ``NDCG@10`` into ``("ndcg", 10)``; ``MRR@all`` has a cut-off beyond every rank.

    Raises:
        UserError: a name without a cut-off.
    """
    metric, _, k = name.partition("@")
    if name.lower() == WITHOUT_CUT:
        return metric.lower(), _NO_CUT
    if not k.isascii() or not k.isdigit():
        raise UserError(f"'{name}' is not a metric with a cut-off; write it as ndcg@10.")
    return metric.lower(), int(k)


def is_per_user(name: str) -> bool:
    """Whether a reported figure is a mean of users' values (``ndcg@10``), not one of the whole run (``validratio``)."""
    return name.partition("@")[0].lower() in METRICS
