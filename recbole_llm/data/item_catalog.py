"""The items of a data set without its interactions: what a trained model is built on where it only recommends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import Ragged
from recbole_llm.data.timestamps import Timestamps
from recbole_llm.errors import UserError

PADDING = "[PAD]"
FINGERPRINTS = ("fingerprint", "text_fingerprint", "column_fingerprint")


@dataclass(frozen=True, kw_only=True)
class Times(Timestamps):
    """What a data set's timestamps are, and when it ends.

    Attributes:
        last: the latest one, as models see it.
    """

    last: float

    @classmethod
    def of(cls, dataset: TextSequentialDataset | ItemCatalog) -> Times:
        """Those of a data set."""
        if isinstance(dataset, ItemCatalog):
            return dataset.times
        last = float(dataset.splits["test"].inter_feat[dataset.time_field].max())
        return cls(last=last, **asdict(dataset.timestamps))


@dataclass(frozen=True)
class UserHistories:
    """Whole histories of users.

    Attributes:
        users: their ids.
        items: internal item ids of each, oldest first.
        times: their timestamps, float64.
    """

    users: Sequence[str]
    items: Ragged
    times: Ragged


class ItemCatalog:
    """Stands for a split of a ``TextSequentialDataset`` where a trained model is built to read histories.

    A model whose building reads more (interactions, attributes of items) fails with an ``AttributeError``.

    Args:
        config: RecBole configuration.
        ids, texts: of the items 1, 2, ...
        times: what timestamps are.
        fingerprints: ``FINGERPRINTS`` of the data set.
        histories: of users that may be asked for; None: there are none.

    Attributes:
        splits: itself, under each split's name.
    """

    def __init__(
        self,
        config: Any,
        ids: Sequence[str],
        texts: Sequence[str],
        times: Times,
        fingerprints: Mapping[str, str],
        histories: UserHistories | None = None,
    ) -> None:
        self.config, self.dataset_name = config, config["dataset"]
        self.uid_field, self.iid_field, self.time_field = (config[f"{name}_FIELD"] for name in ("USER_ID", "ITEM_ID", "TIME"))
        self.item_list_length_field = config["ITEM_LIST_LENGTH_FIELD"]
        self.max_item_list_len = config["MAX_ITEM_LIST_LENGTH"]
        self.item_texts, self.item_num = ["", *texts], len(texts) + 1
        self.times, self.histories = times, histories
        self.has_dates, self.item_dates = times.are_dates, times.days
        self.fingerprint, self.text_fingerprint, self.column_fingerprint = (fingerprints[name] for name in FINGERPRINTS)
        tokens = {self.iid_field: [PADDING, *ids], self.uid_field: [PADDING, *(histories.users if histories else ())]}
        self.field2id_token = {field: np.array(names, dtype=object) for field, names in tokens.items()}
        self.field2token_id = {field: {name: n for n, name in enumerate(names)} for field, names in tokens.items()}
        self.splits = dict.fromkeys(("train", "valid", "test"), self)

    def num(self, field: str) -> int:
        """How many items there are, padding included.

        Raises:
            AttributeError: another field's values are asked for.
        """
        if field != self.iid_field:
            raise AttributeError(f"{field} of a data set without interactions")
        return self.item_num

    def with_config(self, config: Any) -> ItemCatalog:
        """The same items under another configuration, a teacher's say."""
        fingerprints = {name: getattr(self, name) for name in FINGERPRINTS}
        ids = self.field2id_token[self.iid_field][1:].tolist()
        return ItemCatalog(config, ids, self.item_texts[1:], self.times, fingerprints, self.histories)

    def history(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """Items int64 and timestamps float64 of a user by internal id, oldest first.

        Raises:
            UserError: there are no users.
        """
        if self.histories is None:
            raise UserError("user: this export holds no users: give a history, or export the run again with --with_users=True.")
        return self.histories.items[user - 1], self.histories.times[user - 1]
