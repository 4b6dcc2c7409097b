r"""Ranking evaluation: the same candidates, the same ties and the same users for every model that is compared.

A row of a validation or test split holds a user's history and the item that came next, the target. A model scores the
target among other items, and all metrics follow from the target's rank among them.

Three properties make the results of two models comparable user by user, so that they can be tested in pairs:

* the candidates of a row depend on the data, the seed, the phase, the user and their number alone (:func:`draw_candidates`),
  not on a global random state: evaluating a model earlier or more often changes nothing;
* a tie between the target and other items is broken by a random draw that depends on the row and not on the model
  (:func:`rank_of_target`): a model that scores everything the same gets the chance level, neither 0 nor 1;
* the test of a difference pairs the users (:func:`paired_test`).

RecBole's own ``uniN`` for sequential models excludes only the target: the user's history can be among the negatives,
an item can be drawn twice, and each evaluation draws anew. ``candidate_sampling: recbole`` keeps those candidates,
but drawn once; the default, ``non_interacted``, draws distinct items that the user never interacted with.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.register import metrics_dict
from torch import Tensor
from tqdm import tqdm

from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import draw_candidates, row_names
from recbole_llm.evaluation.candidates_file import sets_of_test
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode
from recbole_llm.evaluation.randomness import row_key
from recbole_llm.evaluation.ranking import metrics_from_ranks, rank_from_counts, rank_in_catalogue, rank_of_target

logger = logging.getLogger(__name__)

ScoreRows = Callable[[Interaction, "Tensor | None"], Tensor]
RankTargets = Callable[[Interaction, Tensor], tuple[Tensor, Tensor]]
PredictRows = Callable[[Interaction], Tensor]


@dataclass(frozen=True)
class RankingResult:
    """Result of ranking the targets.

    Attributes:
        user_ids: ``[n]`` the users' own ids (external tokens).
        rows: ``[n]`` int64 row of the split.
        ranks: ``[n]`` int64 rank of the target, from 1.
        metrics: the averages, by RecBole's names.
        seconds: wall time.
        test_set: digest of users, targets and candidates; results are only paired where it is equal.
    """

    user_ids: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray
    metrics: dict[str, float]
    seconds: float
    test_set: str


@dataclass(frozen=True)
class LabelResult:
    """Result of predicting labels.

    Attributes:
        user_ids: ``[n]`` the users' own ids (external tokens).
        rows: ``[n]`` int64 row of the split.
        labels: ``[n]`` int64, 1 where the user liked the row's item.
        values: ``[n]`` float64, what the model predicted: higher means likelier to be liked.
        metrics: by RecBole's names.
        seconds: wall time.
        test_set: digest of users, items and labels; results are only paired where it is equal.
    """

    user_ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    metrics: dict[str, float]
    seconds: float
    test_set: str


def evaluate(
    score_rows: ScoreRows,
    predict_rows: PredictRows,
    split: Any,
    config: Any,
    phase: str,
    rows: np.ndarray | None = None,
    *,
    probabilities: bool = False,
    progress: bool = False,
    eval_batch_rows: int = 256,
    pool: int | None = None,
    rank_targets: RankTargets | None = None,
) -> RankingResult | LabelResult:
    """Evaluate a model as ``eval_args: mode`` says: :func:`evaluate_labels` where it is ``labeled``, else
    :func:`evaluate_ranking`; the arguments are theirs."""
    options: dict[str, Any] = {"progress": progress, "eval_batch_rows": eval_batch_rows}
    if EvaluationSettings.of_config(config).mode(phase) == "labeled":
        return evaluate_labels(predict_rows, split, config, phase, rows, probabilities=probabilities, **options)
    return evaluate_ranking(score_rows, split, config, phase, rows, pool=pool, rank_targets=rank_targets, **options)


def evaluate_labels(
    predict_rows: PredictRows,
    split: Any,
    config: Any,
    phase: str,
    rows: np.ndarray | None = None,
    *,
    probabilities: bool = False,
    progress: bool = False,
    eval_batch_rows: int = 256,
) -> LabelResult:
    """Compare what a model predicts of each row's own item with the user's rating of it (TALLRec's protocol).

    Args:
        predict_rows: called with an Interaction of B rows, the item among the fields and its rating not, and returns
            ``[B]`` values; RecBole's ``predict``.
        split: the validation or test split, with ratings.
        config: ``metrics`` (RecBole's value metrics), ``like_threshold`` and ``RATING_FIELD`` are read.
        phase: ``valid`` or ``test``, for messages.
        rows: ``[n]`` rows to evaluate, from :func:`sample_rows`; None for all.
        probabilities: whether the values are probabilities. Where they are not, the AUC, which asks for an order
            alone, is measured, and the other metrics are left out.
        progress: show a progress bar.
        eval_batch_rows: rows per call of ``predict_rows``; a matter of memory and speed only.

    Raises:
        UserError: all rows have the same label, or a value is NaN.
    """
    started = time.perf_counter()
    settings = EvaluationSettings.of_config(config)
    rows = np.arange(len(split.inter_feat)) if rows is None else np.asarray(rows, dtype=np.int64)
    rating, threshold = settings.rating_field, settings.like_threshold
    labels = (split.inter_feat[rating].numpy()[rows] > threshold).astype(np.int64)
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"like_threshold: of the {len(rows)} {phase} items {labels.sum()} are rated above {threshold}, "
            f"and the AUC needs both kinds; choose another threshold, or more valid_users."
        )
    values = []
    with torch.no_grad(), tqdm(total=len(rows), desc=f"Evaluate ({phase})", unit="row", ncols=100, disable=not progress) as bar:
        for start in range(0, len(rows), eval_batch_rows):
            batch = split.inter_feat[rows[start : start + eval_batch_rows]]
            batch = split.join(Interaction({field: batch[field] for field in batch.columns if field != rating}))
            values.append(predict_rows(batch).cpu().double().numpy().reshape(-1))
            bar.update(len(batch))
    values = np.concatenate(values)
    if np.isnan(values).any():
        raise UserError(f"{np.isnan(values).sum()} of the {len(rows)} {phase} predictions are NaN: lower learning_rate.")
    measured = [name for name in settings.metrics if probabilities or name.lower() == "auc"]
    users = split.id2token(split.uid_field, split.inter_feat[split.uid_field].numpy()[rows])
    return LabelResult(
        user_ids=np.asarray(users),
        rows=rows,
        labels=labels,
        values=values,
        metrics={name.lower(): float(metrics_dict[name.lower()](config).metric_info(values, labels)) for name in measured},
        seconds=time.perf_counter() - started,
        test_set=_digest(users, split.inter_feat[split.iid_field][rows], labels),
    )


def evaluate_ranking(
    score_rows: ScoreRows,
    split: Any,
    config: Any,
    phase: str,
    rows: np.ndarray | None = None,
    *,
    progress: bool = False,
    eval_batch_rows: int = 256,
    pool: int | None = None,
    rank_targets: RankTargets | None = None,
) -> RankingResult:
    """Rank the target of each row and average the metrics of the configuration.

    Args:
        score_rows: called with an Interaction of B rows and their candidates, ``[B, C]`` int64 internal ids with the
            target in column 0, and returns ``[B, C]`` scores; under ``mode: full`` called with None, and returns
            ``[B, n_items]``. The target's id and attributes are not in the Interaction. Under ``full`` a user's history
            stays among the items that are ranked: RecBole does not mask it either for sequential models.
        split: the validation or test split.
        config: ``eval_args``, ``metrics``, ``topk``, ``seed`` and ``candidate_sampling`` are read.
        phase: ``valid`` or ``test``.
        rows: ``[n]`` rows to evaluate, from :func:`sample_rows`; None for all.
        progress: show a progress bar.
        eval_batch_rows: rows per call of ``score_rows``; a matter of memory and speed only.
        pool: see :func:`draw_candidates`.
        rank_targets: called under ``mode: full`` in the place of ``score_rows``, so that no ``[B, n_items]`` scores need to
            exist, with an Interaction of B rows and their targets, ``[B]`` int64 internal ids. Returns, int64 ``[B]`` each,
            how many items (padding aside) score higher than the target, and how many others the same, or -1 where a
            score is NaN: :func:`recbole_llm.loss.softmax.target_counts` of the item head's rows, which are ids less 1.

    Raises:
        UserError: a mode or metric that is not supported, or too few items for the candidates.
    """
    started = time.perf_counter()
    settings = EvaluationSettings.of_config(config)
    seed = settings.seed
    rows = np.arange(len(split.inter_feat)) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(rows) == 0:
        raise UserError(f"the {phase} split has no rows to evaluate; check the dataset's filters and eval_args.")
    metrics_from_ranks(np.ones(1), settings.metrics, settings.topk)  # refuse an unknown metric before the work
    names = row_names(split)[rows]
    targets = split.inter_feat[split.iid_field][rows]
    candidates = counted = None
    drawn, repeats = _candidates(split, settings, phase, rows, pool)
    if drawn is not None:
        candidates = torch.from_numpy(drawn)
        if repeats:
            # RecBole writes scores into one place per item, so that a repeated item counts once; so does this.
            counted = torch.from_numpy(_first_occurrence(drawn))

    ranks = np.empty(len(rows), dtype=np.int64)
    bar = tqdm(total=len(rows), desc=f"Evaluate ({phase})", unit="row", ncols=100, disable=not progress)
    with torch.no_grad(), bar:
        for start in range(0, len(rows), eval_batch_rows):
            part = slice(start, start + eval_batch_rows)
            batch = _rows_without_targets(split, rows[part])
            if candidates is None and rank_targets is not None:
                greater, equal = rank_targets(batch, targets[part])
                ranks[part] = rank_from_counts(greater, equal, split.item_num - 1, seed, names[part])
            elif candidates is None:
                scores = score_rows(batch, None)
                _check_scores(scores, len(batch), split.item_num)
                ranks[part] = rank_in_catalogue(scores, targets[part], seed, names[part])
            else:
                scores = score_rows(batch, candidates[part])
                _check_scores(scores, len(batch), candidates.shape[1])
                ranks[part] = rank_of_target(scores, seed, names[part], None if counted is None else counted[part])
            bar.update(len(batch))
    users = split.id2token(split.uid_field, split.inter_feat[split.uid_field].numpy()[rows])
    return RankingResult(
        user_ids=np.asarray(users),
        rows=rows,
        ranks=ranks,
        metrics=metrics_from_ranks(ranks, settings.metrics, settings.topk),
        seconds=time.perf_counter() - started,
        test_set=_digest(users, targets, np.array([split.item_num]) if candidates is None else candidates),
    )


def identify_test_set(split: Any, config: Any, phase: str = "test") -> str:
    """What a result's ``test_set`` is for all rows of a split, without a model.

    Args:
        split: the validation or test split.
        config: as for :func:`evaluate`.
        phase: ``valid`` or ``test``.
    """
    settings = EvaluationSettings.of_config(config)
    users = split.id2token(split.uid_field, split.inter_feat[split.uid_field].numpy())
    targets = split.inter_feat[split.iid_field]
    if settings.mode(phase) == "labeled":
        labels = split.inter_feat[settings.rating_field].numpy() > settings.like_threshold
        return _digest(users, targets, labels.astype(np.int64))
    drawn, _ = _candidates(split, settings, phase, np.arange(len(targets)), None)
    return _digest(users, targets, np.array([split.item_num]) if drawn is None else drawn)


def _candidates(
    split: Any, settings: EvaluationSettings, phase: str, rows: np.ndarray, pool: int | None
) -> tuple[np.ndarray | None, bool]:
    """The candidates of some rows, None for the whole catalogue, and whether an item may stand twice in a row."""
    if settings.candidates_file and phase == "test":
        return sets_of_test(split, settings, rows)
    mode = evaluation_mode(settings, phase)
    if mode is None:
        return None, False
    (distribution, number), sampling = mode, settings.sampling
    drawn = draw_candidates(
        split, number, settings.seed, phase, sampling=sampling, distribution=distribution, rows=rows, pool=pool
    )
    return drawn, sampling == "recbole"


def _digest(users: Sequence[str], *parts: np.ndarray | Tensor) -> str:
    """Identify a test set: equal for equal users and int64 ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, users)).encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _rows_without_targets(split: Any, rows: np.ndarray) -> Interaction:
    """Return rows of a split without the target item: what a model may see when it scores candidates."""
    batch = split.inter_feat[rows]
    batch = Interaction({field: batch[field] for field in batch.columns if field != split.iid_field})
    return split.join(batch)  # adds the user's attributes, and, in the absence of an item, no item's


