"""A trained model as an object that answers: which items come next, for users of its data set or for any histories.

>>> model = recbole_llm.load("saved/LLMSTAR-ml-100k-seed2020-0a1b2c3d4e")  # doctest: +SKIP
>>> model.recommend(histories=[["Toy Story", "GoldenEye"]], topk=3)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm import checkpoint, exported, registry
from recbole_llm.data.atomic import clean_text
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.item_catalog import ItemCatalog, Times
from recbole_llm.errors import UserError, closest
from recbole_llm.evaluation.stock_scores import stock_scores
from recbole_llm.loading import load_data_and_model
from recbole_llm.recommender.retrieval import RetrievalForm

ITEM_VECTORS = "item_vectors.safetensors"  # in the checkpoint's folder: what is ranked, encoded once
_ROWS = 256  # histories that are scored at a time

Filter = Callable[[str, str], bool]


class Recommendation(NamedTuple):
    """One recommended item.

    Attributes:
        item: its id in the data set.
        title: its text.
        score: what it is ranked by; to be compared within one list only.
    """

    item: str
    title: str
    score: float


def load(folder: str | Path, **given: Any) -> TrainedRecommender:
    """Load a trained model: an LLM recommender, or a model of RecBole, from the folder where its run keeps it.

    The folder may come from somebody else: its record is checked, and nothing is trained, unpickled or evaluated
    (:func:`recbole_llm.loading.load_data_and_model`).

    Args:
        folder: such as ``saved/LLMSTAR-ml-100k-seed2020-0a1b2c3d4e``, or one that ``recbole-llm export`` wrote.
        given: where things are that have moved since, of ``data_path``, ``teacher_checkpoint``, ``pretrained``, ``backbone``.

    Raises:
        UserError: no checkpoint, a damaged one, or other data than it was trained on.
    """
    return TrainedRecommender(folder, given)


class TrainedRecommender:
    """A trained model with its data; made by :func:`load`.

    Args:
        folder: of its checkpoint.
        given: see :func:`load`.

    Attributes:
        config: its RecBole configuration.
        model: the model itself, in evaluation mode.
        dataset: the training split, with ``item_texts`` and ``splits``; of an export, the items alone.
        is_export: whether the folder is an export.
    """

    def __init__(self, folder: str | Path, given: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder) if exported.is_export(folder) else checkpoint.folder_of(folder)
        self.is_export = exported.is_export(self.folder)
        self.dataset: TextSequentialDataset | ItemCatalog
        if self.is_export:
            self.config, self.model, self.dataset = exported.load_exported(self.folder, given)
        else:
            self.config, self.model, self.dataset, *_ = load_data_and_model(self.folder, given)
        self.model.eval()
        self._splits: Any = self.dataset.splits
        self._test: Any = self._splits["test"]
        self._score = self.model.score if registry.is_ours(self.config["model"]) else stock_scores(self.model)
        self._tokens = self.dataset.field2id_token[self.dataset.iid_field]
        self._items_by_title: dict[str, int] | None = None
        self._texts: dict[str, int] = {}
        self._by_user: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # split -> its rows by user, and their users
        self._is_ready = self.is_export  # which brings its vectors along
        self._last_time = torch.tensor(Times.of(self.dataset).last, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"TrainedRecommender({self.config['model']} on {self.config['dataset']}, {self.folder})"

    def recommend(
        self,
        users: Sequence[str] | str | None = None,
        histories: Sequence[Sequence[str]] | Sequence[str] | None = None,
        topk: int = 10,
        filter: str | Filter | None = "history",
        candidates: Sequence[str] | None = None,
        unknown_titles: str = "error",
    ) -> list[list[Recommendation]]:
        """Return the best items for each user or each history, best first.

        Args:
            users: ids of users of the data set; their whole histories are read, the test items included.
            histories: sequences of item titles or item ids, oldest first; a title counts before an id. One sequence of texts is
                one history. Their items have no dates: all happened when the data ends.
            topk: the most items of each list.
            filter: ``"history"`` leaves out items of the history; None leaves out nothing; a function (item id, title) -> bool
                says of each item whether it may be recommended.
            candidates: titles or ids of the items to choose from; None: all items. A model that generates titles must be
                given some: they stand in its prompt.
            unknown_titles: what a title in a history is that no item has: an ``error``, or ``text``, which the LLM reads in the
                prompt like any title, but without a vector.

        Raises:
            UserError: an unknown user, title or id; both or neither of users and histories; a model that cannot do this.
        """
        if (users is None) == (histories is None):
            raise UserError("recommend: give either users or histories.")
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise UserError(f"topk is {topk!r}: give a whole number above 0.")
        if not (filter is None or filter == "history" or callable(filter)):
            raise UserError(f"filter: {filter!r} is none of 'history', None and a function of an item's id and title.")
        if users is not None:
            asked = [self.user_number(str(user)) for user in ([users] if isinstance(users, str) else users)]
            sequences = [self.sequence_of_user(user) for user in asked]
            user_ids = torch.tensor(asked, dtype=torch.long)
        else:
            assert histories is not None
            self._check_needs_no_user()
            given = [histories] if histories and all(isinstance(entry, str) for entry in histories) else histories
            if unknown_titles not in ("error", "text"):
                raise UserError(f"unknown_titles is {unknown_titles!r}: give error or text.")
            as_text = unknown_titles == "text"
            sequences = [self._sequence_of_titles(history, as_text) for history in given]  # type: ignore[arg-type]
            user_ids = torch.zeros(len(sequences), dtype=torch.long)
        allowed = self._allowed(filter)
        chosen = None if candidates is None else self._items_of(candidates, "candidates")
        found = []
        for start in range(0, len(sequences), _ROWS):
            part = slice(start, start + _ROWS)
            scores = self._scores_of(sequences[part], user_ids[part], chosen)
            for (items, _), row in zip(sequences[part], scores, strict=True):
                if filter == "history":
                    row[torch.from_numpy(items[items < self.model.n_items])] = float("-inf")
                found.append(self._best(row.masked_fill(~allowed, float("-inf")), topk))
        return found

    def history_of(self, user: str) -> list[str]:
        """The titles of a user's whole history, oldest first."""
        return [self.dataset.item_texts[item] for item in self.sequence_of_user(self.user_number(str(user)))[0]]

    # Scores

    def _scores_of(
        self, sequences: Sequence[tuple[np.ndarray, Tensor]], users: Tensor, candidates: np.ndarray | None
    ) -> Tensor:
        """Scores of the whole catalog ``[B, n_items]``; -inf for what is no candidate."""
        self.prepare()
        interaction = self.rows(sequences, users)
        if candidates is None:
            return self.scores(interaction).cpu()
        wanted = torch.from_numpy(candidates).expand(len(sequences), -1)
        scores = self._score(interaction, wanted.to(self.config["device"])).cpu()
        return torch.full((len(sequences), self.model.n_items), float("-inf")).scatter(1, wanted, scores.float())

    def scores(self, rows: Interaction) -> Tensor:
        """Scores of the whole catalog for :meth:`rows`, ``[B, n_items]``."""
        return self._score(rows, None)

    def sequence_of_items(self, items: Sequence[int]) -> tuple[np.ndarray, Tensor]:
        """A history of internal item ids, oldest first, all of which happened when the data ends."""
        return np.array(items, dtype=np.int64), self._last_time.expand(len(items))

    def rows(self, sequences: Sequence[tuple[np.ndarray, Tensor]], users: Tensor) -> Interaction:
        """What a model reads of histories, on its device.

        Args:
            sequences: internal item ids int64 and timestamps float64 of each history, oldest first.
            users: internal ids int64 ``[B]``, 0 where a history is nobody's.
        """
        length = self.config["MAX_ITEM_LIST_LENGTH"]
        items = torch.zeros((len(sequences), length), dtype=torch.long)
        times = torch.zeros((len(sequences), length), dtype=torch.float64)
        lengths = torch.zeros(len(sequences), dtype=torch.long)
        for row, (history, dates) in enumerate(sequences):
            latest = history[-length:]
            items[row, : len(latest)] = torch.from_numpy(latest)
            times[row, : len(latest)] = dates[-length:]
            lengths[row] = len(latest)
        test = self._test
        suffix = test.config["LIST_SUFFIX"]
        fields = {
            test.uid_field: users,
            test.iid_field + suffix: items,
            test.item_list_length_field: lengths,
            test.time_field + suffix: times,
        }
        return Interaction(fields).to(self.config["device"])

    def _best(self, scores: Tensor, topk: int) -> list[Recommendation]:
        best = scores.topk(min(topk, int(torch.isfinite(scores).sum())))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Recommendation(str(self._tokens[item]), self.dataset.item_texts[item], score) for item, score in pairs]

    def _allowed(self, filter: str | Filter | None) -> Tensor:
        allowed = torch.ones(self.model.n_items, dtype=torch.bool)
        allowed[0] = False
        if callable(filter):
            texts = self.dataset.item_texts
            allowed[1:] = torch.tensor([bool(filter(str(self._tokens[n]), texts[n])) for n in range(1, len(texts))])
        return allowed

    # What is ranked, kept with the checkpoint

    def prepare(self) -> None:
        """Read the items' vectors that an earlier process encoded with these very weights, or encode and keep them."""
        form = getattr(self.model, "form", None)
        if self._is_ready or not isinstance(form, RetrievalForm):
            return
        file, identity = self.folder / ITEM_VECTORS, self._identity_of_vectors()
        stored = checkpoint.read_tensors_of(file, identity) if file.is_file() else None
        shape = (self.model.n_items, form.size)
        if stored is not None and stored.keys() == {"items"} and tuple(stored["items"].shape) == shape:
            form.item_table.fill(stored["items"].to(self.config["device"]))
        else:
            getLogger().info(f"{self.config['model']}: encoding {self.model.n_items - 1:,} items once; {file} will keep them")
            with torch.no_grad():
                table = form.item_table.whole()
            try:
                checkpoint.write_tensors(file, {"items": table}, {"identity": identity})
            except OSError as error:
                getLogger().warning(f"{file} cannot be written ({error.strerror}): the next process encodes the items again")
        self._is_ready = True

    def _identity_of_vectors(self) -> str:
        """Digest of everything that decides the items' vectors: weights, settings, LLM and texts."""
        with open(self.folder / checkpoint.WEIGHTS, "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256")
        llms = {name: backbone.identity for name, backbone in self.model.backbones.items()}
        recorded = checkpoint.read_record(self.folder).get("settings")
        digest.update(json.dumps([self.model.fingerprint, llms, recorded], default=str, sort_keys=True).encode())
        return digest.hexdigest()

    # Histories

    def users(self) -> np.ndarray:
        """Internal ids of the users that have a history, int64, in order; none of an export without users."""
        if isinstance(self.dataset, ItemCatalog):
            return np.arange(1, len(self.dataset.histories.users) + 1 if self.dataset.histories else 1)
        splits = self._splits.values()
        return np.unique(np.concatenate([split.inter_feat[self._test.uid_field].numpy() for split in splits]))

    def user_number(self, name: str) -> int:
        """The internal id of a user.

        Raises:
            UserError: there is no such user.
        """
        known = self._test.field2token_id[self._test.uid_field]
        user = known.get(name, 0)
        if user == 0:
            if isinstance(self.dataset, ItemCatalog) and self.dataset.histories is None:
                self.dataset.history(user)
            near = closest(name, list(known)[1:])
            hint = f"; the nearest is {near!r}." if near else "."
            raise UserError(f"user: {self.config['dataset']} has no user {name!r}{hint}")
        return int(user)

    def _rows_of_user(self, phase: str, user: int) -> np.ndarray:
        """The rows of a split that are of a user, in their order."""
        if phase not in self._by_user:
            users = self._splits[phase].inter_feat[self._test.uid_field].numpy()
            order = np.argsort(users, kind="stable")
            self._by_user[phase] = order, users[order]
        order, users = self._by_user[phase]
        return order[np.searchsorted(users, user) : np.searchsorted(users, user, side="right")]

    def sequence_of_user(self, user: int) -> tuple[np.ndarray, Tensor]:
        """All items of a user with their times, oldest first.

        Raises:
            UserError: the user is in no row, or an export has no users.
        """
        if isinstance(self.dataset, ItemCatalog):
            items_of_user, times_of_user = self.dataset.history(user)
            return items_of_user, torch.from_numpy(times_of_user)
        # Each item is some row's target, but what the first row begins with.
        items: list[Tensor] = []
        times: list[Tensor] = []
        for phase in ("train", "valid", "test"):
            split, rows = self._splits[phase], self._rows_of_user(phase, user)
            suffix = split.config["LIST_SUFFIX"]
            if len(rows) and not items:
                first = split.inter_feat[rows[:1]]
                length = int(first[split.item_list_length_field])
                items.append(first[split.iid_field + suffix][0, :length])
                times.append(first[split.time_field + suffix][0, :length])
            items.append(split.inter_feat[split.iid_field][rows])
            times.append(split.inter_feat[split.time_field][rows])
        sequence = torch.cat(items)
        if not len(sequence):
            name = self.dataset.id2token(self.dataset.uid_field, user)
            raise UserError(f"user: {str(name)!r} has too short a history in {self.config['dataset']} to recommend from.")
        return sequence.numpy(), torch.cat(times)

    def _sequence_of_titles(self, history: Sequence[str], as_text: bool) -> tuple[np.ndarray, Tensor]:
        if not history:
            raise UserError("history: give at least one title.")
        return self.sequence_of_items(self._items_of(history, "history", as_text).tolist())

    def _items_of(self, names: Sequence[str], key: str, as_text: bool = False) -> np.ndarray:
        """Internal ids of items given by title or id; with ``as_text``, numbers of texts for titles that no item has.

        Raises:
            UserError: naming the nearest title.
        """
        if self._items_by_title is None:
            self._items_by_title = {}
            for number, text in enumerate(self.dataset.item_texts[1:], start=1):
                self._items_by_title.setdefault(_folded(text), number)
        by_id = self.dataset.field2token_id[self.dataset.iid_field]
        items = []
        for name in names:
            item = self._items_by_title.get(_folded(name)) or by_id.get(str(name))
            if not item and as_text:
                item = self._number_of_text(str(name))
            if not item:
                near = closest(str(name), self.dataset.item_texts[1:])
                hint = f"; the nearest is {near!r}." if near else "."
                raise UserError(f"{key}: {self.config['dataset']} has no item with the title or id {name!r}{hint}")
            items.append(item)
        return np.array(items, dtype=np.int64)

    def _number_of_text(self, text: str) -> int:
        """A number for a text that is no item of the data set, to stand in a history."""
        form = getattr(self.model, "form", None)
        if not isinstance(form, RetrievalForm) or self.model.has_user_vector:
            what = "reads its teacher's vector of the user" if isinstance(form, RetrievalForm) else "reads items alone"
            raise UserError(f"unknown_titles: {self.config['model']} {what}; name items only.")
        cleaned = clean_text(text)
        if not cleaned:
            raise UserError("history: a title is empty.")
        if cleaned not in self._texts:
            self._texts[cleaned] = int(form.prompts.add_texts([cleaned])[0])
            getLogger().warning("%r is no item of %s: the LLM reads it as text, without a vector", text, self.config["dataset"])
        return self._texts[cleaned]

    def _check_needs_no_user(self) -> None:
        name = self.config["model"]
        if not hasattr(self.model, "ITEM_SEQ"):
            raise UserError(f"{name} knows users and no histories: name users of {self.config['dataset']}.")
        if hasattr(self.model, "user_embedding"):
            getLogger().warning("%s learned a vector of each user; a history without a user is scored with that of none", name)


def _folded(text: object) -> str:
    return str(text).strip().casefold()
