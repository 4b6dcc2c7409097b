"""For which users does a model work, and for which does order matter? Groups of users, from results by user; nothing is
encoded again.

Each grouping parts all users that have results:

* ``transition``: a user's t-score is the mean number of times that the consecutive pairs of the user's training items occur in
  all training sequences; top half against bottom half (LLM-SRec, Figure 3).
* ``target``: warm, cold or between: among the 35 % of items with the most, or the fewest, interactions (LLM-SRec, Figure 4).
* ``length``: interactions before the test item.
* ``popularity``: fifths of the users by the number of their target's training interactions, the rarest targets first.
* ``memorized``: whether a training sequence holds the target right behind the last item of the user's history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.analysis.dataset import Sequences, reachable_targets, read_sequences, training_transitions
from recbole_llm.analysis.job import PER_USER, Job, digest, read_columns, stored
from recbole_llm.analysis.order import ORIGINAL, OrderSettings
from recbole_llm.analysis.order import analyze as analyze_order
from recbole_llm.analysis.tables import decimal, format_columns, p_value, percent
from recbole_llm.errors import UserError
from recbole_llm.evaluation.intervals import DRAWS, compare

EXTREME_SHARE = 0.35
LENGTHS = (5, 10, 20, 50)


@dataclass(frozen=True)
class GroupSettings:
    """Where the results come from.

    Attributes:
        results: file of results by user: a run's ``per_user_file`` or an order analysis' ``per_user.tsv``; None: from
            an order analysis of the job's models.
        bootstrap: draws of the intervals.
    """

    results: str | None = None
    bootstrap: int = DRAWS


def t_scores(sequences: Sequences) -> np.ndarray:
    """Mean count, over all training sequences, of the consecutive pairs of each user's training items, float64 ``[users]``;
    0 for a user without such a pair."""
    codes, counts = training_transitions(sequences)
    is_training = sequences.from_end >= 2
    pairs = is_training[1:] & is_training[:-1] & (sequences.users[1:] == sequences.users[:-1])
    own = (sequences.items[:-1] * sequences.item_num + sequences.items[1:])[pairs]
    owner = np.repeat(np.arange(len(sequences.lengths)), sequences.lengths)[:-1][pairs]
    number = np.bincount(owner, minlength=len(sequences.lengths))
    total = np.bincount(owner, weights=counts[np.searchsorted(codes, own)], minlength=len(sequences.lengths))
    return total / np.maximum(number, 1)


def _halves(scores: np.ndarray) -> np.ndarray:
    """Whether each score is in the upper half; of equal scores the later ones are taken for the higher."""
    upper = np.zeros(len(scores), dtype=bool)
    upper[np.argsort(scores, kind="stable")[len(scores) // 2 :]] = True
    return upper


def group_users(sequences: Sequences, chosen: np.ndarray | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Part the users in each of the module's ways.

    Args:
        sequences: all interactions; a user's last one is the test item.
        chosen: which users to part, bool ``[users]``; None: all. Halves and fifths are those of the chosen ones.

    Returns:
        grouping -> group -> whether a chosen user is in it, bool ``[chosen users]``.
    """
    lengths, ends = sequences.lengths, sequences.starts + sequences.lengths - 1
    chosen = np.ones(len(lengths), dtype=bool) if chosen is None else chosen
    targets = sequences.items[ends][chosen]

    transition = _halves(t_scores(sequences)[chosen])
    interactions = np.bincount(sequences.items, minlength=sequences.item_num)
    by_popularity = np.argsort(-interactions[1:], kind="stable") + 1  # item ids, the most popular first
    by_popularity = by_popularity[interactions[by_popularity] > 0]
    extreme = int(EXTREME_SHARE * len(by_popularity))
    kind = np.zeros(sequences.item_num, dtype=np.int64)
    kind[by_popularity[:extreme]], kind[by_popularity[len(by_popularity) - extreme :]] = 1, 2

    history = lengths[chosen] - 1
    bins = np.digitize(history, LENGTHS, right=True)
    names = [f"up to {LENGTHS[0]}", *(f"{low + 1} to {high}" for low, high in zip(LENGTHS, LENGTHS[1:], strict=False))]
    names.append(f"over {LENGTHS[-1]}")

    in_training = np.bincount(sequences.items[sequences.from_end >= 2], minlength=sequences.item_num)[targets]
    fifth = np.empty(len(targets), dtype=np.int64)
    fifth[np.argsort(in_training, kind="stable")] = np.arange(len(targets)) * 5 // max(len(targets), 1)
    memorized = reachable_targets(sequences)[0][chosen]
    return {
        "transition": {"top half": transition, "bottom half": ~transition},
        "target": {name: kind[targets] == number for number, name in ((1, "warm"), (0, "between"), (2, "cold"))},
        "length": {name: bins == number for number, name in enumerate(names)},
        "popularity": {f"fifth {number + 1}": fifth == number for number in range(5)},
        "memorized": {"memorized": memorized, "new": ~memorized},
    }


