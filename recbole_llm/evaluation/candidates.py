"""Candidate sets, drawn once per dataset, split and seed: the same for every model that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.sequences import Ragged
from recbole_llm.errors import UserError, printable, unknown_value
from recbole_llm.evaluation.protocols import EvaluationSettings
from recbole_llm.evaluation.randomness import CHUNK_ELEMENTS, absorb, row_key, uniform

CANDIDATE_SAMPLINGS = ("non_interacted", "recbole")



def _users_and_ordinals(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Identify each row of a split by its user and its place among that user's rows, whatever the order of the rows.

    Returns:
        users: ``[rows]`` int64, internal ids.
        ordinals: ``[rows]`` int64, 0 for the user's first row by time (then by target, then by history length).
    """
    rows = split.inter_feat
    users = rows[split.uid_field].numpy().astype(np.int64)
    keys = [rows[split.iid_field].numpy()]
    length_field = getattr(split, "item_list_length_field", None)
    if length_field is not None and length_field in rows:
        keys.insert(0, rows[length_field].numpy())
    if split.time_field is not None and split.time_field in rows:
        keys.append(rows[split.time_field].numpy())
    order = np.lexsort([*keys, users])
    sorted_users = users[order]
    starts = np.flatnonzero(np.r_[True, sorted_users[1:] != sorted_users[:-1]]) if len(users) else np.empty(0, np.int64)
    run_lengths = np.diff(np.r_[starts, len(users)])
    ordinals = np.empty(len(users), dtype=np.int64)
    ordinals[order] = np.arange(len(users)) - np.repeat(starts, run_lengths)
    return users, ordinals


def row_names(split: Any) -> np.ndarray:
    """Return ``[rows]`` int64 names of the rows, which do not change when the rows are re-ordered."""
    users, ordinals = _users_and_ordinals(split)
    return (users << 24) + ordinals


