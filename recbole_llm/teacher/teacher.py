"""The teacher: a stock RecBole sequential model, frozen, whose vectors the LLM learns from.

The user representation is what the stock model multiplies with its item vectors; where it comes from differs by model.
"""

from __future__ import annotations

import hashlib
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.config.identity import settings_for_teacher
from recbole_llm.config.presets import presets_of
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.item_catalog import ItemCatalog
from recbole_llm.data.sequences import gather_windows
from recbole_llm.errors import UserError
from recbole_llm.results.log import decimals
from recbole_llm.teacher import stock


def sequence_state(model: nn.Module, rows: Interaction) -> Tensor:
    return model.forward(rows[model.ITEM_SEQ], rows[model.ITEM_SEQ_LEN])


def _caser_state(model: nn.Module, rows: Interaction) -> Tensor:
    return model.forward(rows[model.USER_ID], rows[model.ITEM_SEQ])


def _bert4rec_state(model: nn.Module, rows: Interaction) -> Tensor:
    lengths = rows[model.ITEM_SEQ_LEN]
    masked = model.reconstruct_test_data(rows[model.ITEM_SEQ], lengths)
    return model.gather_indexes(model.forward(masked), lengths - 1)


# How each stock model makes its user representation. Any model not listed that has `item_embedding` and
# `forward(item_seq, item_seq_len) -> [B, d]` works as SASRec does.
USER_STATE = {"Caser": _caser_state, "BERT4Rec": _bert4rec_state}


class Teacher(nn.Module):
    """A frozen stock model. Its parameters never move and its dropout never acts.

    Args:
        run: a trained stock sequential recommender with an ``item_embedding``.

    Attributes:
        name: its RecBole name.
        item_vectors: float32 ``[items, d]``, padding included.
        size: d.
        length: most items of a history that it reads.
        identity: sha256 of the item vectors.
    """

    def __init__(self, run: stock.StockRun) -> None:
        super().__init__()
        model, name = run.model, run.config["model"]
        embedding = getattr(model, "item_embedding", None)
        if not isinstance(embedding, nn.Embedding):
            raise UserError(
                f"teacher: {name} has no item embeddings to learn from; choose a sequential model that has, such as "
                f"SASRec, GRU4Rec, Caser or BERT4Rec."
            )
        self.name = name
        self.length, self._list_suffix = run.config["MAX_ITEM_LIST_LENGTH"], run.config["LIST_SUFFIX"]
        self.model = model.requires_grad_(False).eval()
        vectors = embedding.weight.detach()[: run.splits["train"].item_num].clone().float()
        self.register_buffer("item_vectors", vectors, persistent=False)
        self.size = self.item_vectors.shape[1]
        self.identity = hashlib.sha256(self.item_vectors.cpu().numpy().tobytes()).hexdigest()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: dropout in the teacher would make its targets noise."""
        return super().train(False)

    @torch.no_grad()
    def represent(self, rows: Interaction) -> Tensor:
        """The teacher's user representation of each row, float32 ``[B, d]``."""
        return USER_STATE.get(self.name, sequence_state)(self.model, self._as_read(rows)).float()

    @torch.no_grad()
    def represent_windows(self, rows: Interaction, ends: np.ndarray) -> Tensor:
        """The teacher's user representation at every position of windows, float32 ``[B, d]``.

        A causal teacher gives them in one pass over the history of each window's last row; of a history longer than the
        teacher reads, an earlier position then sees fewer items than :meth:`represent` of its row does.

        Args:
            rows: the rows of windows, one after the other, each one item longer than the one before.
            ends: for each row the last row of its window, int64 ``[B]``.
        """
        last, window = np.unique(ends, return_inverse=True)
        read = self._as_read(rows[torch.from_numpy(last)])
        lengths = read[self.model.ITEM_SEQ_LEN]
        window = torch.from_numpy(window).to(lengths.device)
        place = lengths[window] - 1 - torch.from_numpy(ends - np.arange(len(ends))).to(lengths.device)
        in_one_pass = self.name in stock.CAUSAL_MODELS and getattr(self.model, "is_prefix_stable", True)
        if len(last) == len(ends) or not in_one_pass or (place < 0).any():
            return self.represent(rows)
        with stock.all_positions(self.model):
            return self.model.forward(read[self.model.ITEM_SEQ], lengths)[window, place].float()

    def _as_read(self, rows: Interaction) -> Interaction:
        """The rows with their histories as long as the teacher reads them: the latest items, or padded on the right."""
        lengths = rows[self.model.ITEM_SEQ_LEN]
        width = rows[self.model.ITEM_SEQ].shape[1]
        if width == self.length:
            return rows
        kept = lengths.clamp(max=self.length)
        starts = torch.arange(len(lengths), device=lengths.device) * width + lengths - kept
        read = {
            field: gather_windows(rows[field].flatten(0, 1), starts, kept, self.length)
            for field in rows.columns
            if field.endswith(self._list_suffix)
        }
        return Interaction({**rows.interaction, **read, self.model.ITEM_SEQ_LEN: kept})


def teacher_config(config: Config) -> Config:
    """The stock configuration of ``config["teacher"]`` for the same run: its own defaults, this run's data and protocol.

    Training settings of the LLM (learning rate, epochs, batch size) do not reach the teacher; ``teacher_settings`` do.
    """
    of_test = {name: config[name] for name in ("protocol", "candidates_file")}
    given = {**settings_for_teacher(config), **of_test}
    name, preset = config["teacher"], config["teacher_preset"]
    if preset is not None and preset not in presets_of(name):
        having = ", ".join(model for model in stock.CAUSAL_MODELS if preset in presets_of(model))
        raise UserError(f"teacher_preset: {name} has no preset {preset}, only {having} has; leave the key out, or set teacher.")
    for key in ("teacher_preset", "teacher_training"):
        if key == "teacher_preset" or key in config.external_config_dict:
            given[key] = config[key]
    given.update(config["teacher_settings"] or {})
    return make_config(config["teacher"], config["dataset"], config_dict=given)


def obtain_teacher(config: Config, splits: dict[str, Any]) -> tuple[Teacher, stock.StockRun]:
    """Load the teacher of ``config``, training it first where no checkpoint for this data, split, seed and settings exists.

    Args:
        config: configuration of the model that wants a teacher: keys ``teacher``, ``teacher_training``,
            ``teacher_checkpoint``, ``teacher_settings``.
        splits: see ``TextSequentialDataset.build``.

    Raises:
        UserError: an unknown teacher, one without item embeddings, or a checkpoint of other data.
    """
    settings = teacher_config(config)
    if settings["MAX_ITEM_LIST_LENGTH"] != config["MAX_ITEM_LIST_LENGTH"]:  # Caser's paper reads the last 5, say
        items = splits["train"]
        is_catalog = isinstance(items, ItemCatalog)
        splits = items.with_config(settings).splits if is_catalog else TextSequentialDataset(settings).build()[0].splits
    if config["teacher_checkpoint"]:
        run = stock.load(config["teacher_checkpoint"], settings, splits)
    else:
        run = stock.train_or_load(settings, splits, settings["teacher_training"])
    getLogger().info(f"Teacher {config['teacher']}, validation: {decimals(run.valid_result)}")
    return Teacher(run), run
