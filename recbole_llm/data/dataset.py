"""The dataset of all models: RecBole's sequential dataset with item texts, dates and the exact order of time.

RecBole's ``SequentialDataset`` knows ids only. This class adds what a language model needs (each item's text, the dates of
the interactions) and what a comparison needs (one split, one identity, the same rows for stock models and ours). Internal
ids, fields and rows are those that RecBole makes, with two differences that a stock model does not notice:

- Rows are in the order of their float64 timestamps, ties in the order of the file. RecBole rounds timestamps to float32
  before it sorts, and unix seconds are then 128 s apart.
- The timestamp field is float64, so that it still names the right day.

Invalid files raise ``UserError`` with the file, line and field before anything is computed.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction

from recbole_llm.config.settings import select
from recbole_llm.data import atomic
from recbole_llm.data.guards import GuardSettings, guarded, with_distinct_texts, without_repeated_rows
from recbole_llm.data.perturbation import training_order
from recbole_llm.data.reading import AtomicFilesDataset
from recbole_llm.data.rows import Histories, Rows
from recbole_llm.data.sequences import Ragged
from recbole_llm.data.temporal import Cuts, TemporalSettings, find_cuts, leave_out_unseen, lone_interactions, target_rows
from recbole_llm.data.timestamps import Timestamps
from recbole_llm.errors import UserError, printable

TRAIN_TARGETS = ("last", "window", "all")
SHORTEST_HISTORY = 3  # a user needs an item to start from, one to train on and one to test on

# What `timestamp_format: auto` takes for dates: 1990-01-01 to 2100-01-01, in seconds. Ranks (0, 1, 2, ...), scaled values in
# [0, 1] and numbers such as 20180131 lie far below.
_EARLIEST_DATE, _LATEST_DATE = 631_152_000, 4_102_444_800
_SHARE_OF_DATES = 0.99  # a few broken timestamps (0, -1) do not make the others ranks
_YEAR_1, _YEAR_10000 = -62_135_596_800, 253_402_300_800


class TextSequentialDataset(AtomicFilesDataset):
    """A sequential dataset with item text and dates, for stock RecBole models and ours.

    Configuration keys beside RecBole's: ``item_text`` (fields of the ``.item`` file, default ``title``),
    ``item_text_separator`` (default ``", "``), ``item_representation`` (title or id; default title), ``timestamp_format``
    (auto, unix, unix_ms or none; default auto), ``train_targets`` (last, window or all; default all), ``like_threshold``: where
    it is set, ratings are read too; and ``shuffle_training``: where it is set, each user's training sequence is put into
    another order, once, drawn from ``seed``; histories and targets of validation and test stay as they are.

    Attributes:
        item_texts (list[str]): text of each item by internal id, cleaned and whole (see ``atomic.clean_text``); ``""`` for
            id 0, the padding. An item without text has its id token as text, and so has every item under
            ``item_representation: id`` ("w/o text", LLM-STAR Table 2).
        item_attributes (list[tuple[str, ...]]): the texts that each of ``item_texts`` is joined from, one for each field of
            ``item_text`` that is not empty.
        item_file_tokens (list[str]): ids in the ``.item`` file, line by line below its header.
        timestamps (Timestamps): what the values of the timestamp field are.
        has_dates (bool): whether timestamps are points in time (``item_dates`` then works) and not mere ranks.
        user_items (Sequence[np.ndarray]): by internal user id, the sorted distinct internal ids of all items that the user ever
            interacted with, whatever the split.
        interactions (int): how many there are in all splits together, after filtering.
        fingerprint (str): sha256 (hex) of the ids, the interactions in order and the settings of the split. Equal
            fingerprints mean equal internal ids, histories, targets, times and (where they are read) ratings; what a model
            does with them (the longest history it reads, the training targets) is no part of it.
        text_fingerprint (str): the same with the items' texts: what an LLM recommender's data are.
        column_fingerprint (str): the same with all further columns that are loaded: what a stock model's data are.
        splits (dict[str, TextSequentialDataset]): on every split that ``build`` returns: ``train`` (all its rows),
            ``valid`` and ``test``.
        all_rows (TextSequentialDataset): on the train split that ``build`` returns: the same with all its rows.
        inter_file, item_file (Path): the files that it was read from.
        cuts (Cuts | None): where the data are split by time for all users, the two cuts.
        lone_interactions (tuple[torch.Tensor, torch.Tensor] | None): under such a split the users (int64 ``[n]``) that have
            one training interaction, and so no training row, and its items.
    """

    item_texts: list[str]
    item_attributes: list[tuple[str, ...]]
    item_file_tokens: list[str]
    timestamps: Timestamps
    has_dates: bool
    user_items: Ragged
    interactions: int
    fingerprint: str
    text_fingerprint: str
    column_fingerprint: str
    cuts: Cuts | None = None
    lone_interactions: tuple[torch.Tensor, torch.Tensor] | None = None

    def _get_field_from_config(self) -> None:
        self._temporal = TemporalSettings.of_config(self.config)
        self._guards = select(GuardSettings, self.config)
        super()._get_field_from_config()

    # ---- Filtering

    def _remove_duplication(self) -> None:
        """As RecBole's, with a stable sort: of equal timestamps, the first in the file is the first."""
        fields = self.uid_field, self.iid_field, self.time_field
        self.inter_feat = without_repeated_rows(self.inter_feat, fields, self._guards, self.logger)
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        ordered = self.inter_feat.sort_values(by=self.time_field, kind="stable")
        self.inter_feat = ordered.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep).copy()

    def _reset_index(self) -> None:
        """The last step of filtering: check what is left, before RecBole refuses it without saying why."""
        if self.inter_feat.empty:
            raise UserError(
                f"no interaction of {self.inter_file} is left after filtering ({self._active_filters()}): loosen these keys"
            )
        self._check_histories()
        if self._temporal is not None:
            times = self.inter_feat[self.time_field].to_numpy(np.float64)
            self.cuts = find_cuts(self._temporal, times, self._timestamp_unit(times))
            periods = self.cuts.period(times)
            kept, said = leave_out_unseen(self.inter_feat, self.uid_field, self.iid_field, periods, self._temporal)
            self.inter_feat = self.inter_feat[kept].copy()
            self.logger.info(f"{self.dataset_name}: {self.cuts}; {said}")
        super()._reset_index()

    def _active_filters(self) -> str:
        keys = ("rm_dup_inter", "val_interval", "user_inter_num_interval", "item_inter_num_interval")
        active = [f"{key}: {self.config[key]}" for key in keys if self.config[key] not in (None, "[0,inf)")]
        if self.config["filter_inter_by_user_or_item"] and (self.user_feat is not None or self.item_feat is not None):
            active.append("filter_inter_by_user_or_item: True")
        return "; ".join(active)

    def _check_histories(self) -> None:
        if "LS" not in (self._settings.eval_args.get("split") or {}):
            return
        lengths = self.inter_feat[self.uid_field].value_counts()
        short = lengths[lengths < SHORTEST_HISTORY]
        if len(short):
            raise UserError(
                f"{len(short)} of {len(lengths)} users in {self.inter_file} have fewer than {SHORTEST_HISTORY} interactions "
                f"after filtering (user {printable(repr(short.index[0]))} has {short.iloc[0]}), too few to leave the last ones "
                f'out for validation and test: set user_inter_num_interval: "[{SHORTEST_HISTORY},inf)" to leave these users out'
            )

    # ---- After RecBole has given internal ids: order, times, identity, text

    def _data_processing(self) -> None:
        super()._data_processing()
        self.item_attributes = with_distinct_texts(self._collect_item_attributes(), self._guards, self.logger)
        self.text_fingerprint = self._identify_texts()
        self.column_fingerprint = self._identify_columns()
        self.item_texts = [self._settings.item_text_separator.join(attributes) for attributes in self.item_attributes]
        self.user_items = self._collect_user_items()
        self.interactions = len(self.inter_feat)
        del self._attributes_of_token, self._recorded_times

    def _identify_texts(self) -> str:
        """sha256 of the fingerprint and the items' texts."""
        return hashlib.sha256(json.dumps([self.fingerprint, self.item_attributes]).encode()).hexdigest()

    def _identify_columns(self) -> str:
        """sha256 of the fingerprint and all further columns of users, items and interactions that are loaded."""
        of_sequences = {self.uid_field, self.iid_field, *self._number_fields()}
        digest = hashlib.sha256(self.fingerprint.encode())
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in sorted(set(feat) - of_sequences):
                digest.update(f"\n{name} {field} ".encode())
                digest.update("\t".join(map(str, self.field2id_token.get(field, ()))).encode("utf-8", "surrogatepass"))
                for value in feat[field]:
                    digest.update(np.asarray(value, np.float64).tobytes() + b";")
        return digest.hexdigest()

    def _normalize(self) -> None:
        """Sort the rows by time and find out what the timestamps are, then let RecBole rescale what it is asked to."""
        order = np.argsort(self.inter_feat[self.time_field].to_numpy(), kind="stable")
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)
        times = self.inter_feat[self.time_field].to_numpy(np.float64, copy=True)
        unit = self._timestamp_unit(times)
        self.fingerprint = self._identify(times)

        super()._normalize()
        # Models see the field as it is now; item_dates undoes what was done to it.
        rescaled = not np.array_equal(self.inter_feat[self.time_field].to_numpy(), times)
        undone = (float(times.min()), float(times.max() - times.min())) if rescaled else ()
        self.timestamps = Timestamps(unit, *undone)
        self.has_dates = self.timestamps.are_dates

    def _timestamp_unit(self, times: np.ndarray) -> int | None:
        """Return how many units of the timestamps are a second, or None where they are no dates."""
        kind = self._settings.timestamp_format
        units = {"unix": 1, "unix_ms": 1000}
        if kind == "auto":
            for name, unit in units.items():
                inside = (times >= _EARLIEST_DATE * unit) & (times <= _LATEST_DATE * unit)
                if inside.mean() >= _SHARE_OF_DATES:
                    kind = name
        if kind in units:
            self._check_calendar(times, kind, units[kind])
        self.logger.debug(f"timestamps of {self.inter_file} are {kind if kind in units else 'ranks, not dates'}")
        return units.get(kind)

    def _check_calendar(self, times: np.ndarray, kind: str, unit: int) -> None:
        """Refuse a timestamp that ``timestamp_format: kind``, ``unit`` to the second, puts outside the years 1 to 9999."""
        outside = times[(times < _YEAR_1 * unit) | (times >= _YEAR_10000 * unit)]
        if not len(outside):
            return
        recorded, lines = self._recorded_times
        row = int(np.flatnonzero(np.isin(recorded, outside))[0])
        raise UserError(
            f"{self.inter_file}:{lines[row]} has {recorded[row]:.15g} as {self.time_field}, which is beyond the calendar "
            f"(years 1 to 9999) as timestamp_format: {kind} reads it: correct or remove the line, or set the key to none"
        )

    def _identify(self, times: np.ndarray) -> str:
        split = {key: self._settings.eval_args.get(key) for key in ("split", "order", "group_by")}
        digest = hashlib.sha256(json.dumps(split, sort_keys=True, default=str).encode())
        for field in (self.uid_field, self.iid_field):
            digest.update("\0".join(self.field2id_token[field].tolist()).encode("utf-8", "surrogatepass"))
            digest.update(self.inter_feat[field].to_numpy().astype("<i8").tobytes())
        digest.update(times.astype("<f8").tobytes())
        if self._settings.like_threshold is not None:
            digest.update(self.inter_feat[self._settings.rating_field].to_numpy("<f8").tobytes())
        if self._guards.of_rows:
            digest.update(json.dumps(self._guards.of_rows, sort_keys=True).encode())
        if self.cuts is not None:
            digest.update(repr([self.cuts, self._temporal.unseen, self._temporal.test_targets]).encode())
        if self.config["shuffle_training"] is not None:
            digest.update(f"shuffle_training {self.config['shuffle_training']} {self.config['seed']}".encode())
        return digest.hexdigest()

    def _collect_item_attributes(self) -> list[tuple[str, ...]]:
        tokens = self.field2id_token[self.iid_field].tolist()
        if self._settings.item_representation == "id":
            return [(), *((token,) for token in tokens[1:])]
        attributes = [self._attributes_of_token.get(token, ()) for token in tokens]
        attributes[0] = ()  # the padding item, whatever a file may call [PAD]
        nameless = [index for index, texts in enumerate(attributes) if index and not texts]
        if nameless:
            self.logger.warning(
                f"{len(nameless)} of {len(tokens) - 1} items of {self.dataset_name} have no text in {self.item_file} "
                f"({', '.join(self._settings.item_text)}), for example item "
                f"{printable(repr(tokens[nameless[0]]))}: their id is their text"
            )
        for index in nameless:
            attributes[index] = (tokens[index],)
        return attributes

    def attributes_of(self, fields: list[str]) -> list[tuple[str, ...]]:
        """The texts of other fields of the ``.item`` file by internal id, as ``item_attributes``; ``()`` where all are empty.

        Raises:
            UserError: a field that the file does not have.
        """
        settings = self._settings
        found = atomic.read_item_attributes(
            self.item_file, self.iid_field, fields, settings.field_separator, settings.encoding, "sentence_text"
        )
        tokens = self.field2id_token[self.iid_field].tolist()
        return [(), *(found.get(token, ()) for token in tokens[1:])]

    def item_attribute_names(self) -> list[tuple[str, ...]]:
        """The field of the ``.item`` file that each text of ``item_attributes`` is of; an item's id is its first field's."""
        settings = self._settings
        named = atomic.read_named_attributes(
            self.item_file, self.iid_field, settings.item_text, settings.field_separator, settings.encoding
        )
        names = []
        for token, texts in zip(self.field2id_token[self.iid_field].tolist(), self.item_attributes, strict=True):
            fields = tuple(field for field, _ in named.get(token, ()))
            names.append(fields if len(fields) == len(texts) else tuple(settings.item_text[: len(texts)]))
        return names

    def _collect_user_items(self) -> Ragged:
        users = self.inter_feat[self.uid_field].to_numpy().astype(np.int64)
        items = self.inter_feat[self.iid_field].to_numpy().astype(np.int64)
        users, items = np.divmod(np.unique(users * self.item_num + items), self.item_num)
        return Ragged(items, np.searchsorted(users, np.arange(self.user_num + 1)))

    def item_dates(self, timestamps: np.ndarray) -> list[str]:
        """Return the day (UTC) of each timestamp as ``YYYY-MM-DD``.

        Args:
            timestamps: values of the timestamp field as interactions hold them, any shape. The zeros that pad a
                ``timestamp_list`` are values like others: leave them out.

        Raises:
            ValueError: the dataset has no dates (look at ``has_dates`` first).
        """
        return self.timestamps.days(timestamps)

    # ---- Rows and splits

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        interaction = super()._dataframe_to_interaction(data)
        if self.time_field in data and self.time_field not in self.config["numerical_features"]:
            interaction[self.time_field] = torch.tensor(data[self.time_field].to_numpy(np.float64, copy=True))
        return interaction

    def data_augmentation(self) -> None:
        """Make one row per prefix: the same tensors as RecBole's, whose histories are copied when they are read.

        ``u1`` with the items ``<i1, i2, i3, i4>`` gives ``u1, <i1> | i2``, ``u1, <i1, i2> | i3``, ``u1, <i1, i2, i3> | i4``.
        List fields have the shape ``[rows, MAX_ITEM_LIST_LENGTH, ...]``, padded with 0 on the right; of a longer history the
        latest items are kept.
        """
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        users = self.inter_feat[self.uid_field]
        row = torch.arange(len(users))
        starts = torch.cat([torch.ones(1, dtype=torch.bool), users[1:] != users[:-1]])
        first_row = torch.cummax(torch.where(starts, row, 0), dim=0).values  # where the user's sequence begins
        source = self.inter_feat.interaction
        targets = ends = row[~starts]
        if self.cuts is not None:
            known = users.numpy(), source[self.time_field].numpy(), self.cuts
            targets, ends = map(torch.from_numpy, target_rows(*known, self._temporal.test_targets))
            lone = torch.from_numpy(lone_interactions(*known))
            self.lone_interactions = users[lone], source[self.iid_field][lone]
        lengths = (ends - first_row[targets]).clamp(max=self.max_item_list_len)

        if self.config["shuffle_training"] is not None:
            # The sequences in another order stand behind the original ones; the training rows are read from there.
            items, split = self.inter_feat[self.iid_field].numpy(), self.config["eval_args"]["split"]
            known = items, users.numpy(), first_row.numpy()
            order, is_training = training_order(*known, self.config["shuffle_training"], int(self.config["seed"]), split)
            moved = {field: values[order] for field, values in source.items() if field not in (self.uid_field, self.time_field)}
            source = {field: torch.cat([values, moved.get(field, values)]) for field, values in source.items()}
            targets = ends = targets + len(users) * is_training[targets]
        rows = {field: values[targets] for field, values in source.items()}
        rows[self.item_list_length_field] = lengths
        for field, values in source.items():
            if field != self.uid_field:
                list_field = getattr(self, f"{field}_list_field")
                rows[list_field] = Histories.of(values, ends - lengths, lengths, self.max_item_list_len)
        self.inter_feat = Rows(rows)

    def leave_one_out(self, group_by: str, leave_one_mode: str) -> list[TextSequentialDataset]:
        """The splits that RecBole makes, with its rows in its order, without a list of Python integers for each user."""
        left_out = {"valid_and_test": 2, "valid_only": 1, "test_only": 1}[leave_one_mode]
        groups = self.inter_feat[group_by].numpy()
        _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        order = np.lexsort([np.arange(len(groups)), first[inverse]])  # groups in the order in which they begin
        counts = counts[inverse][order]
        starts = np.flatnonzero(np.r_[True, np.diff(first[inverse][order]) != 0])
        place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
        behind = np.maximum(place - (counts - np.minimum(left_out, counts - 1)) + 1, 0)  # 0: in training
        behind += np.where(behind > 0, np.maximum(left_out - (counts - 1), 0), 0)  # of a short sequence the last are left out
        parts = [order[behind == part] for part in range(left_out + 1)]
        if left_out == 1:
            parts.insert(2 if leave_one_mode == "valid_only" else 1, order[:0])
        self._drop_unused_col()
        return [self.copy(self.inter_feat[part]) for part in parts]

    def build(self) -> list[TextSequentialDataset]:
        """Return the train, valid and test splits, as RecBole makes them.

        With ``train_targets: last``, and with ``window``, the train split has one row per user, the user's last training item;
        ``train.all_rows`` keeps them all. All splits share item texts, users' items and the fingerprint.
        """
        targets = self.config["train_targets"] or "all"  # read here: the same dataset may be split for each of them
        if targets not in TRAIN_TARGETS:
            raise UserError(f"the key train_targets is {targets!r}: set it to one of {', '.join(TRAIN_TARGETS)}")
        train, valid, test = super().build() if self.cuts is None else self._split_by_time()
        self._check_splits({"train": train, "valid": valid, "test": test})
        kept = guarded(train, {"valid": valid, "test": test}, self.item_texts, self._guards, self.logger)
        valid, test = kept["valid"], kept["test"]

        all_rows = train
        if targets != "all":
            users = all_rows.inter_feat[self.uid_field]
            last = torch.zeros(self.user_num, dtype=torch.long)
            # Of a user's rows the last in the split is the latest. (Highest row number: an index may repeat.)
            last.scatter_reduce_(0, users, torch.arange(len(users)), "amax", include_self=False)
            kept = torch.sort(last[torch.unique(users)]).values
            train = all_rows.copy(all_rows.inter_feat[kept])
        train.all_rows = all_rows
        splits = {"train": all_rows, "valid": valid, "test": test}
        for split in (train, all_rows, valid, test):
            split.splits = splits
        return [train, valid, test]

    def _split_by_time(self) -> list[TextSequentialDataset]:
        self._change_feat_format()
        periods = self.cuts.period(self.inter_feat[self.time_field].numpy())
        return [self.copy(self.inter_feat[np.flatnonzero(periods == part)]) for part in range(3)]

    def _check_splits(self, splits: dict[str, TextSequentialDataset]) -> None:
        split = self._settings.eval_args["split"]
        empty = [phase for phase, dataset in splits.items() if len(dataset) == 0]
        if empty and split == {"LS": "valid_and_test"}:
            raise UserError(
                f"no user in {self.inter_file} has enough interactions for a {empty[0]} row under the split {split} "
                f"(one needs {SHORTEST_HISTORY + 1} for train, valid and test): add longer histories, or loosen the filters"
            )
        if empty and self.cuts is not None:
            raise UserError(
                f"no user in {self.inter_file} has a {empty[0]} row, an interaction with others before it, under valid_from: "
                f"{self._temporal.valid_from} and test_from: {self._temporal.test_from}: move the cuts, or set unseen to keep"
            )
