"""A trained LLM recommender: loaded from its folder, and asked for items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model, init_seed

from recbole_llm import checkpoint
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.loaders import dataloaders
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError, closest
from recbole_llm.trainer.checkpoint import load_trained_weights


def load(model_file: str | Path) -> tuple[Config, Any, TextSequentialDataset, Any, Any, Any]:
    """Load a trained LLM recommender with its data; the same six things as RecBole's ``load_data_and_model``.

    Args:
        model_file: a checkpoint folder of this library, or the weights file in it.

    Raises:
        UserError: no checkpoint, a truncated or foreign one, or data that is no longer the same.
    """
    folder = checkpoint.folder_of(model_file)
    record = checkpoint.read_record(folder)
    if record.get("kind") != "llm":
        raise UserError(f"{folder} holds a stock {record['model']}, not an LLM recommender: give the folder of one.")
    settings = dict(record["settings"])
    settings.pop("model", None)
    settings.pop("dataset", None)
    teacher = (record["teacher"] or {}).get("folder")
    if teacher and not settings.get("teacher_checkpoint") and checkpoint.exists(teacher):
        settings["teacher_checkpoint"] = teacher
    foundation = (record.get("foundation") or {}).get("folder")
    if foundation and checkpoint.exists(foundation):
        settings |= {"pretrained": foundation, "pretrain_datasets": None}
    config = make_config(record["model"], record["dataset"], config_dict=settings)
    data = SharedData()
    splits, train = data.splits(config), data.train(config)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train).to(config["device"])
    load_trained_weights(model, folder, config["model"])
    model.eval()
    return config, model, splits["train"], *dataloaders(config, train, splits)


def recommend(
    model_file: str | Path,
    user: str | None = None,
    history: Sequence[str] | None = None,
    topk: int = 10,
    exclude_history: bool = True,
) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Recommend items to a user of the dataset, or for a history given by titles.

    Args:
        model_file: a checkpoint folder.
        user: the user's id in the dataset; their whole history is read, the test item included.
        history: titles, oldest first.
        topk: how many items.
        exclude_history: leave out items of the history.

    Returns:
        the history's titles, and (item id, title, score) of the best items, best first.

    Raises:
        UserError: unknown user or title, or neither or both of them given.
    """
    if (user is None) == (history is None):
        raise UserError("Give either --user=<id> or --history='[title, title]'.")
    if topk < 1:
        raise UserError(f"topk is {topk}: give a whole number above 0.")
    config, model, dataset, *_ = load(model_file)
    splits = dataset.splits
    items = _items_of_user(splits["test"], user) if user is not None else _items_of_titles(dataset, history)
    length = config["MAX_ITEM_LIST_LENGTH"]
    kept = items[-length:]
    row = np.zeros((1, length), dtype=np.int64)
    row[0, : len(kept)] = kept
    interaction = Interaction(
        {
            model.USER_ID: torch.zeros(1, dtype=torch.long),
            model.ITEM_SEQ: torch.from_numpy(row),
            model.ITEM_SEQ_LEN: torch.tensor([len(kept)]),
        }
    )
    if user is not None:
        times = _with_target(splits["test"], user, dataset.time_field)[-length:]
    else:  # titles come without dates: the history ends where the data ends
        times = splits["test"].inter_feat[dataset.time_field].max().expand(len(kept))
    times = torch.nn.functional.pad(times, (0, length - len(times)))[None]
    interaction.update(Interaction({model.time_list_field: times}))
    scores = model.score(interaction.to(config["device"]), None)[0].cpu()
    if exclude_history:
        scores[torch.from_numpy(np.unique(items))] = float("-inf")
    best = scores.topk(min(topk, int(torch.isfinite(scores).sum())))
    tokens = dataset.field2id_token[dataset.iid_field]
    found = [
        (str(tokens[item]), dataset.item_texts[item], float(score))
        for score, item in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return [dataset.item_texts[item] for item in items], found


def _row_of_user(test: TextSequentialDataset, user: str) -> int:
    known = test.field2token_id[test.uid_field]
    if str(user) not in known or known[str(user)] == 0:
        near = closest(str(user), list(known)[1:])
        raise UserError(f"user: {test.dataset_name} has no user {user!r}" + (f"; the nearest is {near!r}." if near else "."))
    rows = np.flatnonzero(test.inter_feat[test.uid_field].numpy() == known[str(user)])
    if len(rows) == 0:
        raise UserError(f"user: {user!r} has too short a history in {test.dataset_name} to recommend from.")
    return int(rows[-1])


def _with_target(test: TextSequentialDataset, user: str, field: str) -> torch.Tensor:
    """A user's history in the test row with the test item behind it."""
    row = _row_of_user(test, user)
    length = int(test.inter_feat[test.item_list_length_field][row])
    history = test.inter_feat[field + test.config["LIST_SUFFIX"]][row, :length]
    return torch.cat([history, test.inter_feat[field][row : row + 1]])


def _items_of_user(test: TextSequentialDataset, user: str) -> np.ndarray:
    return _with_target(test, user, test.iid_field).numpy()


def _items_of_titles(dataset: TextSequentialDataset, titles: Sequence[str]) -> np.ndarray:
    if not titles:
        raise UserError("history: give at least one title.")
    by_title: dict[str, int] = {}
    for item, text in enumerate(dataset.item_texts[1:], start=1):
        by_title.setdefault(text.strip().casefold(), item)
    items = []
    for title in titles:
        item = by_title.get(str(title).strip().casefold())
        if item is None:
            near = closest(str(title), [text for text in dataset.item_texts[1:]])
            hint = f"; the nearest is {near!r}." if near else "."
            raise UserError(f"history: {dataset.dataset_name} has no item titled {title!r}{hint}")
        items.append(item)
    return np.array(items, dtype=np.int64)
