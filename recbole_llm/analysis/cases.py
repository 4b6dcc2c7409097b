"""Case studies: a user's history, each model's best items, the truth, and what changes in another order (LLM-SRec, Figure 6;
LLM-STAR, Figure 9)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.order import ORIGINAL, OrderSettings, perturbed, rank
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, printable


@dataclass(frozen=True)
class CaseSettings:
    """Which users are shown.

    Attributes:
        users: how many; those whose target's rank an order moves most, for the first model.
        best: how many of each model's items.
    """

    users: int = 3
    best: int = 5

    def __post_init__(self) -> None:
        if any(type(value) is not int or value < 1 for value in (self.users, self.best)):
            raise UserError(f"users and best must be whole numbers above 0, not {self.users!r} and {self.best!r}.")


def rankings(model: TrainedModel, order: OrderSettings) -> dict[str, Any]:
    """Each test user's best items and the target's rank, by condition; and the histories as they stand in each."""
    test = model.splits["test"]
    splits = {ORIGINAL: test}
    for kind in order.inference:
        splits[f"inference {kind}"] = perturbed(test, kind, model.config["seed"], 0, order.within or model.reads)[0]
    found = {condition: rank(model, split) for condition, split in splits.items()}
    return {"splits": splits, "ranked": found}


def _history(split: TextSequentialDataset, row: int, most: int) -> list[list[str]]:
    """Title and date of the latest items of a row's history, oldest first; no date where the data has none."""
    shown, suffix = split.inter_feat[[row]], split.config["LIST_SUFFIX"]
    length = int(shown[split.item_list_length_field])
    kept = slice(max(0, length - most), length)
    items = shown[split.iid_field + suffix][0][kept].tolist()
    times = shown[split.time_field + suffix][0][kept].numpy()
    dates = split.item_dates(times) if split.has_dates else [""] * len(items)
    return [[split.item_texts[item], date] for item, date in zip(items, dates, strict=True)]


def show(model: TrainedModel, rows: np.ndarray, found: dict[str, Any], settings: CaseSettings) -> list[dict[str, Any]]:
    """The cases of one model: for each row the history, the best items and the target's rank, by condition."""
    test = model.splits["test"]
    users = test.id2token(test.uid_field, test.inter_feat[test.uid_field].numpy()[rows])
    cases = []
    for row, user in zip(rows.tolist(), np.atleast_1d(users).tolist(), strict=True):
        target = int(test.inter_feat[test.iid_field][row])
        conditions = {}
        for condition, ranked in found["ranked"].items():
            best = [item for item in ranked.top[row].tolist() if item >= 0][: settings.best]
            conditions[condition] = {
                "history": _history(found["splits"][condition], row, model.reads),
                "best": [test.item_texts[item] for item in best],
                "rank": int(ranked.ranking.ranks[row]),
            }
        cases.append({"user": str(user), "truth": test.item_texts[target], "conditions": conditions})
    return cases


def analyze(job: Job, settings: CaseSettings, order: OrderSettings) -> list[dict[str, Any]]:
    """Case studies of each model and seed of a job, of the same users for all; what was computed before is read.

    A user's history may differ between models in length, as they read it. Lists end at the largest ``topk``.
    """
    data, results, chosen = SharedData(), [], {}
    for name, config in job.configs():
        seed = config["seed"]
        known = [trained.identity(name, config, data), asdict(settings), asdict(order), job.models[0], chosen.get(seed)]

        def compute(name=name, config=config, seed=seed):
            model = trained.obtain(name, config, data, job.models)
            found = rankings(model, order)
            if seed in chosen:
                ids = model.splits["test"].inter_feat[model.splits["test"].uid_field].tolist()
                place = {user: row for row, user in enumerate(ids)}
                rows = np.array([place[user] for user in chosen[seed]])
            else:
                rows = _moved_most(found["ranked"], settings.users)
            users = model.splits["test"].inter_feat[model.splits["test"].uid_field][torch.from_numpy(rows)].tolist()
            head = {"analysis": "cases", "model": name, "dataset": config["dataset"], "seed": seed, "users": users}
            return head | {"cases": show(model, rows, found, settings)}, None

        results.append(stored(job.folder("cases", name, config, known), known, compute))
        chosen.setdefault(seed, results[-1]["users"])
        gc.collect()
    return results


def _moved_most(ranked: dict[str, Any], count: int) -> np.ndarray:
    """Rows whose target's gain ``1 / log2(rank + 1)`` the other orders change most; the first rows where there are none."""
    gains = [1 / np.log2(found.ranking.ranks + 1.0) for found in ranked.values()]
    moved = np.max([np.abs(gain - gains[0]) for gain in gains], axis=0)
    return np.argsort(-moved, kind="stable")[:count]


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """The cases as text: history, truth, then each model's items."""
    text = [f"{results[0]['dataset']} · case studies"]
    for number, case in enumerate(results[0]["cases"]):
        text.append(f"\nUser {case['user']}; the next item was: {_line(case['truth'])}")
        for condition, first in case["conditions"].items():
            text.append(f"  {condition}")
            text += [f"    {date:<10}  {_line(title)}" for title, date in first["history"]]
            for result in results:
                found = result["cases"][number]["conditions"][condition]
                head = f"{result['model']} (seed {result['seed']})"
                text.append(f"    {head}: the next item is number {found['rank']}; best items:")
                text += [f"      {place}. {_line(title)}" for place, title in enumerate(found["best"], start=1)]
    return "\n".join(text)


def _line(title: str) -> str:
    """A title for a terminal: one line of at most 100 characters."""
    return printable(title)
