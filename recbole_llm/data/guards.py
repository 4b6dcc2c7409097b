"""What makes a test easier, or harder, than it looks: counted when data is loaded, said in one line each, left out on demand.

==================  =================================================================  ===================
key                 what is counted                                                    values beside None
==================  =================================================================  ===================
repeated_rows       lines of the file with a user, item and time that were there       leave_out
target_in_history   rows whose target, or an item with its text, is in their history   leave_out_item,
                                                                                       leave_out_text
unseen_targets      rows whose target no user has in training                          leave_out
tied_targets        rows whose target has the time of the item before it               leave_out
shared_texts        items that have their text in common with another                  number
==================  =================================================================  ===================

Rows are those of validation and test. Every key is None by default: all is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.data.sequences import first_items
from recbole_llm.errors import UserError

_ROWS_AT_ONCE = 1 << 16  # bounds the memory beside the rows


@dataclass(frozen=True)
class GuardSettings:
    """What is left out, by the keys of the same names."""

    repeated_rows: str | None
    target_in_history: str | None
    unseen_targets: str | None
    tied_targets: str | None
    shared_texts: str | None

    @property
    def of_rows(self) -> dict[str, str]:
        """The keys that are set and decide which interactions and rows there are."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "shared_texts"}


def without_repeated_rows(
    interactions: pd.DataFrame, fields: Sequence[str], settings: GuardSettings, logger: Any
) -> pd.DataFrame:
    """The interactions, those that repeat an earlier one in all ``fields`` counted and, where asked for, left out."""
    repeated = interactions.duplicated(subset=list(fields)).to_numpy()
    if not repeated.any():
        return interactions
    logger.info(
        f"{repeated.sum()} of {len(repeated)} interactions repeat the user, item and time of another: "
        f"{_action('repeated_rows', settings.repeated_rows, 'leave_out')}"
    )
    return interactions[~repeated].copy() if settings.repeated_rows else interactions


def with_distinct_texts(
    attributes: list[tuple[str, ...]], settings: GuardSettings, logger: Any
) -> list[tuple[str, ...]]:
    """The items' texts; those that items share counted and, where asked for, numbered from the second on: ``Dune (2)``.

    Args:
        attributes: by internal id the texts of an item; of the padding, id 0, none.
        settings: of the guards.
        logger: for the sentence.
    """
    codes, _ = pd.factorize(pd.Series(attributes[1:], dtype=object))
    shared = np.bincount(codes)[codes] > 1
    if not shared.any():
        return attributes
    logger.info(
        f"{shared.sum()} of {len(shared)} items share their text with another: "
        f"{_action('shared_texts', settings.shared_texts, 'number', 'numbers them')}"
    )
    if settings.shared_texts is None:
        return attributes
    place = pd.Series(codes).groupby(codes).cumcount().to_numpy() + 1
    numbered = [
        (f"{texts[0]} ({number})", *texts[1:]) if number > 1 else texts
        for texts, number in zip(attributes[1:], place.tolist(), strict=True)
    ]
    return [attributes[0], *numbered]


def guarded(
    train: Any, splits: Mapping[str, Any], texts: Sequence[str], settings: GuardSettings, logger: Any
) -> dict[str, Any]:
    """Validation and test without the rows that are to be left out; what is found is said in one line each.

    Args:
        train: the training split with all its rows.
        splits: ``valid`` and ``test``, by these names.
        texts: of the items, by internal id.
        settings: of the guards.
        logger: for the sentences.

    Raises:
        UserError: no row of a split is left.
    """
    known, codes = _training_items(train), pd.factorize(pd.Series(texts))[0]
    found = {phase: _marked_rows(split, known, codes) for phase, split in splits.items()}
    sentences = {
        "item in history": ("have the item that they ask for in their own history", "target_in_history", "leave_out_item"),
        "text in history": ("have an item with the target's text in their own history", "target_in_history", "leave_out_text"),
        "unseen": ("ask for an item that nobody has in training", "unseen_targets", "leave_out"),
        "tied": ("ask for an item of the same time as the one before it", "tied_targets", "leave_out"),
    }
    for name, (said, key, value) in sentences.items():
        counts = [f"{marked[name].sum()} of {len(marked[name])} {phase} rows" for phase, marked in found.items()]
        if any(marked[name].any() for marked in found.values()):
            logger.info(f"{' and '.join(counts)} {said}: {_action(key, getattr(settings, key), value)}")
    kept = {}
    for phase, split in splits.items():
        out = np.zeros(len(split), dtype=bool)
        for name, (_, key, value) in sentences.items():
            # who leaves out texts leaves out items, too: they have one text
            if getattr(settings, key) in (value, "leave_out_text"):
                out |= found[phase][name]
        if out.any() and out.all():
            raise UserError(f"{', '.join(settings.of_rows)}: no {phase} row is left; leave one of these keys out.")
        kept[phase] = split.copy(split.inter_feat[np.flatnonzero(~out)]) if out.any() else split
    return kept


def _action(key: str, value: str | None, other: str, verb: str = "leaves them out") -> str:
    return f"{key}: {value}" if value else f"kept ({key}: {other} {verb})"


def _training_items(train: Any) -> np.ndarray:
    """Sorted internal ids of the items of all training interactions; a history's first item is the target of no row."""
    rows = train.inter_feat
    items = [rows[train.iid_field].numpy(), first_items(train, np.arange(len(rows)))]
    if train.lone_interactions is not None:
        items.append(train.lone_interactions[1].numpy())
    return np.unique(np.concatenate(items))


def _marked_rows(split: Any, training_items: np.ndarray, text_codes: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows each guard is about, bool ``[rows]``."""
    rows, suffix = split.inter_feat, split.config["LIST_SUFFIX"]
    targets, lengths = rows[split.iid_field].numpy(), rows[split.item_list_length_field].numpy()
    marked = {name: np.zeros(len(targets), dtype=bool) for name in ("item in history", "text in history", "unseen", "tied")}
    marked["unseen"] = ~np.isin(targets, training_items)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        these = rows[part]
        histories, times = these[split.iid_field + suffix].numpy(), these[split.time_field + suffix].numpy()
        last = times[np.arange(len(times)), lengths[part] - 1]
        marked["tied"][part] = last == these[split.time_field].numpy()
        real = np.arange(histories.shape[1]) < lengths[part, None]
        marked["item in history"][part] = ((histories == targets[part, None]) & real).any(axis=1)
        same_text = text_codes[histories] == text_codes[targets[part], None]
        marked["text in history"][part] = (same_text & real & (histories != targets[part, None])).any(axis=1)
    return marked
