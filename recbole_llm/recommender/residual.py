"""``residual_to_teacher``: the LLM is trained on what the teacher's score leaves, and takes part as far as it helps.

::

    training      scale z_k(u, j) + s(u, j)         z_k: a teacher that was not trained on u (cross-fitting)
    afterwards    scale z(u, j) + gate s(u, j)      z: the teacher, trained on all

z is the teacher's score, standardized over the catalogue; scale makes it the log-odds that fit the targets best before the
LLM has a say. The gate is 0 until a validation chooses it, 0 among the choices: there the model ranks as its teacher does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.recommender.candidates import inner_products
from recbole_llm.teacher.teacher import Teacher

GATES = tuple(step / 10 for step in range(11))
_FITTED_ROWS, _FITTED_ITEMS = 1000, 10_000
_SCALES = (0.1, 64.0)  # a teacher that knows nothing keeps some: at a gate of 0 its order is the model's


class StandardScores:
    """A teacher's scores, each row centered and scaled by their mean and deviation over the whole catalogue.

    Both follow from the mean and the covariance of the item vectors: no row of the catalogue's scores is computed.

    Args:
        vectors: item vectors ``[items, d]``, row 0 padding.
    """

    def __init__(self, vectors: Tensor) -> None:
        items = vectors[1:].double()
        spread = items - items.mean(dim=0)
        self._covariance = (spread.T @ spread / len(spread)).float()
        self.centered = torch.cat([torch.zeros_like(spread[:1]), spread]).float()

    def __call__(self, states: Tensor, items: Tensor | None) -> Tensor:
        """Scores under states ``[B, d]`` of items, int64 ``[C]`` (the same for all rows) or ``[B, C]``; None: the catalogue.

        Returns:
            float32 ``[B, C]``; 0 throughout a row in which the teacher tells no item from another.
        """
        variance = torch.einsum("bd,de,be->b", states, self._covariance, states)[:, None]
        states = torch.where(variance > 1e-12, states / variance.clamp_min(1e-12).sqrt(), 0)
        vectors = self.centered if items is None else self.centered[items]
        return inner_products(states, vectors)


def fitted_scale(scores: Tensor) -> float:
    """The factor a that makes softmax(a scores) likeliest to give the item in column 0, found by bisection.

    Args:
        scores: ``[B, C]``.

    Returns:
        a number from 0.1 to 64: at the optimum the target's score is what the distribution expects, on average.
    """
    low, high = _SCALES
    for _ in range(30):
        middle = (low + high) / 2
        expected = (torch.softmax(middle * scores, dim=1) * scores).sum(dim=1)
        low, high = (middle, high) if (scores[:, 0] - expected).mean() > 0 else (low, middle)
    return (low + high) / 2


class Residual(nn.Module):
    """What the teacher adds to the LLM's scores.

    Args:
        teacher: trained on all.
        user_field: of the users' internal ids.
        folds: teachers, each for the users of its fold; empty where nothing is trained.
        fold_of: the fold of each user, int64 ``[users]``.

    Attributes:
        gate: the LLM's weight outside training; no gradient moves it.
        scale: the teacher's weight.
    """

    def __init__(self, teacher: Teacher, user_field: str, folds: Sequence[Teacher], fold_of: np.ndarray) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))
        self._teacher, self._user_field, self._fold_of = [teacher], user_field, fold_of  # in a list: no submodule of this one
        self._folds = list(folds)
        self._of_all = StandardScores(teacher.item_vectors)
        self._of_fold = [StandardScores(fold.item_vectors) for fold in folds]

    def fit_scale(self, rows: Interaction, targets: np.ndarray, rng: np.random.Generator) -> None:
        """Set ``scale`` by the cross-fitted scores of some training targets among random items."""
        chosen = np.sort(rng.permutation(len(targets))[:_FITTED_ROWS])
        catalog = len(self._of_all.centered) - 1
        others = 1 + rng.choice(catalog, min(_FITTED_ITEMS, catalog), replace=False)
        items = np.concatenate([targets[chosen, None], np.tile(others, (len(chosen), 1))], axis=1)
        scores = self.standard_scores(rows[torch.from_numpy(chosen)], np.arange(len(chosen)), items)
        again = torch.from_numpy(items[:, 1:] == items[:, :1]).to(scores.device)
        scores[:, 1:] = scores[:, 1:].masked_fill(again, -1e4)  # the target counts once
        with torch.no_grad():
            self.scale.fill_(fitted_scale(scores))
        getLogger().info(f"The cross-fitted teachers' standardized scores are weighted by {self.scale.item():.3f}")

    def standard_scores(self, rows: Interaction, ends: np.ndarray, items: np.ndarray) -> Tensor:
        """Standardized scores of training rows by teachers that were not trained on their users, float32 ``[B, C]``.

        Args:
            rows: windows, or rows that are windows of their own.
            ends: see :meth:`Teacher.represent_windows`.
            items: int64 ``[C]``, or ``[B, C]``.
        """
        folds = self._fold_of[rows[self._user_field].cpu().numpy()]
        scores = torch.zeros(len(folds), items.shape[-1], device=self.gate.device)
        table = torch.from_numpy(items).to(self.gate.device)
        for fold, (teacher, standard) in enumerate(zip(self._folds, self._of_fold, strict=True)):
            own = np.flatnonzero(folds == fold)
            if len(own):
                chosen = torch.from_numpy(own)
                states = teacher.represent_windows(rows[chosen], np.searchsorted(own, ends[own]))
                chosen = chosen.to(table.device)
                scores[chosen] = standard(states, table if table.dim() == 1 else table[chosen])
        return scores

    def of_training(self, rows: Interaction, ends: np.ndarray, items: np.ndarray) -> Tensor:
        """What is added to the LLM's scores in training; arguments as of :meth:`standard_scores`."""
        return self.scale.detach() * self.standard_scores(rows, ends, items)

    def total(self, rows: Interaction, candidates: Tensor | None, scores: Tensor) -> Tensor:
        """The teacher's scores and, as far as the gate lets them, the LLM's ``scores``, ``[B, C]``."""
        of_teacher = self.scale * self._of_all(self._teacher[0].represent(rows), candidates)
        return of_teacher + self.gate * scores if self.gate != 0 else of_teacher.masked_fill(scores.isneginf(), float("-inf"))

    def choose_gate(self, evaluate: Callable[[], dict[str, Any]], is_better: Callable[[Any, Any], bool]) -> dict[str, Any]:
        """Set the gate to the one under which ``evaluate`` gives the best result, and return that; of equal ones the lowest."""
        results: dict[float, dict[str, Any]] = {}
        for gate in GATES:
            with torch.no_grad():
                self.gate.fill_(gate)
            results[gate] = evaluate()
        best = GATES[0]
        for gate in GATES[1:]:
            best = gate if is_better(results[gate], results[best]) else best
        with torch.no_grad():
            self.gate.fill_(best)
        getLogger().info(f"The LLM's scores are weighted by {best} beside the teacher's")
        return results[best]
