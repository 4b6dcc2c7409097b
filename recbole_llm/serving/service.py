"""Questions and answers of a served model: a history is encoded once, and the items' vectors are searched once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.nn import functional

from recbole_llm.checkpoint import read_tensors
from recbole_llm.errors import UserError
from recbole_llm.exported import VECTORS
from recbole_llm.recommend import Recommendation, TrainedRecommender
from recbole_llm.serving.index import make_index
from recbole_llm.serving.titles import Titles
from recbole_llm.serving.vectors import Vectors, vectors_of

SAMPLE = 128  # users whose vectors tell how far FAISS must look
_REASONS = 2  # items of the history that are named for a recommended one
_AT_ONCE = 32  # users of a sample that are encoded at a time


class UnknownUserError(UserError):
    """A user, title or id that the data set does not have."""


@dataclass(frozen=True)
class Query:
    """A question that was checked.

    Attributes:
        user: internal id; 0 where a history was given.
        items: internal ids of the history, oldest first, int64.
        times: their timestamps, float64.
        topk: the most items of the answer.
        exclude_history: whether items of the history may not be recommended.
    """

    user: int
    items: np.ndarray
    times: Tensor
    topk: int
    exclude_history: bool


@dataclass(frozen=True)
class Reason:
    """An item of the history that is near a recommended one.

    Attributes:
        item, title: which.
        similarity: cosine of the two items' vectors.
    """

    item: str
    title: str
    similarity: float


@dataclass(frozen=True)
class Answer:
    """What is recommended, best first, and for each the nearest items of the history."""

    items: Sequence[Recommendation]
    reasons: Sequence[Sequence[Reason]]


class Service:
    """Answers questions by a trained model's vectors.

    Args:
        trained: a loaded model, of a run or an export.
        search: auto, exact or faiss.

    Raises:
        UserError: a model whose score is no product of vectors, or a search that is not installed.
    """

    def __init__(self, trained: TrainedRecommender, search: str = "auto") -> None:
        self.trained = trained
        self.vectors: Vectors = vectors_of(trained)
        self.index = make_index(self.vectors.items, search, lambda: sample_of_users(trained, self.vectors))
        dataset = trained.dataset
        self.titles = Titles([str(token) for token in dataset.field2id_token[dataset.iid_field]], dataset.item_texts)
        self.model, self.dataset = str(trained.config["model"]), str(trained.config["dataset"])
        self.items = len(self.titles.texts) - 1
        self.has_users = bool(len(trained.users()))

    def query(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        topk: int = 10,
        exclude_history: bool = True,
    ) -> Query:
        """A question about a user of the data set, or about a history of titles or ids, oldest first.

        Raises:
            UnknownUserError: there is no such user, title or id.
            UserError: both or neither are given, an empty history, or a model that needs users.
        """
        if (user is None) == (history is None):
            raise UserError("give either user or history.")
        if user is not None:
            number = self._user(user)
            return Query(number, *self.trained.sequence_of_user(number), topk, exclude_history)
        if not history:
            raise UserError("history: give at least one title.")
        items = [self._item(name) for name in history]
        return Query(0, *self.trained.sequence_of_items(items), topk, exclude_history)

    def _user(self, name: str) -> int:
        dataset = self.trained.dataset
        number = dataset.field2token_id[dataset.uid_field].get(name)
        if not number:
            if getattr(dataset, "histories", True) is None:
                raise UserError("user: this export holds no users: give a history of titles or ids.")
            raise UnknownUserError(f"user: {self.dataset} has no user {name!r}.")
        return int(number)

    def _item(self, name: str) -> int:
        item = self.titles.find(name)
        if item is None:
            near = self.titles.nearest(name)
            hint = f"; the nearest is {near!r}." if near else "."
            raise UnknownUserError(f"history: {self.dataset} has no item with the title or id {name!r}{hint}")
        return item

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer questions together: one batch for the LLM, one search."""
        users = torch.tensor([query.user for query in queries])
        rows = self.trained.rows([(query.items, query.times) for query in queries], users)
        excluded = [np.unique(query.items) if query.exclude_history else query.items[:0] for query in queries]
        found = self.index.search(self.vectors.encode(rows), [query.topk for query in queries], excluded)
        return [
            Answer(self._named(items, scores), self._reasons(items, query.items))
            for (items, scores), query in zip(found, queries, strict=True)
        ]

    def _named(self, items: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        ids, texts = self.titles.ids, self.titles.texts
        return [Recommendation(ids[item], texts[item], float(score)) for item, score in zip(items, scores, strict=True)]

    def _reasons(self, items: np.ndarray, history: np.ndarray) -> list[list[Reason]]:
        """For each recommended item the items of the history whose vectors are nearest by cosine."""
        latest = np.unique(history)
        recommended, known = (functional.normalize(self._vectors(which), dim=-1) for which in (items, latest))
        nearest = (recommended @ known.T).topk(min(_REASONS, len(latest)), dim=1)
        return [
            [
                Reason(self.titles.ids[item], self.titles.texts[item], float(cosine))
                for item, cosine in zip(latest[places], cosines, strict=True)
            ]
            for places, cosines in zip(nearest.indices.cpu().numpy(), nearest.values.cpu().numpy(), strict=True)
        ]

    def _vectors(self, items: np.ndarray) -> Tensor:
        return self.vectors.items[torch.from_numpy(items).to(self.vectors.items.device)]


def sample_of_users(trained: TrainedRecommender, vectors: Vectors, most: int = SAMPLE) -> Tensor:
    """Vectors of users of the data set, evenly spread, ``[n, d]``; of an export, those that it brings along."""
    if trained.is_export:
        return read_tensors(trained.folder / VECTORS)["sample"]
    users = spread_users(trained, most)
    parts = [rows_of_users(trained, users[start : start + _AT_ONCE]) for start in range(0, len(users), _AT_ONCE)]
    return torch.cat([vectors.encode(rows).cpu() for rows in parts])


def spread_users(trained: TrainedRecommender, most: int) -> np.ndarray:
    """Internal ids of users of the data set, evenly spread, int64; ``most`` of them, or all."""
    users = trained.users()
    return users[:: max(1, len(users) // most)][:most]


def rows_of_users(trained: TrainedRecommender, users: np.ndarray) -> Interaction:
    """What the model reads of the whole histories of users."""
    return trained.rows([trained.sequence_of_user(int(user)) for user in users], torch.from_numpy(users))
