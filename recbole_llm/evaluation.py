r"""Ranking evaluation: the same candidates, the same ties and the same users for every model that is compared.

A row of a validation or test split is one question: a user's history and the item that came next (the target). A
model scores the target beside other items, and everything reported follows from the target's rank among them.

Three things make the results of two models comparable user by user, and therefore testable in pairs:

* the candidates of a row are a function of the data, the seed, the phase, the user and their number
  (:func:`draw_candidates`): no global random state, so that a model evaluated earlier or more often changes nothing;
* a tie between the target and other items is broken at random, by a draw that belongs to the row and not to the model
  (:func:`rank_of_target`): a model that scores everything the same gets the chance level, neither 0 nor 1;
* the test of the difference pairs the users (:func:`paired_test`).

RecBole's own ``uniN`` for sequential models excludes only the target: the user's history can be among the negatives,
an item can be drawn twice, and each evaluation draws anew. ``candidate_sampling: recbole`` keeps those candidates,
but drawn once; the default, ``non_interacted``, draws distinct items that the user never interacted with.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.register import metrics_dict, smaller_metrics
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from recbole_llm.errors import UserError, closest

logger = logging.getLogger(__name__)

ScoreRows = Callable[[Interaction, "Tensor | None"], Tensor]
RankTargets = Callable[[Interaction, Tensor], tuple[Tensor, Tensor]]
PredictRows = Callable[[Interaction], Tensor]

CANDIDATE_SAMPLINGS = ("non_interacted", "recbole")

# Working arrays hold at most this many elements at a time (32 MB of int64), whatever the size of the split.
_CHUNK_ELEMENTS = 2**22


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers that belong to a row
# ---------------------------------------------------------------------------------------------------------------------


def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers: the output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _absorb(state: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Mix the integers ``part`` into the keys ``state`` (arrays that broadcast against each other).

    With ``part`` = 0, 1, 2, ... this is the SplitMix64 stream that starts at ``state``.
    """
    # At least one dimension: NumPy warns of the wanted overflow for scalars, and only for them.
    part = np.atleast_1d(np.asarray(part)).astype(np.uint64)
    return _mix(np.atleast_1d(state) + (part + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _key(purpose: str, seed: int, *parts: np.ndarray) -> np.ndarray:
    """Return uint64 keys that depend on the purpose, the seed and the integers in ``parts``, and on nothing else.

    This and not ``numpy.random.Generator``, because its streams may change with NumPy's version, and because 100,000
    rows need 100,000 independent streams at once.
    """
    start = hashlib.blake2b(f"{purpose}\0{int(seed)}".encode(), digest_size=8).digest()
    state = np.array([int.from_bytes(start, "little")], dtype=np.uint64)
    for part in parts:
        state = _absorb(state, part)
    return state


def _unit(bits: np.ndarray) -> np.ndarray:
    """Map uint64 to float64, uniform in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------------
# Candidate sets
# ---------------------------------------------------------------------------------------------------------------------


def _users_and_ordinals(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Name each row of a split by its user and its place among that user's rows, in whatever order the rows stand.

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


def _row_names(split: Any) -> np.ndarray:
    """Return ``[rows]`` int64 names of the rows that do not change when the rows are re-ordered."""
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
        step = max(1, _CHUNK_ELEMENTS // width)
        for start in range(0, len(pending), step):
            rows = pending[start : start + step]
            values = (_unit(_absorb(keys[rows, None], np.arange(width))) * pools[rows, None]).astype(np.int64)
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
    lengths = _interacted_counts(split)
    starts = np.r_[0, np.cumsum(lengths)]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    interacted = np.concatenate(split.user_items).astype(np.int64)
    # With the user in front, the ids ascend over the whole array: one binary search answers for all users at once.
    own_items = owner * split.item_num + interacted
    wanted = users * split.item_num + targets
    place = np.minimum(np.searchsorted(own_items, wanted), len(own_items) - 1)
    if (own_items[place] != wanted).any():  # such a target could be drawn as its own negative
        raise ValueError("user_items lacks the target of a row: it must hold all of a user's interactions")
    # The j-th of a user's items has (its id - 1 - j) free items before it.
    free_before = own_items - 1 - (np.arange(len(interacted)) - starts[owner])
    items = np.empty_like(free_index)
    step = max(1, _CHUNK_ELEMENTS // max(1, free_index.shape[1]))
    by_user = np.argsort(users, kind="stable")  # neighbouring rows then search neighbouring memory
    for start in range(0, len(users), step):
        rows = by_user[start : start + step]
        query = users[rows, None] * split.item_num + free_index[rows]
        skipped = np.searchsorted(free_before, query, side="right") - starts[users[rows], None]
        items[rows] = 1 + free_index[rows] + skipped
    return items


def _interacted_counts(split: Any) -> np.ndarray:
    return np.fromiter((len(items) for items in split.user_items), dtype=np.int64, count=len(split.user_items))


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
        raise UserError(_unknown("candidate_sampling", sampling, CANDIDATE_SAMPLINGS))
    if sampling == "non_interacted" and distribution != "uniform":
        raise UserError(
            f"eval_args: mode pop{number} ({phase}) draws popular items, which candidate_sampling: non_interacted does "
            f"not; use uni{number}, or candidate_sampling: recbole."
        )
    users, ordinals = _users_and_ordinals(split)
    targets = split.inter_feat[split.iid_field].numpy().astype(np.int64)
    if sampling == "non_interacted":
        pools = split.item_num - 1 - _interacted_counts(split)[users]
        _check_pools(split, users, pools, number, phase)
    if rows is not None:
        users, ordinals, targets = users[rows], ordinals[rows], targets[rows]
    if pool and sampling == "non_interacted":
        others = _draw_from_pool(split, users, ordinals, number, seed, phase, pool)
        return np.concatenate([targets[:, None], others], axis=1)
    kind = sampling if distribution == "uniform" else f"{sampling} {distribution}"
    keys = _key(f"candidates {kind} {phase}", seed, users, ordinals, np.array([number]))
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
    items = items[np.argsort(_key(f"pool {phase}", seed, items), kind="stable")]
    keys = _key(f"candidates pool {phase}", seed, users, ordinals, np.array([number]))
    drawn = np.empty((len(users), number), dtype=np.int64)
    for row, user in enumerate(users):
        free = items[:pool][~np.isin(items[:pool], split.user_items[user])]
        if len(free) >= number:
            drawn[row] = free[np.argsort(_absorb(keys[row], free), kind="stable")[:number]]
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
    step = max(1, _CHUNK_ELEMENTS // max(1, number))
    for start in range(0, len(keys), step):
        part = slice(start, start + step)
        target = targets[part, None]
        places = (_unit(_absorb(keys[part, None], np.arange(number))) * left[part, None]).astype(np.int64)
        places += np.where(places >= up_to[target] - weights[target], weights[target], 0)
        drawn[part] = np.searchsorted(up_to, places, side="right")
    return drawn


def _popularity(split: Any) -> np.ndarray:
    """Return ``[item_num]`` how often each item is a target in any split, which is what RecBole counts."""
    if not hasattr(split, "splits"):
        raise ValueError("popularity candidates need the dataset's other splits (an attribute 'splits')")
    targets = torch.cat([other.inter_feat[other.iid_field] for other in split.splits.values()])
    return np.bincount(targets.numpy(), minlength=split.item_num)


def _check_pools(split: Any, users: np.ndarray, pools: np.ndarray, number: int, phase: str) -> None:
    if len(pools) == 0 or pools.min() >= number:
        return
    worst = int(np.argmin(pools))
    user, left = split.id2token(split.uid_field, int(users[worst])), int(pools[worst])
    remedy = f"set it to uni{left} or lower" if left > 0 else "set it to full"
    raise UserError(
        f"eval_args: mode uni{number} ({phase}) asks for {number} items that the user never interacted with, but user "
        f"'{user}' has only {left} of {split.item_num - 1} left; {remedy}, or leave out such users with "
        f"user_inter_num_interval."
    )


def shuffled_columns(candidates: np.ndarray, seed: int) -> np.ndarray:
    """An order of each row's candidates that follows from the set and the seed, not from the column of the target.

    Args:
        candidates: int64 ``[rows, C]``.

    Returns:
        column indices int64 ``[rows, C]``.
    """
    row = np.sort(candidates, axis=1)
    keys = _key("order of candidates", seed, row.sum(axis=1)[:, None], candidates)
    return np.argsort(keys, axis=1, kind="stable")


class CandidateSampler:
    """Serves :func:`draw_candidates` where RecBole expects its ``RepeatableSampler``.

    With it, RecBole's ``NegSampleEvalDataLoader`` puts the same candidates before a stock model, in its trainer's
    validation too, as :func:`evaluate_ranking` does.

    Args:
        split_dataset: the validation or test split.
        config: RecBole's Config; ``seed`` and ``candidate_sampling`` are read.
        phase: ``valid`` or ``test``.
    """

    distribution = "uniform"

    def __init__(self, split_dataset: Any, config: Any, phase: str):
        self.dataset = split_dataset
        self.config = config
        self.phase = phase
        self.sampling = config["candidate_sampling"] or "non_interacted"
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
        occurrences: dict[tuple[int, int], int] = {}
        rows = []
        for name in zip(np.asarray(user_ids).tolist(), np.asarray(item_ids).tolist(), strict=True):
            seen = occurrences[name] = occurrences.get(name, -1) + 1
            if seen >= len(self._rows_of.get(name, ())):
                raise ValueError(f"(user, item) = {name} is not a row of the {self.phase} split")
            rows.append(self._rows_of[name][seen])
        return torch.from_numpy(self._candidates[rows, 1:].T.reshape(-1).copy())

    def _draw(self, num: int) -> None:
        self._candidates = draw_candidates(self.dataset, num, self.config["seed"], self.phase, sampling=self.sampling)
        # By user and target and not by row, because the data loader re-orders the split's rows.
        self._rows_of = {}
        users = self.dataset.inter_feat[self.dataset.uid_field].tolist()
        targets = self.dataset.inter_feat[self.dataset.iid_field].tolist()
        for row, name in enumerate(zip(users, targets, strict=True)):
            self._rows_of.setdefault(name, []).append(row)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def rank_of_target(
    scores: Tensor | np.ndarray,
    seed: int,
    positions: np.ndarray | None = None,
    counted: Tensor | None = None,
) -> np.ndarray:
    """Rank the target among its candidates, from 1 = best.

    The rank is 1 + the number of candidates with a strictly higher score + a uniformly random share of those with the
    same score. A row that holds a NaN ranks last, with a warning; one of -inf throughout ranks last too: an LLM that was asked
    for a candidate named none.

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
    step = max(1, _CHUNK_ELEMENTS // scores.shape[1])
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
    """Rank the target among all items, as :func:`rank_in_catalogue` does, where its scores were counted and not kept.

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
    better, equal, invalid, last = (tensor.cpu().numpy() for tensor in (better, equal, invalid, last))
    positions = np.arange(len(better)) if positions is None else np.asarray(positions)
    share = _unit(_key("ties", seed, positions))
    ranks = 1 + better + np.floor(share * (equal + 1)).astype(np.int64)
    if invalid.any():
        logger.warning("%d of %d rows have scores that are NaN; they rank last.", invalid.sum(), len(invalid))
        ranks = np.where(invalid, last, ranks)
    return ranks.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

# With one target per row each of RecBole's top-k metrics is a function of the target's rank r, and 0 beyond k:
# the ideal DCG is 1, average precision is the precision at the target's place, and recall is a hit.
_METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "ndcg": lambda ranks, k: 1.0 / np.log2(ranks + 1.0),
    "hit": lambda ranks, k: np.ones(ranks.shape),
    "mrr": lambda ranks, k: 1.0 / ranks,
    "recall": lambda ranks, k: np.ones(ranks.shape),
    "precision": lambda ranks, k: np.full(ranks.shape, 1.0 / k),
    "map": lambda ranks, k: 1.0 / ranks,
}


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
    if name not in _METRICS:
        supported = ", ".join(_METRICS)
        if name in metrics_dict:
            raise UserError(
                f"metrics: '{metric}' needs more than the rank of the target and is not computed here; use {supported}."
            )
        raise UserError(_unknown("metrics", metric, _METRICS))
    if k < 1:
        raise UserError(f"topk: {k} is not a cut-off; use integers from 1.")
    ranks = np.asarray(ranks)
    return np.where(ranks <= k, _METRICS[name](ranks, k), 0.0)


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
        for k in topk:
            mean = float(per_user(ranks, metric, k).mean())
            values[f"{metric.lower()}@{k}"] = mean if decimals is None else round(mean, decimals)
    return values


def split_metric(name: str) -> tuple[str, int]:
    """Split ``NDCG@10`` into ``("ndcg", 10)``.

    Raises:
        UserError: a name without a cut-off.
    """
    metric, _, k = name.partition("@")
    if not k.isascii() or not k.isdigit():
        raise UserError(f"'{name}' is not a metric with a cut-off; write it as ndcg@10.")
    return metric.lower(), int(k)


def is_per_user(name: str) -> bool:
    """Whether a reported figure is a mean of users' values (``ndcg@10``), not one of the whole run (``validratio``)."""
    return name.partition("@")[0].lower() in _METRICS


def metric_direction(name: str) -> int:
    """Return 1 where more is better (``ndcg@10``), -1 where less is better (``logloss``)."""
    return -1 if name.partition("@")[0].lower() in smaller_metrics else 1


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankingResult:
    """What an evaluation found.

    Attributes:
        user_ids: ``[n]`` the users' own ids (external tokens).
        rows: ``[n]`` int64 row of the split.
        ranks: ``[n]`` int64 rank of the target, from 1.
        metrics: the averages, by RecBole's names.
        seconds: wall time.
        test_set: digest of users, targets and candidates: what results in pairs must have in common.
    """

    user_ids: np.ndarray
    rows: np.ndarray
    ranks: np.ndarray
    metrics: dict[str, float]
    seconds: float
    test_set: str


@dataclass(frozen=True)
class LabelResult:
    """What an evaluation of predicted labels found.

    Attributes:
        user_ids: ``[n]`` the users' own ids (external tokens).
        rows: ``[n]`` int64 row of the split.
        labels: ``[n]`` int64, 1 where the user liked the row's item.
        values: ``[n]`` float64, what the model predicted: higher means likelier to be liked.
        metrics: by RecBole's names.
        seconds: wall time.
        test_set: digest of users, items and labels: what results in pairs must have in common.
    """

    user_ids: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    metrics: dict[str, float]
    seconds: float
    test_set: str


def _mode(config: Any, phase: str) -> str:
    mode = config["eval_args"]["mode"]
    return str(mode[phase] if isinstance(mode, Mapping) else mode)


def evaluation_mode(config: Any, phase: str) -> tuple[str, int] | None:
    """Return how candidates are sampled (``("uniform", 99)`` for ``uni99``), or None for ``full``.

    Raises:
        UserError: RecBole's other modes.
    """
    mode = _mode(config, phase)
    if mode == "full":
        return None
    match = re.fullmatch(r"(uni|pop)([1-9][0-9]*)", mode)
    if match is None:
        raise UserError(f"eval_args: mode '{mode}' ({phase}) is not supported; use uniN, for example uni99, or full.")
    return {"uni": "uniform", "pop": "popularity"}[match[1]], int(match[2])


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
    """Judge a model as ``eval_args: mode`` says: :func:`evaluate_labels` where it is ``labeled``, else
    :func:`evaluate_ranking`; the arguments are theirs."""
    options = {"progress": progress, "eval_batch_rows": eval_batch_rows}
    if _mode(config, phase) == "labeled":
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
    rows = np.arange(len(split.inter_feat)) if rows is None else np.asarray(rows, dtype=np.int64)
    rating = config["RATING_FIELD"]
    labels = (split.inter_feat[rating].numpy()[rows] > config["like_threshold"]).astype(np.int64)
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"like_threshold: of the {len(rows)} {phase} items {labels.sum()} are rated above {config['like_threshold']}, "
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
    measured = [name for name in config["metrics"] if probabilities or name.lower() == "auc"]
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
    mode = evaluation_mode(config, phase)
    sampling = config["candidate_sampling"] or "non_interacted"
    seed = config["seed"]
    rows = np.arange(len(split.inter_feat)) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(rows) == 0:
        raise UserError(f"the {phase} split has no rows to evaluate; check the dataset's filters and eval_args.")
    metrics_from_ranks(np.ones(1), config["metrics"], config["topk"])  # an unknown metric shows now, not after the work
    names = _row_names(split)[rows]
    targets = split.inter_feat[split.iid_field][rows]
    candidates = counted = None
    if mode is not None:
        distribution, number = mode
        drawn = draw_candidates(
            split, number, seed, phase, sampling=sampling, distribution=distribution, rows=rows, pool=pool
        )
        candidates = torch.from_numpy(drawn)
        if sampling == "recbole":
            # RecBole writes scores into one place per item, so that a repeated item counts once. So it does here.
            counted = torch.from_numpy(_first_occurrence(drawn))

    ranks = np.empty(len(rows), dtype=np.int64)
    bar = tqdm(total=len(rows), desc=f"Evaluate ({phase})", unit="row", ncols=100, disable=not progress)
    with torch.no_grad(), bar:
        for start in range(0, len(rows), eval_batch_rows):
            part = slice(start, start + eval_batch_rows)
            batch = _questions(split, rows[part])
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
        metrics=metrics_from_ranks(ranks, config["metrics"], config["topk"]),
        seconds=time.perf_counter() - started,
        test_set=_digest(users, targets, np.array([split.item_num]) if candidates is None else candidates),
    )


def _digest(users: Sequence[str], *parts: np.ndarray | Tensor) -> str:
    """Name a test set: equal for equal users and int64 ``parts``."""
    digest = hashlib.sha256("\0".join(map(str, users)).encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _questions(split: Any, rows: np.ndarray) -> Interaction:
    """Return rows of a split without the target item: what a model may see when it is asked for scores."""
    batch = split.inter_feat[rows]
    batch = Interaction({field: batch[field] for field in batch.columns if field != split.iid_field})
    return split.join(batch)  # adds the user's attributes, and, in the absence of an item, no item's


def _check_scores(scores: Tensor, rows: int, columns: int) -> None:
    if tuple(scores.shape) != (rows, columns):
        raise ValueError(f"score_rows returned {tuple(scores.shape)} scores for {(rows, columns)} questions")


def _first_occurrence(items: np.ndarray) -> np.ndarray:
    """Return ``[rows, C]`` bool, False where an item stands in an earlier column of its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    first = np.ones(items.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


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
    chosen = distinct[np.argsort(_key("valid_users", seed, distinct), kind="stable")[:valid_users]]
    return np.flatnonzero(np.isin(users, chosen))


def stock_predictions(model: Any) -> PredictRows:
    """Make a function that predicts the item of each row by a RecBole model; ``model`` as in :func:`stock_scores`."""
    scores = stock_scores(model)

    def predict(interaction: Interaction) -> Tensor:
        return scores(interaction, interaction[model.ITEM_ID][:, None])[:, 0]

    return predict


def stock_scores(model: Any, *, max_scores: int = 2**25, max_rows: int = 2**13) -> ScoreRows:
    """Make a scoring function of a RecBole model.

    ``full_sort_predict`` encodes each history once, and the candidates' scores are gathered from its row. Where a model
    has none, ``predict`` is called on one row per (history, candidate), each of which encodes the history again.

    Args:
        model: a RecBole sequential recommender. It is put into eval mode for each call, and back after it.
        max_scores: most scores over the catalogue held at a time (2**25 are 128 MB in float32).
        max_rows: most rows given to ``predict`` at a time.

    Returns:
        A ``score_rows`` for :func:`evaluate_ranking`.
    """
    has_full_sort = True

    def score(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        nonlocal has_full_sort
        interaction = interaction.to(model.device)
        candidates = None if candidates is None else candidates.to(model.device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if has_full_sort:
                    try:
                        return by_catalogue(interaction, candidates)
                    except NotImplementedError:
                        has_full_sort = False
                if candidates is None:
                    items = torch.arange(model.n_items, device=model.device)
                    items[0] = 1  # padding: some models have no score for it; the column is never read
                    candidates = items.expand(len(interaction), -1)
                return by_row(interaction, candidates)
        finally:
            model.train(was_training)

    def by_catalogue(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        step = max(1, max_scores // model.n_items)
        parts = []
        for start in range(0, len(interaction), step):
            part = interaction[slice(start, start + step)]
            scores = model.full_sort_predict(part).reshape(len(part), -1)[:, : model.n_items]
            parts.append(scores if candidates is None else scores.gather(1, candidates[start : start + step]))
        return torch.cat(parts)

    def by_row(interaction: Interaction, candidates: Tensor) -> Tensor:
        width = candidates.shape[1]
        items = candidates.reshape(-1)
        parts = []
        for start in range(0, len(items), max_rows):
            index = torch.arange(start, min(start + max_rows, len(items)))
            part = interaction[index // width]
            part.update(Interaction({model.ITEM_ID: items[index]}))
            parts.append(model.predict(part).reshape(-1))
        return torch.cat(parts).view(-1, width)

    return score


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------

_RESAMPLES = 10_000
_NORMAL_95 = 1.959964  # the 97.5% point of the normal distribution
_EXACT_UP_TO = 13  # 2**13 sign patterns are fewer than the resamples


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    r"""Test whether model ``a`` differs from model ``b`` over the same users, in the mean of a metric.

    The sign-flip (Fisher's randomisation) test: if the models were interchangeable, each user's difference
    :math:`d_u = a_u - b_u` could as well have been :math:`-d_u`, so that the observed mean is compared with the means
    of :math:`\pm d_u`. All sign patterns are taken where there are few differences other than 0, else 10,000
    random ones. The 95% interval is the mean difference plus and minus the 95% point of the same distribution, so that
    interval and p value never contradict each other: 0 lies outside exactly where p <= 0.05.

    Why this test. Ranking metrics of single users are discrete and mostly tied: most differences are 0, and those of
    HR@k are -1, 0 or 1, for which this is McNemar's exact test. It assumes nothing about their distribution. Smucker,
    Allan & Carterette (CIKM 2007) find that it and the t-test agree, and that Wilcoxon's signed ranks and the sign test
    answer a question other than that of the mean. Where many users differ, the paired t-test gives the same p values;
    where few differ at all, it claims significance too early (five differences, all of one sign, among 1,000 users:
    t-test p = 0.025, while five coins agree with probability 0.0625).

    Args:
        a, b: ``[users]`` values of the same users in the same order, one per user.
        seed: of the random sign patterns.

    Returns:
        ``difference`` (mean of a - b), ``low`` and ``high`` (95% interval), ``p_value`` (two-sided), ``users``.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired values must be two equally long lists, not {a.shape} and {b.shape}")
    differences = a - b
    mean = float(differences.mean())
    null = np.abs(_sign_flip_sums(differences[differences != 0], seed)) / len(a)
    # Sums of the same numbers in another order differ in the last bits, and count as equal.
    null[np.isclose(null, abs(mean), rtol=0.0, atol=1e-9 * np.abs(differences).mean())] = abs(mean)
    p_value = float(np.mean(null >= abs(mean)))
    half_width = float(np.sort(null)[-1 - len(null) // 20])  # at most 5% lie beyond it
    return {
        "difference": mean,
        "low": mean - half_width,
        "high": mean + half_width,
        "p_value": p_value,
        "users": len(a),
    }


def auc_test(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Test whether model ``a`` differs from model ``b`` in the area under the ROC curve over the same rows.

    DeLong, DeLong & Clarke-Pearson (Biometrics 1988): the area is the mean, over the liked rows, of the share of others
    below them (ties count half), and as well the mean, over the others, of the share of liked rows above them. The
    variances of these shares' differences between the models, each divided by its number of rows, add up to that of the
    difference of the areas.

    Args:
        labels: ``[rows]`` 1 or 0, at least two of each.
        a, b: ``[seeds, rows]`` values of the same rows; areas are averaged over the seeds.

    Returns:
        as :func:`paired_test`; ``users`` counts the rows.
    """
    liked = np.asarray(labels) == 1
    shares = _auc_shares(liked, a) - _auc_shares(liked, b)
    difference = float(shares[liked].mean())
    error = math.sqrt(sum(shares[group].var(ddof=1) / group.sum() for group in (liked, ~liked)))
    return {
        "difference": difference,
        "low": difference - _NORMAL_95 * error,
        "high": difference + _NORMAL_95 * error,
        "p_value": math.erfc(abs(difference) / error / math.sqrt(2)) if error > 0 else float(difference == 0),
        "users": len(liked),
    }


def _auc_shares(liked: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each liked row the share of the others below it, for each other row that of the liked above it: ``[rows]``,
    the mean over the seeds of ``values`` ``[seeds, rows]``."""
    values = np.asarray(values, dtype=np.float64)
    among_all, shares = rankdata(values, axis=1), np.empty(values.shape)
    for group in (liked, ~liked):
        shares[:, group] = (among_all[:, group] - rankdata(values[:, group], axis=1)) / (~group).sum()
    shares[:, ~liked] = 1 - shares[:, ~liked]
    return shares.mean(axis=0)


def _sign_flip_sums(differences: np.ndarray, seed: int) -> np.ndarray:
    """Return the sums of ``differences`` under all sign patterns, or under random ones and the observed one."""
    size = len(differences)
    total = differences.sum()
    if size <= _EXACT_UP_TO:
        positive = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
        return 2.0 * (positive @ differences) - total
    generator = np.random.Generator(np.random.PCG64(seed))
    sums = [np.array([total])]  # the observed pattern is one of the possible ones, so that no p value is 0
    step = max(1, _CHUNK_ELEMENTS // size)
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        random_bytes = np.frombuffer(generator.bytes(count * ((size + 7) // 8)), dtype=np.uint8).reshape(count, -1)
        positive = np.unpackbits(random_bytes, axis=1, count=size)
        sums.append(2.0 * (positive.astype(np.float64) @ differences) - total)
    return np.concatenate(sums)


def compare_to_first(values: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """Compare each model with the first one, with Holm's correction for the number of comparisons.

    Args:
        values: name -> ``[users]`` values of the same users in the same order (per user the mean over seeds, where
            there are several: a user's seeds are no independent observations).
        seed: of the random sign patterns.

    Returns:
        For every name but the first, :func:`paired_test` of it against the first, and ``p_adjusted``: p after Holm's
        step-down correction (Scand. J. Statist. 1979), which holds the chance of any false claim at the chosen level.
    """
    first, *others = values
    tests = {name: paired_test(values[name], values[first], seed) for name in others}
    for name, adjusted in holm({name: test["p_value"] for name, test in tests.items()}).items():
        tests[name]["p_adjusted"] = adjusted
    return tests


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values for their number: the i-th smallest of m is multiplied by m - i + 1, and none falls below its
    predecessor's."""
    adjusted = {}
    largest = 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p_value * (len(p_values) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _unknown(key: str, value: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = closest(str(value), known)
    hint = f"did you mean '{near}'?" if near else f"use one of {', '.join(known)}."
    return f"{key}: '{value}' is unknown; {hint}"
