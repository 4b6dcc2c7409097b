"""One cut in time for all users: what lies before it is for training, what comes after it for validation and test.

::

    time  ->          valid_from        test_from
    user 1   a  b  c  |  d  e           |  f  g      training targets b, c; validation a b c -> d; test a b c d e -> f
    user 2      a     |                 |  h         no training target; test a -> h
    user 3            |  c              |  a         unseen in training

An interaction at the very time of a cut comes after it. A history ends at the cut, also where all later interactions of a user
are targets (``test_targets: all``): each of them is then predicted from what the user did before the cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.config.settings import select
from recbole_llm.errors import UserError, printable

SPLIT = {"TC": "valid_and_test"}  # of eval_args, beside RecBole's LS and RS


@dataclass(frozen=True)
class TemporalSettings:
    """The split's settings; each field is the key of the same name.

    Attributes:
        valid_from, test_from: where validation and test begin: a date, a timestamp, or below 1 a share of all interactions.
        unseen: ``leave_out`` or ``keep``: what becomes of later interactions of users and items that training has not.
        test_targets: ``first`` or ``all``: which of a user's interactions after a cut are targets.
    """

    valid_from: Any
    test_from: Any
    unseen: str
    test_targets: str

    @classmethod
    def of_config(cls, config: Any) -> TemporalSettings | None:
        """Read them from a RecBole Config; None where ``eval_args`` splits in another way."""
        if (config["eval_args"] or {}).get("split") != SPLIT:
            return None
        read = select(cls, config)
        defaults = {"valid_from": 0.8, "test_from": 0.9, "unseen": "leave_out", "test_targets": "first"}
        return replace(read, **{name: value for name, value in defaults.items() if getattr(read, name) is None})


@dataclass(frozen=True)
class Cuts:
    """The two cuts as timestamps of the data, ``valid < test``."""

    valid: float
    test: float

    def __str__(self) -> str:
        return f"validation from {self.valid:.15g}, test from {self.test:.15g}"

    def period(self, times: np.ndarray) -> np.ndarray:
        """0, 1 or 2 for each time: training, validation, test."""
        return (times >= self.valid).astype(np.int64) + (times >= self.test)


def find_cuts(settings: TemporalSettings, times: np.ndarray, units_per_second: int | None) -> Cuts:
    """The cuts of some interactions.

    Args:
        settings: of the split.
        times: ``[N]`` of all interactions.
        units_per_second: of the times; None where they are no dates.

    Raises:
        UserError: a date that is none, or cuts that leave training, validation or test empty.
    """
    ordered = np.sort(times)
    cuts = Cuts(*(_cut(key, getattr(settings, key), ordered, units_per_second) for key in ("valid_from", "test_from")))
    counts = np.bincount(cuts.period(times), minlength=3)
    if cuts.valid >= cuts.test or not counts.all():
        parts = [part for part, count in zip(("training", "validation", "test"), counts, strict=True) if not count]
        raise UserError(
            f"valid_from: {settings.valid_from} and test_from: {settings.test_from} leave "
            f"{parts[0] if parts else 'validation'} without interactions; choose two times in this order between "
            f"{_shown(ordered[0], units_per_second)} and {_shown(ordered[-1], units_per_second)}."
        )
    return cuts


def _cut(key: str, value: Any, ordered: np.ndarray, units_per_second: int | None) -> float:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise UserError(
                f"{key}: {printable(value)!r} is no date; write one such as 2021-08-11, a timestamp, or a share below 1."
            ) from None
        if units_per_second is None:
            raise UserError(f"{key}: {value} is a date, and the timestamps of this data set are none; write a timestamp.")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * units_per_second
    if value < 1:
        return float(ordered[min(math.floor(value * len(ordered)), len(ordered) - 1)])
    return float(value)


def _shown(time: float, units_per_second: int | None) -> str:
    return f"{time:.15g}" + (f" ({datetime.fromtimestamp(time / units_per_second, UTC):%Y-%m-%d})" if units_per_second else "")


def leave_out_unseen(
    interactions: pd.DataFrame, user_field: str, item_field: str, periods: np.ndarray, settings: TemporalSettings
) -> tuple[np.ndarray, str]:
    """Which interactions stay, bool ``[N]``, and a sentence on those whose user or item training has not.

    Args:
        interactions: one row each.
        user_field, item_field: its columns of ids.
        periods: ``[N]``, see :meth:`Cuts.period`.
        settings: of the split.
    """
    known, counts = np.ones(len(periods), dtype=bool), []
    for field in (user_field, item_field):
        ids = interactions[field].to_numpy()
        codes, _ = pd.factorize(ids)
        is_known = np.zeros(codes.max(initial=-1) + 2, dtype=bool)  # the last is that of a missing id
        is_known[codes[periods == 0]] = True
        known &= is_known[codes]
        counts.append(len(np.unique(codes[~is_known[codes]])))
    left_out = settings.unseen == "leave_out"
    action = "left out (unseen: keep keeps them)" if left_out else "kept (unseen: leave_out leaves them out)"
    sentence = (
        f"after the cut {(~known).sum()} of {(periods > 0).sum()} interactions have one of {counts[0]} users or {counts[1]} "
        f"items that are not in training: {action}"
    )
    return known if left_out else np.ones_like(known), sentence


def target_rows(users: np.ndarray, times: np.ndarray, cuts: Cuts, test_targets: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all splits; a row belongs to the period of its target, see :meth:`Cuts.period`.

    Args:
        users, times: ``[N]`` of the interactions, sorted by user, then by time.
        cuts: of the split.
        test_targets: ``first`` or ``all``.

    Returns:
        targets: places of the interactions that are predicted, int64 ``[R]``;
        ends: for each the place behind the last item of its history, int64 ``[R]``; no history is empty.
    """
    place, periods, new_user, first_of_user = _places(users, times, cuts)
    new_period = new_user | np.r_[True, periods[1:] != periods[:-1]]
    first_of_period = np.maximum.accumulate(np.where(new_period, place, 0))
    ends = np.where(periods == 0, place, first_of_period)
    is_target = (ends > first_of_user) & ((periods == 0) | (test_targets == "all") | (place == first_of_period))
    return place[is_target], ends[is_target]


def lone_interactions(users: np.ndarray, times: np.ndarray, cuts: Cuts) -> np.ndarray:
    """Places of the training interactions of users that have one alone, int64; arguments as for :func:`target_rows`."""
    place, periods, new_user, first_of_user = _places(users, times, cuts)
    of_training = np.bincount(np.cumsum(new_user) - 1, weights=periods == 0)
    return place[new_user & (of_training[np.cumsum(new_user) - 1] == 1)]


def _places(users: np.ndarray, times: np.ndarray, cuts: Cuts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each interaction's place and period, whether it is its user's first, and the place of that one: ``[N]`` each."""
    place = np.arange(len(users))
    new_user = np.r_[True, users[1:] != users[:-1]]
    return place, cuts.period(times), new_user, np.maximum.accumulate(np.where(new_user, place, 0))
