"""The items that a target is compared with in training by retrieval: drawn for each target, or shared by a step's targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.loss.in_batch import corrected_scores, in_batch_loss
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.soft_targets import soft_target_loss


def inner_products(users: Tensor, items: Tensor) -> Tensor:
    """``[B, C]``: products of users ``[B, d]`` with items ``[C, d]``, the same for all, or each one's own, ``[B, C, d]``."""
    return users @ items.T if items.dim() == 2 else torch.einsum("bd,bcd->bc", users, items)


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of the candidates (``soft_targets``).

    Attributes:
        scores: float32 ``[B, C]``.
        share: the part of the loss in which they are the target, 0 to 1.
    """

    scores: Tensor
    share: float

    def mixed(self, loss: Tensor, scores: Tensor, teacher_scores: Tensor) -> Tensor:
        """A loss, and that of ``scores`` under the distribution of ``teacher_scores``, by their parts."""
        return (1 - self.share) * loss + self.share * soft_target_loss(scores, teacher_scores)


@dataclass(frozen=True)
class OwnCandidates:
    """Candidates of each row alone (``negatives: sampled``), as published.

    Attributes:
        items: int64 ``[B, C]``, the target in column 0.
        offsets: what is added to the model's scores, float32 ``[B, C]``; None: nothing.
        soft: soft targets; None: the one next item.
    """

    items: np.ndarray
    offsets: Tensor | None = None
    soft: SoftTargets | None = None

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates of some rows, the target first, int64 ``[n, C]``, and which of them do not count, bool ``[n, C]``."""
        return self.items[rows], np.zeros(self.items[rows].shape, dtype=bool)

    def retrieval(self, model: Any, users: Tensor) -> tuple[Tensor, Tensor]:
        """L_retrieval of users ``[B, d']``, and the representations of their targets, ``[B, d']``."""
        items = model.represent_candidates(self.items)
        scores = inner_products(users, items)
        scores = scores if self.offsets is None else scores + self.offsets
        loss = retrieval_loss(scores)
        return loss if self.soft is None else self.soft.mixed(loss, scores, self.soft.scores), items[:, 0]


@dataclass(frozen=True)
class SharedCandidates:
    """Candidates of all rows (``negatives: in_batch``): each is encoded once.

    Attributes:
        items: distinct, int64 ``[C]``.
        targets: column of each row's target, int64 ``[B]``.
        left_out: items that the row's user interacted with, bool ``[B, C]``.
        log_expected_counts: log of how likely each item is to be a candidate of a step, float32 ``[C]``.
        offsets: what is added to the model's scores, float32 ``[B, C]``; None: nothing.
        soft: soft targets; None: the one next item.
    """

    items: np.ndarray
    targets: np.ndarray
    left_out: np.ndarray
    log_expected_counts: np.ndarray
    offsets: Tensor | None = None
    soft: SoftTargets | None = None

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates of some rows, the target first, int64 ``[n, 1 + C]``, and which of them do not count, bool."""
        targets = self.targets[rows, None]
        columns = np.concatenate([targets, np.tile(np.arange(len(self.items)), (len(rows), 1))], axis=1)
        again = self.left_out[rows] | (columns[:, 1:] == targets)
        return self.items[columns], np.concatenate([np.zeros_like(targets, dtype=bool), again], axis=1)

    def retrieval(self, model: Any, users: Tensor) -> tuple[Tensor, Tensor]:
        """L_retrieval of users ``[B, d']``, and the representations of their targets, ``[B, d']``."""
        items = model.represent_items(self.items)
        targets, left_out, log_counts = (
            torch.from_numpy(table).to(items.device) for table in (self.targets, self.left_out, self.log_expected_counts)
        )
        scores = inner_products(users, items)
        scores = scores if self.offsets is None else scores + self.offsets
        which = targets, left_out, log_counts
        loss = in_batch_loss(scores, *which)
        if self.soft is not None:
            loss = self.soft.mixed(loss, corrected_scores(scores, *which), corrected_scores(self.soft.scores, *which))
        return loss, items[targets]


class SharedDraw:
    """Draws the shared candidates of a step.

    Args:
        user_items: see ``TextSequentialDataset``.
        counts: how often each item is a target in an epoch, on average, float64 ``[items]``.
        share: the part of an epoch's targets that a unit (a window, or a row) brings into a step: one by their number.
        others: distinct random items beside the targets.
    """

    def __init__(self, user_items: Sequence[np.ndarray], counts: np.ndarray, share: float, others: int) -> None:
        self.user_items, self.counts, self.share, self.others = user_items, counts, share, others

    def __call__(self, users: np.ndarray, targets: np.ndarray, units: int, rng: np.random.Generator) -> SharedCandidates:
        """Candidates of rows of ``users`` with ``targets``, int64 ``[B]``, which make up ``units`` windows or rows."""
        catalog = len(self.counts) - 1  # item 0 is padding
        others = min(self.others, catalog)
        drawn = 1 + rng.choice(catalog, others, replace=False)
        items = np.unique(np.concatenate([targets, drawn]))
        # In neither of two independent ways: among the targets (about Poisson), among the random items.
        missed = np.exp(-self.counts[items] * units * self.share) * (1 - others / catalog)
        left_out = np.empty((len(users), len(items)), dtype=bool)
        for user in np.unique(users):
            left_out[users == user] = np.isin(items, self.user_items[user])
        return SharedCandidates(items, np.searchsorted(items, targets), left_out, np.log1p(-missed).astype(np.float32))
