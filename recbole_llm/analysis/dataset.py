"""Does the data have order at all? Lengths, popularity, ties in time, repeats, sequential rules, transitions seen before.

Sequential rules are those of Klenitskiy et al., "Does It Look Sequential? An Analysis of Datasets for Evaluation of Sequential
Recommendations" (RecSys 2024), and of their public code (Antondfger/Does-It-Look-Sequential): an n-gram of consecutive
items of a user is a rule where it occurs more than ``support`` times in all sequences and where more than ``confidence`` of
the occurrences of its first n - 1 items go on with its last. They are counted before and after the sequences are shuffled, at
once (so that some short sequences keep their order); consecutive repeats are dropped first: i, i, j becomes i, j.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recbole.config import Config

from recbole_llm.analysis.job import Job, digest, stored
from recbole_llm.analysis.tables import decimal, format_columns, percent
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError


@dataclass(frozen=True)
class DatasetSettings:
    """How sequential rules are counted.

    Attributes:
        support: a rule occurs more often than this.
        confidence: a rule follows its beginning in more than this share of the cases.
        draws: shuffles, over which counts are averaged.
        keep_repeats: whether consecutive repeats are kept.
        seed: of the shuffles.
    """

    support: int = 5
    confidence: float = 0.1
    draws: int = 5
    keep_repeats: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.draws) is not int or self.draws < 1 or not 0 <= self.confidence <= 1 or self.support < 0:
            raise UserError(
                f"draws must be a whole number above 0, confidence in [0, 1] and support at least 0, not {self.draws}, "
                f"{self.confidence} and {self.support}."
            )


@dataclass(frozen=True)
class Sequences:
    """All interactions, sorted by user, then by time.

    Attributes:
        users, items: internal ids int64 ``[N]``.
        times: float64 ``[N]``.
        user_tokens: the user's own id by internal id.
        item_num: size of the catalogue, padding included.
        fingerprint: of the data, see :class:`TextSequentialDataset`.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_tokens: np.ndarray
    item_num: int
    fingerprint: str

    @property
    def starts(self) -> np.ndarray:
        """Where each user's sequence begins, int64 ``[users]``."""
        return np.flatnonzero(np.r_[True, self.users[1:] != self.users[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        """Interactions of each user, int64 ``[users]``."""
        return np.diff(np.r_[self.starts, len(self.users)])

    @property
    def from_end(self) -> np.ndarray:
        """How many interactions of the same user follow each one, int64 ``[N]``; 0: the test item, 1: the validation item."""
        ends = self.starts + self.lengths
        return np.repeat(ends, self.lengths) - 1 - np.arange(len(self.users))


def read_sequences(config: Config) -> Sequences:
    """Every user's sequence, after the filters of ``config``."""
    dataset = TextSequentialDataset(config)  # not built: one row per interaction, in the order of time
    rows = dataset.inter_feat
    order = np.argsort(rows[dataset.uid_field].to_numpy(), kind="stable")
    return Sequences(
        users=rows[dataset.uid_field].to_numpy()[order].astype(np.int64),
        items=rows[dataset.iid_field].to_numpy()[order].astype(np.int64),
        times=rows[dataset.time_field].to_numpy()[order].astype(np.float64),
        user_tokens=np.asarray(dataset.field2id_token[dataset.uid_field]).astype(str),
        item_num=dataset.item_num,
        fingerprint=dataset.fingerprint,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sequential rules
# ---------------------------------------------------------------------------------------------------------------------


def drop_consecutive_repeats(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Rows that are kept where an item that follows itself is dropped, bool ``[N]``."""
    return np.r_[True, (users[1:] != users[:-1]) | (items[1:] != items[:-1])]


def count_rules(users: np.ndarray, items: np.ndarray, order: int, support: int, confidence: float) -> int:
    """How many n-grams of consecutive items are sequential rules.

    Args:
        users, items: int64 ``[N]``, sorted by user, then by time.
        order: n, 2 or 3.
        support, confidence: see the module.
    """
    codes = items.astype(np.int64)  # the n-gram that begins at each place, as one number
    previous = codes
    for step in range(1, order):
        inside = users[step:] == users[:-step]
        _, previous = np.unique(codes, return_inverse=True)  # small numbers, so that products do not overflow
        previous_counts = np.bincount(previous[: len(codes)])
        codes = previous[: len(inside)] * (int(items.max()) + 1) + items[step:]
        counted_in = np.flatnonzero(inside)
        if step < order - 1:  # places at the end of a sequence begin no longer n-gram: give each a number of its own
            outside = np.flatnonzero(~inside)
            codes[outside] = codes.max(initial=0) + 1 + np.arange(len(outside))
    found, first, counts = np.unique(codes[counted_in], return_index=True, return_counts=True)
    of_beginning = previous_counts[previous[counted_in[first]]]
    return int(((counts > support) & (counts > confidence * of_beginning)).sum())


def shuffled_within_users(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of each user's rows, as places int64 ``[N]``; all orders are equally likely, the same one too."""
    return np.lexsort((rng.random(len(users)), users))


def sequential_rules(sequences: Sequences, settings: DatasetSettings) -> dict[str, dict[str, float | None]]:
    """Numbers of 2-gram and 3-gram rules before and after shuffling (the mean of the draws), and the relative change."""
    users, items = sequences.users, sequences.items
    if not settings.keep_repeats:
        kept = drop_consecutive_repeats(users, items)
        users, items = users[kept], items[kept]
    rng = np.random.default_rng(settings.seed)
    orders = [shuffled_within_users(users, rng) for _ in range(settings.draws)]
    found = {}
    for n in (2, 3):
        before = count_rules(users, items, n, settings.support, settings.confidence)
        after = float(np.mean([count_rules(users, items[o], n, settings.support, settings.confidence) for o in orders]))
        found[f"{n}-grams"] = {"before": before, "after": after, "change": after / before - 1 if before else None}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Transitions
# ---------------------------------------------------------------------------------------------------------------------


def training_transitions(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of consecutive items in the training sequences (all but each user's last two interactions).

    Returns:
        distinct pairs, ``first * item_num + second``, sorted, and how often each occurs.
    """
    is_training = sequences.from_end >= 2
    pairs = is_training[1:] & is_training[:-1] & (sequences.users[1:] == sequences.users[:-1])
    codes = sequences.items[:-1] * sequences.item_num + sequences.items[1:]
    return np.unique(codes[pairs], return_counts=True)


def is_known(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each code is among the sorted ``known`` ones."""
    if not len(known):
        return np.zeros(len(codes), dtype=bool)
    return known[np.minimum(np.searchsorted(known, codes), len(known) - 1)] == codes


def reachable_targets(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Whether a training sequence holds the test target right behind the last item of the user's history, and behind any
    item of it: bool ``[users]`` each, for users of at least two interactions False otherwise."""
    known, _ = training_transitions(sequences)
    ends = sequences.starts + sequences.lengths - 1
    targets = sequences.items[np.repeat(ends, sequences.lengths)]
    codes = sequences.items * sequences.item_num + targets
    seen = is_known(codes, known) & (sequences.from_end > 0)
    from_last = np.where(sequences.lengths > 1, seen[np.maximum(ends - 1, 0)], False)
    return from_last, np.logical_or.reduceat(seen, sequences.starts)


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def describe(sequences: Sequences, settings: DatasetSettings) -> dict[str, Any]:
    """All figures of a dataset, see :func:`format_result` for what they are."""
    users, items, times = sequences.users, sequences.items, sequences.times
    lengths, starts = sequences.lengths, sequences.starts
    pairs = users[1:] == users[:-1]
    tied = pairs & (times[1:] == times[:-1])
    first_time = np.zeros(len(users), dtype=bool)  # whether it is the user's first interaction with the item
    first_time[np.unique(users * sequences.item_num + items, return_index=True)[1]] = True
    popularity = np.sort(np.bincount(items, minlength=sequences.item_num)[1:])[::-1]
    popularity = popularity[popularity > 0]
    ascending, rank = popularity[::-1], np.arange(1, len(popularity) + 1)
    gini = float((2 * rank - len(rank) - 1) @ ascending / (len(rank) * ascending.sum()))
    last_pair = starts + lengths - 2  # validation item and test item
    from_last, from_any = reachable_targets(sequences)
    ends = starts + lengths - 1
    pair_count = max(int(pairs.sum()), 1)
    tied_users = np.bincount(users[1:][tied], minlength=int(users.max()) + 1)
    return {
        "users": len(lengths),
        "items": len(popularity),
        "interactions": len(users),
        "density": len(users) / (len(lengths) * len(popularity)),
        "length": {
            "mean": float(lengths.mean()),
            **{name: float(np.quantile(lengths, q)) for name, q in (("min", 0), ("median", 0.5), ("90 %", 0.9), ("max", 1))},
        },
        "popularity": {
            "mean": float(popularity.mean()),
            **{name: float(np.quantile(popularity, q)) for name, q in (("min", 0), ("median", 0.5), ("max", 1))},
            "gini": gini,
            "top_10_percent": float(popularity[: max(1, len(popularity) // 10)].sum() / len(users)),
        },
        "ties": {
            "pairs": float(tied.sum() / pair_count),
            "users": float((tied_users > 0).sum() / len(lengths)),
            "test_items": float((tied_between(times, last_pair, lengths)).mean()),
        },
        "repeats": {
            "consecutive": float((pairs & (items[1:] == items[:-1])).sum() / pair_count),
            "interactions": float((~first_time).mean()),
            "test_items": float((~first_time[ends]).mean()),
        },
        "rules": sequential_rules(sequences, settings),
        "reachable": {"from_last": float(from_last.mean()), "from_any": float(from_any.mean())},
    }


def tied_between(times: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each user's last two interactions have one time, bool ``[users]``."""
    return (lengths > 1) & (times[np.maximum(first, 0)] == times[np.maximum(first, 0) + (lengths > 1)])


def analyze(job: Job, settings: DatasetSettings) -> dict[str, Any]:
    """Describe the dataset of a job; a description that was computed before is read."""
    config = job.data_config()
    sequences = read_sequences(config)
    known = [sequences.fingerprint, asdict(settings)]
    folder = Path(job.output) / f"dataset-{job.dataset}-{digest(known)}"
    result = {"analysis": "dataset", "dataset": job.dataset, "settings": asdict(settings)}
    return stored(folder, known, lambda: (result | describe(sequences, settings), None))


def format_result(result: dict[str, Any]) -> str:
    """A table of a dataset's figures."""
    length, popularity, ties, repeats = (result[key] for key in ("length", "popularity", "ties", "repeats"))

    def share(value: float) -> str:
        return percent(value, signed=False)

    lines = [
        ["users", f"{result['users']:,}"],
        ["items", f"{result['items']:,}"],
        ["interactions", f"{result['interactions']:,}"],
        ["density", f"{100 * result['density']:.3f} %"],
        ["length: mean / median / 90 % / max", _joined(length[name] for name in ("mean", "median", "90 %", "max"))],
        ["interactions of an item: mean / median / max", _joined(popularity[name] for name in ("mean", "median", "max"))],
        ["interactions with the most popular 10 % of items", share(popularity["top_10_percent"])],
        ["Gini coefficient of the items' popularity", decimal(popularity["gini"], 3)],
        ["consecutive interactions at one time", share(ties["pairs"])],
        ["users with such a tie", share(ties["users"])],
        ["test items at the time of the validation item", share(ties["test_items"])],
        ["consecutive interactions with one item", share(repeats["consecutive"])],
        ["interactions with an item that the user knows", share(repeats["interactions"])],
        ["test items that the user knows", share(repeats["test_items"])],
        ["test items seen in training right behind the history's last item", share(result["reachable"]["from_last"])],
        ["test items seen in training right behind any item of the history", share(result["reachable"]["from_any"])],
    ]
    for name, rules in result["rules"].items():
        counts = f"{rules['before']:,} / {rules['after']:,.1f} / {percent(rules['change'])}"
        lines.append([f"sequential {name} before / after shuffling / change", counts])
    settings = result["settings"]
    limits = f"support > {settings['support']}, confidence > {settings['confidence']}, mean of {settings['draws']} shuffles"
    repeats_kept = "kept" if settings["keep_repeats"] else "dropped"
    return (
        f"{result['dataset']}\n\n"
        + format_columns(["figure", "value"], lines)
        + f"\n\nRules: {limits}, consecutive repeats {repeats_kept}.\n"
        "Equal times leave the order of their interactions undefined: it is that of the file."
    )


def _joined(values) -> str:
    return " / ".join(f"{value:,.1f}" if value % 1 else f"{value:,.0f}" for value in values)