def _draw_distinct(keys: np.ndarray, pools: np.ndarray, number: int) -> np.ndarray:
    """Draw ``number`` distinct integers in ``[0, pools[r])`` for each row r, uniformly.

    Every row takes the first ``number`` distinct values of its own sequence of uniform draws, which is a uniform
    sample without replacement.

    Args:
        keys: ``[rows]`` uint64, the stream of each row.
        pools: ``[rows]`` int64, at least ``number``.
        number: how many to draw.

    Returns:
        ``[rows, number]`` int64.
    """
    drawn = np.empty((len(keys), number), dtype=np.int64)
    pending = np.arange(len(keys))
    width = number + number // 8 + 8  # some repeats are expected; rows that have more go round again, twice as wide
    while number and len(pending):
        unfinished = []
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, len(pending), step):
            rows = pending[start : start + step]
            values = (uniform(absorb(keys[rows, None], np.arange(width))) * pools[rows, None]).astype(np.int64)
            order = np.argsort(values, axis=1, kind="stable")
            ordered = np.take_along_axis(values, order, axis=1)
            is_new = np.ones(values.shape, dtype=bool)
            np.put_along_axis(is_new, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
            found = np.cumsum(is_new, axis=1)
            done = found[:, -1] >= number
            taken = is_new[done] & (found[done] <= number)
            drawn[rows[done]] = values[done][taken].reshape(-1, number)
            unfinished.append(rows[~done])
        pending = np.concatenate(unfinished)
        width *= 2
    return drawn


def _skip_interacted(split: Any, users: np.ndarray, targets: np.ndarray, free_index: np.ndarray) -> np.ndarray:
    """Turn "the r-th item that the user never interacted with" into that item's id.

    Args:
        split: gives ``user_items`` and ``item_num``.
        users: ``[rows]`` int64.
        targets: ``[rows]`` int64, each one of its user's items.
        free_index: ``[rows, number]`` int64, r from 0.

    Returns:
        ``[rows, number]`` int64 internal item ids.
    """
    owned = _interacted(split)
    lengths, starts, interacted = owned.lengths, owned.bounds, owned.values
    owner = np.repeat(np.arange(len(lengths)), lengths)
    # With the user in front, the ids ascend over the whole array: one binary search answers for all users at once.
    own_items = owner * split.item_num + interacted
    wanted = users * split.item_num + targets
    place = np.minimum(np.searchsorted(own_items, wanted), len(own_items) - 1)
    if (own_items[place] != wanted).any():  # such a target could be drawn as its own negative
        raise ValueError("user_items lacks the target of a row: it must hold all of a user's interactions")
    # The j-th of a user's items has (its id - 1 - j) free items before it.
    free_before = own_items - 1 - (np.arange(len(interacted)) - starts[owner])
    items = np.empty_like(free_index)
    step = max(1, CHUNK_ELEMENTS // max(1, free_index.shape[1]))
    by_user = np.argsort(users, kind="stable")  # adjacent rows then search adjacent memory
    for start in range(0, len(users), step):
        rows = by_user[start : start + step]
        query = users[rows, None] * split.item_num + free_index[rows]
        skipped = np.searchsorted(free_before, query, side="right") - starts[users[rows], None]
        items[rows] = 1 + free_index[rows] + skipped
    return items


def _interacted(split: Any) -> Ragged:
    """The ``user_items`` of a split, in one array."""
    if not isinstance(split.user_items, Ragged):
        split.user_items = Ragged.of(split.user_items)
    return split.user_items


def draw_candidates(
    split: Any,
    number: int,
    seed: int,
    phase: str,
    *,
    sampling: str = "non_interacted",
    distribution: str = "uniform",
    rows: np.ndarray | None = None,
    pool: int | None = None,
) -> np.ndarray:
    """Draw the candidate set of each row: its target, then ``number`` other items.

    The draw of a row depends on the data, ``seed``, ``phase``, the user and ``number``: not on the order of the rows,
    on the other users, or on any random state. A user with several rows gets a separate draw for each.

    Args:
        split: a split of a sequential dataset, with ``user_items`` (per internal user id the sorted distinct items of
            all that user's interactions, valid and test included).
        number: how many items beside the target.
        seed: the run's seed.
        phase: ``valid`` or ``test``; they draw separately.
        sampling: ``non_interacted`` draws distinct items that the user never interacted with, as the retrieval papers
            do; ``recbole`` draws as RecBole does for sequential models, any item but the target, with repeats.
        distribution: ``uniform``, or, under ``recbole`` only, ``popularity``: in proportion to an item's interactions
            in all splits, RecBole's ``popN``. Popular items that the user never met and that do not repeat would be
            another distribution, which none of the papers uses.
        rows: draw for these rows of the split only (the result is that part of the full draw).
        pool: under ``non_interacted``, draw all rows' items from this many items of the catalogue, themselves a draw of
            ``seed`` and ``phase``; a user with too few of them left takes further ones in the order of that draw.
            Each item is encoded once for all who have it, so that a pool makes frequent validation cheap.
            None: the whole catalogue.

    Returns:
        ``[rows, 1 + number]`` int64 internal item ids, column 0 = the target. The padding id 0 is never drawn.

    Raises:
        UserError: a user has fewer than ``number`` items that can be drawn, or the sampling is not offered.
    """
    if sampling not in CANDIDATE_SAMPLINGS:
        raise UserError(unknown_value("candidate_sampling", sampling, CANDIDATE_SAMPLINGS))
    if sampling == "non_interacted" and distribution != "uniform":
        raise UserError(
            f"eval_args: mode pop{number} ({phase}) draws popular items, which candidate_sampling: non_interacted does "
            f"not; use uni{number}, or candidate_sampling: recbole."
        )
    users, ordinals = _users_and_ordinals(split)
    targets = split.inter_feat[split.iid_field].numpy().astype(np.int64)
    if sampling == "non_interacted":
        pools = split.item_num - 1 - _interacted(split).lengths[users]
        _check_pools(split, users, pools, number, phase)
    if rows is not None:
        users, ordinals, targets = users[rows], ordinals[rows], targets[rows]
    if pool and sampling == "non_interacted":
        others = _draw_from_pool(split, users, ordinals, number, seed, phase, pool)
        return np.concatenate([targets[:, None], others], axis=1)
    kind = sampling if distribution == "uniform" else f"{sampling} {distribution}"
    keys = row_key(f"candidates {kind} {phase}", seed, users, ordinals, np.array([number]))
    candidates = np.empty((len(users), 1 + number), dtype=np.int64)
    candidates[:, 0] = targets
    if sampling == "non_interacted":
        pools = pools if rows is None else pools[rows]
        candidates[:, 1:] = _skip_interacted(split, users, targets, _draw_distinct(keys, pools, number))
    else:
        weights = (
            _popularity(split) if distribution == "popularity" else np.r_[0, np.ones(split.item_num - 1, np.int64)]
        )
        candidates[:, 1:] = _draw_others(keys, targets, weights, number)
    return candidates


def _draw_from_pool(
    split: Any, users: np.ndarray, ordinals: np.ndarray, number: int, seed: int, phase: str, pool: int
) -> np.ndarray:
    """Draw ``number`` distinct items that each row's user never interacted with from a common pool of ``pool`` items.

    Returns:
        ``[rows, number]`` int64 internal item ids.
    """
    items = np.arange(1, split.item_num)
    items = items[np.argsort(row_key(f"pool {phase}", seed, items), kind="stable")]
    keys = row_key(f"candidates pool {phase}", seed, users, ordinals, np.array([number]))
    drawn = np.empty((len(users), number), dtype=np.int64)
    for row, user in enumerate(users):
        free = items[:pool][~np.isin(items[:pool], split.user_items[user])]
        if len(free) >= number:
            drawn[row] = free[np.argsort(absorb(keys[row], free), kind="stable")[:number]]
        else:
            drawn[row] = items[~np.isin(items, split.user_items[user])][:number]
    return drawn


def _draw_others(keys: np.ndarray, targets: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """Draw ``number`` items for each row in proportion to integer weights, the row's target left out.

    Args:
        keys: ``[rows]`` uint64, the stream of each row.
        targets: ``[rows]`` int64.
        weights: ``[item_num]`` int64, 0 for the padding.
        number: how many to draw.

    Returns:
        ``[rows, number]`` int64 internal item ids, with repeats.
    """
    up_to = np.cumsum(weights)  # item i owns the places up_to[i] - weights[i] .. up_to[i] - 1
    left = up_to[-1] - weights[targets]
    if number and len(left) and left.min() == 0:
        raise UserError(f"eval_args: there is no item but the target to draw {number} candidates from; use mode full.")
    drawn = np.empty((len(keys), number), dtype=np.int64)
    step = max(1, CHUNK_ELEMENTS // max(1, number))
    for start in range(0, len(keys), step):
        part = slice(start, start + step)
        target = targets[part, None]
        places = (uniform(absorb(keys[part, None], np.arange(number))) * left[part, None]).astype(np.int64)
        places += np.where(places >= up_to[target] - weights[target], weights[target], 0)
        drawn[part] = np.searchsorted(up_to, places, side="right")
    return drawn


def _popularity(split: Any) -> np.ndarray:
    """Return ``[item_num]`` how often each item is a target in any split, which is what RecBole counts."""
    if not hasattr(split, "splits"):
        raise ValueError("popularity candidates need the dataset's other splits (an attribute 'splits')")
    targets = torch.cat([other.inter_feat[other.iid_field] for other in split.splits.values()])
    return np.bincount(targets.numpy(), minlength=split.item_num)


def check_pools(split: Any, number: int, phase: str) -> None:
    """Check that each row's user has ``number`` items left that they never interacted with.

    Raises:
        UserError: naming the user who has the fewest, and the remedy.
    """
    users, _ = _users_and_ordinals(split)
    _check_pools(split, users, split.item_num - 1 - _interacted(split).lengths[users], number, phase)


def _check_pools(split: Any, users: np.ndarray, pools: np.ndarray, number: int, phase: str) -> None:
    if len(pools) == 0 or pools.min() >= number:
        return
    worst = int(np.argmin(pools))
    user, left = split.id2token(split.uid_field, int(users[worst])), int(pools[worst])
    remedy = f"set it to uni{left} or lower" if left > 0 else "set it to full"
    raise UserError(
        f"eval_args: mode uni{number} ({phase}) asks for {number} items that the user never interacted with, but user "
        f"'{printable(user)}' has only {left} of {split.item_num - 1} left; {remedy}, or leave out such users with "
        f"user_inter_num_interval."
    )


def shuffled_columns(candidates: np.ndarray, seed: int) -> np.ndarray:
    """An order of each row's candidates that depends on the set and the seed, not on the column of the target.

    Args:
        candidates: int64 ``[rows, C]``.

    Returns:
        column indices int64 ``[rows, C]``.
    """
    row = np.sort(candidates, axis=1)
    keys = row_key("order of candidates", seed, row.sum(axis=1)[:, None], candidates)
    return np.argsort(keys, axis=1, kind="stable")


class CandidateSampler:
    """:func:`draw_candidates` behind the interface of RecBole's ``RepeatableSampler``.

    With it, RecBole's ``NegSampleEvalDataLoader`` has a stock model score the same candidates as :func:`evaluate_ranking`,
    in its trainer's validation too.

    Args:
        split_dataset: the validation or test split.
        config: RecBole's Config.
        phase: ``valid`` or ``test``.
    """

    distribution = "uniform"

    def __init__(self, split_dataset: Any, config: Any, phase: str):
        self.dataset = split_dataset
        self.config = config
        self.phase = phase
        settings = EvaluationSettings.of_config(config)
        self.sampling, self.seed = settings.sampling, settings.seed
        self._candidates: np.ndarray | None = None
        self._rows_of: dict[tuple[int, int], list[int]] = {}

    @property
    def used_ids(self) -> np.ndarray:
        """Per internal user id the set of items that are never drawn (empty sets under ``recbole``)."""
        used = np.empty(len(self.dataset.user_items), dtype=object)
        for user, items in enumerate(self.dataset.user_items):
            used[user] = set(items.tolist()) if self.sampling == "non_interacted" else set()
        return used

    def set_distribution(self, distribution: str) -> None:
        """Accept ``uniform``.

        Raises:
            UserError: any other distribution.
        """
        if distribution != "uniform":
            raise UserError(f"eval_args: candidates drawn by {distribution} are not served here; use uniN or full.")

    def set_phase(self, phase: str) -> CandidateSampler:
        """Return the sampler of another split of the same dataset."""
        if phase == self.phase:
            return self
        splits = getattr(self.dataset, "splits", {})
        if phase not in splits:
            raise ValueError(f"this dataset has no split named '{phase}'")
        return CandidateSampler(splits[phase], self.config, phase)

    def sample_by_user_ids(self, user_ids: Sequence[int], item_ids: Sequence[int], num: int) -> Tensor:
        """Return the drawn candidates of the given rows.

        Args:
            user_ids: ``[n]`` internal user ids of rows of the split.
            item_ids: ``[n]`` their targets.
            num: candidates per row beside the target.

        Returns:
            ``[num * n]`` int64; as RecBole has it, the candidates of row i stand at i, n + i, 2n + i, ...
        """
        if self._candidates is None or self._candidates.shape[1] != 1 + num:
            self._draw(num)
        assert self._candidates is not None
        occurrences: dict[tuple[int, int], int] = {}
        rows = []
        for name in zip(np.asarray(user_ids).tolist(), np.asarray(item_ids).tolist(), strict=True):
            seen = occurrences[name] = occurrences.get(name, -1) + 1
            if seen >= len(self._rows_of.get(name, ())):
                raise ValueError(f"(user, item) = {name} is not a row of the {self.phase} split")
            rows.append(self._rows_of[name][seen])
        return torch.from_numpy(self._candidates[rows, 1:].T.reshape(-1).copy())

    def _draw(self, num: int) -> None:
        self._candidates = draw_candidates(self.dataset, num, self.seed, self.phase, sampling=self.sampling)
        # By user and target and not by row, because the data loader re-orders the split's rows.
        self._rows_of = {}
        users = self.dataset.inter_feat[self.dataset.uid_field].tolist()
        targets = self.dataset.inter_feat[self.dataset.iid_field].tolist()
        for row, name in enumerate(zip(users, targets, strict=True)):
            self._rows_of.setdefault(name, []).append(row)


