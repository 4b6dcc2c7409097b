"""Two models as one: a weighted sum of their standardized scores, the weight chosen on the validation set.

``--model=SASRec,LLMSRec,SASRec+LLMSRec`` asks for such a row. Nothing is trained for it: it tells whether one model knows
what the other does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.errors import UserError
from recbole_llm.evaluation.evaluate import RankingResult, ScoreRows, evaluate_ranking, rows_of_phase
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode

WEIGHTS = tuple(step / 10 for step in range(11))  # of the second model
PHASES = ("valid", "test")


def parts_of(label: str) -> tuple[str, ...]:
    """The models of a fused row: ``SASRec`` and ``LLMSRec:b`` of ``SASRec+LLMSRec:b``; nothing for the label of one model."""
    return tuple(label.split("+")) if "+" in label else ()


def standardized(scores: Tensor) -> Tensor:
    """Each row's scores less their mean, divided by their deviation, float64 ``[B, C]``.

    Scores that are not finite (those of the padding item) are left out of both, and become -inf; equal ones become 0.
    """
    scores = scores.double()
    finite = torch.isfinite(scores)
    count = finite.sum(dim=1, keepdim=True).clamp_min(1)
    mean = scores.where(finite, 0.0).sum(dim=1, keepdim=True) / count
    centered = (scores - mean).where(finite, 0.0)
    deviation = (centered.square().sum(dim=1, keepdim=True) / count).sqrt()
    return (centered / deviation.where(deviation > 0, 1.0)).masked_fill(~finite, float("-inf"))


def fuse(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """``(1 - weight) first + weight second``, standardized row by row, float64 ``[B, C]``.

    A weight of 0 or 1 keeps the order, ties included, that the one model gives.
    """
    if weight in (0.0, 1.0):
        return standardized(second if weight else first)
    return (1 - weight) * standardized(first) + weight * standardized(second)


@dataclass(frozen=True)
class PartScores:
    """What one model scores the candidates of the validation and the test, by phase.

    Attributes:
        scores: float32 ``[n, C]``.
        test_sets: digests of users, targets and candidates.
    """

    scores: Mapping[str, Tensor]
    test_sets: Mapping[str, str]


@dataclass(frozen=True)
class Fusion:
    """A fused row.

    Attributes:
        weight: of the second model; that of the first is one less it.
        valid: metrics on the validation set at that weight.
        test: the result of the test.
    """

    weight: float
    valid: dict[str, float]
    test: RankingResult


def score_part(score_rows: ScoreRows, splits: Mapping[str, Any], config: Any) -> PartScores:
    """Score the candidates of the validation and of the test.

    Args:
        score_rows: of one model, see :func:`~recbole_llm.evaluation.evaluate.evaluate_ranking`.
        splits: ``valid`` and ``test``.
        config: the configuration by which all parts are evaluated.

    Raises:
        UserError: the scores of a whole catalogue would not fit the memory.
    """
    scores, test_sets = {}, {}
    for phase in PHASES:
        kept: list[Tensor] = []

        def keep(batch: Interaction, candidates: Tensor | None, kept: list[Tensor] = kept) -> Tensor:
            found = score_rows(batch, candidates)
            kept.append(found.detach().float().cpu())
            return found

        _check_memory(splits[phase], config, phase)
        test_sets[phase] = _evaluate(keep, splits[phase], config, phase).test_set
        scores[phase] = torch.cat(kept)
    return PartScores(scores, test_sets)


def fuse_parts(first: PartScores, second: PartScores, splits: Mapping[str, Any], config: Any) -> Fusion:
    """Choose the weight on the validation set, and rank the targets of the test with it. Of equal weights the lowest is taken.

    Raises:
        UserError: the models were scored on different users or candidates.
    """
    if first.test_sets != second.test_sets:
        raise UserError("the two models were judged on different users or candidates: give both the same data and eval_args.")

    def ranked(phase: str, weight: float) -> RankingResult:
        columns = first.scores[phase], second.scores[phase]
        return _evaluate(_replay(*columns, weight), splits[phase], config, phase)

    metric = config["valid_metric"].lower()
    found = {weight: ranked("valid", weight).metrics for weight in WEIGHTS}
    weight = max(WEIGHTS, key=lambda tried: found[tried][metric])  # of equal ones the first
    return Fusion(weight, found[weight], ranked("test", weight))


def _evaluate(score_rows: ScoreRows, split: Any, config: Any, phase: str) -> RankingResult:
    settings = EvaluationSettings.of_config(config)
    rows, pool = rows_of_phase(split, settings, phase)
    return evaluate_ranking(score_rows, split, config, phase, rows, pool=pool, eval_batch_rows=settings.eval_batch_rows or 512)


def _replay(first: Tensor, second: Tensor, weight: float) -> ScoreRows:
    """A ``score_rows`` that gives stored scores in the order in which rows are asked for."""
    done = 0

    def score(batch: Interaction, candidates: Tensor | None) -> Tensor:
        nonlocal done
        rows = slice(done, done + len(batch))
        done += len(batch)
        return fuse(first[rows], second[rows], weight)

    return score


def _check_memory(split: Any, config: Any, phase: str) -> None:
    mode = evaluation_mode(EvaluationSettings.of_config(config), phase)
    columns = split.item_num if mode is None else mode[1] + 1
    needed, free = len(split.inter_feat) * columns * 4, psutil.virtual_memory().available
    if needed > free / 2:
        raise UserError(
            f"a fused row keeps the scores of {columns:,} items for {len(split.inter_feat):,} users, more than half of the "
            f"free memory: leave it out, or rank fewer candidates (eval_args)."
        )
