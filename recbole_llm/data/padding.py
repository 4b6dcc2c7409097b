"""Histories without their padding: rows of a batch in groups of about one length, each as wide as its longest history.

RecBole pads every history to MAX_ITEM_LIST_LENGTH, and most of what a model then computes is padding. The models named here
give a history the same state whatever padding follows it, and their loss is a mean over the rows of a batch, so that the
means of the groups, each with its share of the batch, are the loss of the whole: same batches, same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

# RecBole's models for which this was shown: tests/trainer/test_padding.py compares scores, losses and gradients.
# The others have layers of a fixed length, let padding take part, or have losses that are no mean over rows.
MODELS = (
    "BERT4Rec", "CORE", "FDSA", "GCSAN", "GRU4Rec", "GRU4RecF", "NARM", "S3Rec", "SASRec", "SASRecF", "SRGNN",
)  # fmt: skip

# What the calls of the model for one more group cost, in positions (SASRec, 64 dimensions); a GPU computes many at once.
_COST_OF_GROUP = {"cpu": 128}
_COST_ON_GPU = 1 << 16


def can_trim(kind: type) -> bool:
    """Whether a model of the class ``kind`` is one of :data:`MODELS`, or says of itself ``ignores_padding = True``."""
    known = kind.__module__.startswith("recbole.model.") and kind.__name__ in MODELS
    return bool(getattr(kind, "ignores_padding", known))


def groups_by_length(lengths: Tensor, cost_of_group: int | None = None) -> list[tuple[Tensor, int]]:
    """Split rows into the groups of least cost, which is rows x longest history, and ``cost_of_group`` for each group.

    Args:
        lengths: int ``[B]``.
        cost_of_group: in positions; None: as befits the device.

    Returns:
        each group's rows, int64, and its longest length (1 at least); shorter histories first, rows of one length in order.
    """
    if cost_of_group is None:
        cost_of_group = _COST_OF_GROUP.get(lengths.device.type, _COST_ON_GPU)
    known = np.maximum(lengths.cpu().numpy(), 1)
    order = torch.from_numpy(np.argsort(known, kind="stable")).to(lengths.device)
    distinct, counts = np.unique(known, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    least, cut = np.zeros(len(ends)), np.zeros(len(ends), dtype=np.int64)
    for last in range(1, len(ends)):  # the cheapest groups of the rows up to each length
        costs = least[:last] + (ends[last] - ends[:last]) * distinct[last - 1]
        cut[last] = np.argmin(costs)
        least[last] = costs[cut[last]] + cost_of_group
    groups, last = [], len(ends) - 1
    while last > 0:
        first = cut[last]
        groups.append((order[ends[first] : ends[last]], int(distinct[last - 1])))
        last = first
    return groups[::-1]


def parts_by_length(model: Any, rows: Interaction) -> Iterator[tuple[Tensor, Interaction]]:
    """Yield groups of ``rows``, their histories as wide as the group's longest, with the places ``[b]`` of its rows."""
    for places, longest in groups_by_length(rows[model.ITEM_SEQ_LEN]):
        yield places, _trimmed(model, rows[places], longest)


def _trimmed(model: Any, rows: Interaction, longest: int) -> Interaction:
    suffix = model.ITEM_SEQ.removeprefix(model.ITEM_ID)
    kept = {field: rows[field][:, :longest] if field.endswith(suffix) else rows[field] for field in rows.columns}
    return Interaction(kept)


def loss_without_padding(model: Any, rows: Interaction) -> Tensor:
    """``model.calculate_loss(rows)``, group by group."""
    total, parts = _targets(model, rows), []
    for _, part in parts_by_length(model, rows):
        targets = _targets(model, part)
        if targets:
            parts.append(model.calculate_loss(part) * (targets / total))
    return torch.stack(parts).sum() if parts else model.calculate_loss(rows)


def _targets(model: Any, rows: Interaction) -> int:
    """How many targets the loss of ``rows`` is the mean of: one in each row, or each masked item."""
    masked = getattr(model, "MASK_INDEX", None)  # BERT4Rec; its loss leaves out the first item of a history
    return len(rows) if masked is None else int((rows[masked] > 0).sum())