def _check_scores(scores: Tensor, rows: int, columns: int) -> None:
    if tuple(scores.shape) != (rows, columns):
        raise ValueError(f"score_rows returned {tuple(scores.shape)} scores for {(rows, columns)} rows and candidates")


def _first_occurrence(items: np.ndarray) -> np.ndarray:
    """Return ``[rows, C]`` bool, False where an item stands in an earlier column of its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    first = np.ones(items.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


def rows_of_phase(split: Any, settings: EvaluationSettings, phase: str) -> tuple[np.ndarray | None, int | None]:
    """The rows that a phase evaluates, and its pool of candidates: a sample for validation; both None, all, for the test."""
    if phase != "valid":
        return None, None
    return sample_rows(split, settings.valid_users, settings.seed), settings.valid_items


def sample_rows(split: Any, valid_users: int | None, seed: int) -> np.ndarray:
    """Choose the rows for in-training validation: all rows of ``valid_users`` users, the same for every model.

    Args:
        split: the validation split.
        valid_users: how many users; None or 0 for everyone.
        seed: the run's seed.

    Returns:
        ``[n]`` int64 row indices, ascending.
    """
    users = split.inter_feat[split.uid_field].numpy().astype(np.int64)
    distinct = np.unique(users)
    if not valid_users or valid_users >= len(distinct):
        return np.arange(len(users))
    chosen = distinct[np.argsort(row_key("valid_users", seed, distinct), kind="stable")[:valid_users]]
    return np.flatnonzero(np.isin(users, chosen))