def compare_groups(
    sequences: Sequences, columns: Mapping[str, np.ndarray], draws: int = DRAWS
) -> list[dict[str, Any]]:
    """Each model's metrics in each group, and how perturbed orders change them.

    Args:
        sequences: the dataset of the results.
        columns: of a file of results by user.
        draws: of the bootstrap.

    Returns:
        a mapping per model, seed, grouping and group: ``users``, ``metrics`` (means) and ``conditions``: condition -> metric ->
        :func:`recbole_llm.evaluation.intervals.compare` with the original.

    Raises:
        UserError: users that the dataset does not have.
    """
    metrics = [name for name in columns if "@" in name and not name.startswith("jaccard")]
    conditions = columns.get("condition", np.full(len(columns["user"]), ORIGINAL))
    place_of = {token: place for place, token in enumerate(sequences.user_tokens[sequences.users[sequences.starts]])}
    found = []
    for model, seed in dict.fromkeys(zip(columns["model"].tolist(), columns["seed"].tolist(), strict=True)):
        of_model = (columns["model"] == model) & (columns["seed"] == seed)
        original = np.flatnonzero(of_model & (conditions == ORIGINAL))
        unknown = [user for user in columns["user"][original].tolist() if user not in place_of]
        if unknown:
            raise UserError(f"results: the dataset has no user {unknown[0]!r}; name the dataset that the results are of.")
        places = np.array([place_of[user] for user in columns["user"][original].tolist()])
        original = original[np.argsort(places)]
        chosen = np.zeros(len(sequences.lengths), dtype=bool)
        chosen[places] = True
        if chosen.sum() != len(places):
            raise UserError(f"results: {model} has several results of one user; groups need one for each user.")
        others = {}
        for condition in dict.fromkeys(conditions[of_model].tolist()):
            rows = np.flatnonzero(of_model & (conditions == condition))
            rows = rows[np.argsort([place_of[user] for user in columns["user"][rows].tolist()])]
            if condition != ORIGINAL:
                others[condition] = rows
        for grouping, groups in group_users(sequences, chosen).items():
            for group, members in groups.items():
                if not members.any():
                    continue
                values = {name: columns[name][original[members]] for name in metrics}
                found.append(
                    {
                        "model": model,
                        "seed": seed,
                        "grouping": grouping,
                        "group": group,
                        "users": int(members.sum()),
                        "metrics": {name: float(column.mean()) for name, column in values.items()},
                        "conditions": {
                            condition: {
                                name: compare(values[name], columns[name][rows[members]], draws=draws) for name in metrics
                            }
                            for condition, rows in others.items()
                        },
                    }
                )
    return found


def analyze(job: Job, settings: GroupSettings, order: OrderSettings) -> dict[str, Any]:
    """Group the users of a file of results, or of an order analysis of the job's models, which is computed or read."""
    sequences = read_sequences(job.data_config())
    if settings.results is not None:
        columns = read_columns(settings.results)
    else:
        parts = [read_columns(Path(result["folder"]) / PER_USER) for result in analyze_order(job, order)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    values = {name: digest(column.tolist()) for name, column in columns.items()}
    known = [sequences.fingerprint, values, asdict(settings)]
    folder = Path(job.output) / f"groups-{job.dataset}-{digest(known)}"
    head = {"analysis": "groups", "dataset": job.dataset, "settings": asdict(settings)}
    return stored(
        folder, known, lambda: (head | {"groups": compare_groups(sequences, columns, settings.bootstrap)}, None)
    )


def format_result(result: dict[str, Any], metric: str | None = None) -> str:
    """A table of the groups in one metric (None: the first), one line per group and condition."""
    groups: Sequence[dict[str, Any]] = result["groups"]
    metric = metric or next(iter(groups[0]["metrics"]))
    lines = []
    for group in groups:
        head = [group["model"], str(group["seed"]), group["grouping"], group["group"], f"{group['users']:,}"]
        value = decimal(group["metrics"][metric])
        if not group["conditions"]:
            lines.append([*head, value, "", "", "", "", ""])
        for condition, metrics in group["conditions"].items():
            found = metrics[metric]
            interval = found["change_interval"]
            interval = f"[{percent(interval[0])}, {percent(interval[1])}]" if interval else "-"
            changed = [decimal(found["perturbed"]), percent(found["change"]), interval, p_value(found["p_value"])]
            lines.append([*head, value, condition, *changed])
    header = ["model", "seed", "grouping", "group", "users", metric, "condition", "perturbed", "change", "95 % interval", "p"]
    return f"{result['dataset']} · groups of users\n\n" + format_columns(header, lines, left=4)
