"""HLLM: one LLM makes a vector of each item's text, a second LLM reads the vectors of a history.

Reference:
    Junyi Chen et al., "HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models for Item and User
    Modeling", 2024.

Reference code:
    https://github.com/bytedance/HLLM
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.load import fetch_backbone, load_backbone
from recbole_llm.backbone.settings import BackboneSettings, read_settings
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.loss.nce import nce_loss
from recbole_llm.prompt.item import ItemPrompts
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.recommender.item_table import ItemTable

FIRST_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0  # as in the public code


@dataclass(frozen=True)
class HLLMSettings:
    """The model's settings; each field is the key of the same name."""

    user_backbone: str | None
    user_backbone_layers: int | None
    item_prompt: str
    max_item_tokens: int
    history_length: int
    n_negatives: int
    same_item_cosine: float | None
    micro_batch_tokens: int


class HLLM(BackboneRecommender):
    """``e_i`` = the item LLM's state at [ITEM] behind the item's text; ``h_n`` = the user LLM's state at the n-th of e_1, ...

    The user LLM has the items' vectors in place of word embeddings and predicts the next item's vector at every position:
    ``s(u, i) = cos(h_n, e_i)``. Both LLMs are trained, through the items' vectors.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset``.

    Attributes:
        user_backbone: the user LLM; ``backbone`` is the item LLM.
        item_token: [ITEM], ``[1, input size]``.
        log_scale: log of the inverse temperature, a scalar.
    """

    loss_names = ("next_item",)

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(HLLMSettings, config)
        user_llm = self._user_llm(config)
        fetch_backbone(user_llm)  # before anything is loaded
        super().__init__(config, dataset)
        backbone = self.backbone
        self.user_backbone = load_backbone(user_llm)
        self.user_backbone.require_causal("predict the next item at every position")
        if self.user_backbone.input_size != backbone.hidden_size:
            raise UserError(
                f"user_backbone: its inputs are {self.user_backbone.input_size} wide and the vectors of the item LLM "
                f"{backbone.hidden_size}; take an LLM of the same width."
            )
        if settings.history_length > self.user_backbone.context_length:
            raise UserError(
                f"history_length: {settings.history_length} items are more than the {self.user_backbone.context_length} "
                f"positions of the user LLM; lower it."
            )
        # Words are read by the item LLM alone.
        self.user_backbone.embedding.requires_grad_(False)
        self.item_token = nn.Parameter(torch.normal(0.0, 0.02, (1, backbone.input_size)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))
        self.item_prompts = ItemPrompts(
            lambda texts: encode_text(backbone.tokenizer, texts),
            dataset.item_texts,
            settings.item_prompt,
            min(settings.max_item_tokens, backbone.context_length - 1),
            prefix_ids=backbone.prefix_ids,
        )
        self._table: ItemTable | None = None

    def _user_llm(self, config: Config) -> BackboneSettings:
        """The settings of the user LLM: those of the item LLM, but for its name and its layers."""
        settings, of_items = self.settings, read_settings(config)
        layers = settings.user_backbone_layers or of_items.layers
        if settings.user_backbone is None:
            return replace(of_items, layers=layers)
        return replace(of_items, backbone=settings.user_backbone, revision=None, layers=layers)

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """Both LLMs: the item LLM is the usual one."""
        return {"backbone": self.backbone, "user_backbone": self.user_backbone}

    # Items

    def represent_items(self, items: np.ndarray) -> Tensor:
        """e of internal item ids int64 ``[n]``: float32 ``[n, hidden size]``."""
        return self.encoder(self.item_prompts(items), self.item_token)[:, 0]

    @property
    def item_table(self) -> ItemTable:
        """e of the items under the current weights."""
        if self._table is None:
            made_of = [*self.backbone.parameters(), self.item_token]
            self._table = ItemTable(self.represent_items, made_of, self.n_items)
        return self._table

    def forget_items(self) -> None:
        """Empty the table of items."""
        self._table = None

    # Users

    def history_states(self, vectors: Tensor) -> Tensor:
        """h at every position of histories ``[B, L, d]``, right padded: float32 ``[B, L, d]``."""
        positions = torch.arange(vectors.shape[1], device=vectors.device)[None]
        return self.user_backbone(vectors, positions)[0].float()

    def latest_items(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray]:
        """The latest ``history_length`` items of each history int64 ``[B, L]``, right padded, and how many ``[B]``."""
        history, lengths = self.history_items(interaction)
        kept = np.minimum(lengths, self.settings.history_length)
        column = np.arange(int(kept.max()))
        source = np.minimum((lengths - kept)[:, None] + column, history.shape[1] - 1)
        return np.where(column < kept[:, None], np.take_along_axis(history, source, axis=1), 0), kept

    @torch.no_grad()
    def represent_users(self, interaction: Interaction) -> Tensor:
        """h at the end of each row's history, each distinct one read once: float32 ``[B, d]``, of length 1."""
        first, row_of = self.distinct_histories(interaction)
        history, lengths = self.latest_items(interaction[first])
        at_once = max(1, self.settings.micro_batch_tokens // history.shape[1])
        ends = []
        for start in range(0, len(history), at_once):
            part = slice(start, start + at_once)
            states = self.history_states(self._vectors_of(history[part]))
            ends.append(states[torch.arange(len(states)), torch.from_numpy(lengths[part] - 1)])
        return functional.normalize(torch.cat(ends), dim=-1)[row_of.to(ends[0].device)]

    def _vectors_of(self, history: np.ndarray) -> Tensor:
        """e of histories int64 ``[B, L]`` from the table; anything at the padding, which no item sees."""
        return self.item_table.rows(np.where(history > 0, history, history[0, 0]))

    # Training

    def draw_negatives(self) -> np.ndarray:
        """Negatives of a step, shared by all its positions: uniform, with repeats, int64 ``[n_negatives]``."""
        return self.rng.integers(1, self.n_items, self.settings.n_negatives)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor]:
        """InfoNCE of the next item's vector at every position of each row's history and target."""
        history, lengths = self.latest_items(interaction)
        windows = np.pad(history, ((0, 0), (0, 1)))
        windows[np.arange(len(windows)), lengths] = interaction[self.POS_ITEM_ID].cpu().numpy()
        negatives = self.draw_negatives()
        items, place = np.unique(np.concatenate([windows.ravel(), negatives]), return_inverse=True)
        if items[0] == 0:  # padding, which no item sees: the first item's vector stands there
            items, place = items[1:], np.maximum(place - 1, 0)
        places = torch.from_numpy(place).to(self.item_token.device)
        vectors = self.represent_items(items)  # each distinct item is read once
        in_windows = vectors[places[: windows.size]].view(*windows.shape, -1)
        states = self.history_states(in_windows[:, :-1])
        real = torch.from_numpy(windows[:, 1:] > 0).to(states.device)
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(LARGEST_SCALE))
        targets, others = in_windows[:, 1:][real], vectors[places[windows.size :]]
        left_out = places[: windows.size].view(windows.shape)[:, 1:][real][:, None] == places[windows.size :]
        if self.settings.same_item_cosine is not None:
            cosines = functional.normalize(targets.detach(), dim=-1) @ functional.normalize(others.detach(), dim=-1).T
            left_out = left_out | (cosines > self.settings.same_item_cosine)
        return (nce_loss(states[real], targets, others, self.log_scale, left_out),)

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates by the cosine.

        Args:
            interaction: B rows; only their histories are read.
            candidates: int64 ``[B, C]``, or None for the whole catalog.

        Returns:
            float32 ``[B, C]`` or ``[B, n_items]`` (column 0, the padding item, is -inf).
        """
        users = self.represent_users(interaction)
        if candidates is not None:
            items = functional.normalize(self.item_table.rows(candidates.cpu().numpy()), dim=-1)
            return torch.einsum("bd,bcd->bc", users, items)
        scores = users @ functional.normalize(self.item_table.whole(), dim=-1).T
        scores[:, 0] = float("-inf")
        return scores

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        return self.score(interaction, interaction[self.ITEM_ID][:, None])[:, 0]
