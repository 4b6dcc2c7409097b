"""MoRec: SASRec whose items are texts, read by an encoder that is trained with it.

Reference:
    Zheng Yuan et al., "Where to Go Next for Recommender Systems? ID- vs. Modality-based Recommender Models Revisited",
    SIGIR 2023.

Reference code:
    https://github.com/westlake-repl/IDvs.MoRec
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.encoder import EncoderSettings
from recbole_llm.backbone.sentence_encoder import load_text_transformer
from recbole_llm.backbone.text_model import TextEncoder
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import user_sequences
from recbole_llm.loss.in_batch import popularity_debiased_loss
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.recommender.item_table import ItemTable


@dataclass(frozen=True)
class MoRecSettings:
    """The model's settings; each field is the key of the same name."""

    sentence_encoder: str
    text_pooling: str
    max_item_tokens: int
    history_length: int
    learning_rate: float
    encoder_learning_rate: float
    hidden_size: int
    n_layers: int
    n_heads: int
    dropout: float = field(metadata={"key": "hidden_dropout_prob"})
    training_loss: str
    device: torch.device


class MoRec(BackboneRecommender):
    """``s(u, i) = <SASRec(v_1 ... v_n), v_i>`` with ``v = GELU(W h + b)``, h the encoder's state of an item's text.

    A row of training is a user's latest ``history_length`` + 1 items, of which all but the first are targets.

    Attributes:
        item_projection: the projection of h, to the width of the sequence model.
        sequence_encoder: blocks of self-attention, as in SASRec.
    """

    has_llm = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(MoRecSettings, config)
        super().__init__(config, dataset)
        size = settings.hidden_size
        self.item_projection = nn.Linear(self.backbone.hidden_size, size)
        self.position_embedding = nn.Embedding(settings.history_length, size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.dropout = nn.Dropout(settings.dropout)
        self.sequence_encoder = TransformerEncoder(
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            hidden_size=size,
            inner_size=4 * size,
            hidden_dropout_prob=settings.dropout,
            attn_dropout_prob=settings.dropout,
            hidden_act="relu",
            layer_norm_eps=1e-6,
        )
        for module in (self.position_embedding, *self.sequence_encoder.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

        self.item_ids = self.encoder.token_ids(dataset.item_texts)
        counts = np.bincount(np.concatenate(user_sequences(dataset.splits["train"])), minlength=self.n_items)
        with np.errstate(divide="ignore"):  # an item that nobody has in training is no candidate there
            popularity = np.log(counts / counts.sum())
        self.register_buffer("log_popularity", torch.from_numpy(popularity).float(), persistent=False)
        self.loss_names = (settings.training_loss,)
        self._table: ItemTable | None = None

    def _fetch_backbone(self, config: Config) -> None:
        """The encoder's files are fetched where it is read."""

    def _load_encoder(self, config: Config, dataset: TextSequentialDataset, settings: EncoderSettings) -> TextEncoder:
        own = self.settings
        transformer = load_text_transformer(own.sentence_encoder, own.device)
        return TextEncoder(transformer, settings, own.text_pooling, own.max_item_tokens)

    def learning_rate_factor(self, name: str) -> float:
        """By what the learning rate of a parameter is multiplied: the text encoder has one of its own."""
        return self.settings.encoder_learning_rate / self.settings.learning_rate if name.startswith("encoder.") else 1.0

    # Representations

    def represent_items(self, items: np.ndarray) -> Tensor:
        """v of internal item ids int64 ``[n]``: ``[n, hidden_size]``."""
        return functional.gelu(self.item_projection(self.encoder([self.item_ids[item] for item in items])))

    def represent_positions(self, vectors: Tensor, inside: Tensor) -> Tensor:
        """SASRec's output at each position.

        Args:
            vectors: of items ``[B, L, hidden_size]``, left padded: positions count from the latest item.
            inside: which positions hold an item, bool ``[B, L]``.
        """
        length = inside.shape[1]
        positions = torch.arange(self.settings.history_length - length, self.settings.history_length, device=inside.device)
        hidden = self.dropout(self.norm(vectors + self.position_embedding(positions)))
        visible = inside[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=inside.device).tril()
        mask = torch.zeros(visible.shape, device=inside.device).masked_fill(~visible, -1e9)
        return self.sequence_encoder(hidden, mask, output_all_encoded_layers=False)[-1]

    def latest_items(self, interaction: Interaction, with_target: bool = False) -> np.ndarray:
        """The latest items of each row's history, and its target behind it: int64, left padded with 0."""
        history, lengths = self.history_items(interaction)
        width = self.settings.history_length
        source = lengths[:, None] + np.arange(-width, 0)
        items = np.where(source >= 0, np.take_along_axis(history, source.clip(min=0, max=history.shape[1] - 1), axis=1), 0)
        if with_target:
            items = np.concatenate([items, interaction[self.POS_ITEM_ID].cpu().numpy()[:, None]], axis=1)
        return items[:, (items != 0).any(axis=0)]

    @torch.no_grad()
    def represent_distinct_users(self, interaction: Interaction) -> Tensor:
        """SASRec's output at the end of each row's history, each distinct one encoded once: ``[B, hidden_size]``."""
        first, row_of = self.distinct_histories(interaction)
        items = self.latest_items(interaction[first])
        vectors = self.item_table.rows(items) * torch.from_numpy(items != 0).to(self.log_popularity.device)[:, :, None]
        users = self.represent_positions(vectors, torch.from_numpy(items != 0).to(vectors.device))[:, -1]
        return users[row_of.to(users.device)]

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights."""
        if self._table is None:
            self._table = ItemTable(self.represent_items, self.trained_parameters().values(), self.n_items)
        return self._table

    # Training

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor]:
        """The loss at every position of the rows' sequences, each distinct item encoded once."""
        items = self.latest_items(interaction, with_target=True)
        negatives = self._negatives(items) if self.settings.training_loss == "bce" else items[:, :0]
        distinct, place = np.unique(np.concatenate([items, negatives], axis=1), return_inverse=True)
        place = place.reshape(len(items), -1)
        is_padded = distinct[0] == 0
        encoded = self.represent_items(distinct[int(is_padded) :])
        table = functional.pad(encoded, (0, 0, int(is_padded), 0))  # the padding's vector is 0
        device = table.device
        columns, inside = torch.from_numpy(place).to(device), torch.from_numpy(items != 0).to(device)
        length = items.shape[1] - 1
        users = self.represent_positions(table[columns[:, :length]], inside[:, :length])[inside[:, :length]]
        targets = columns[:, 1 : length + 1][inside[:, :length]]
        if self.settings.training_loss == "bce":
            drawn = columns[:, length + 1 :][inside[:, :length]]
            liked, others = (users * table[targets]).sum(dim=1), (users * table[drawn]).sum(dim=1)
            return (-functional.logsigmoid(liked).mean() - functional.logsigmoid(-others).mean(),)

        occurrences = np.bincount(place[:, : length + 1][items != 0], minlength=len(distinct))
        of_sequence = np.zeros((len(items), len(distinct)), dtype=bool)
        np.put_along_axis(of_sequence, place, True, axis=1)
        rows = torch.repeat_interleave(torch.arange(len(items), device=device), inside[:, :length].sum(dim=1))
        start = int(is_padded)  # the padding is no candidate
        loss = popularity_debiased_loss(
            users @ encoded.T,
            targets - start,
            torch.from_numpy(of_sequence[:, start:]).to(device)[rows],
            self.log_popularity[torch.from_numpy(distinct[start:]).to(device)],
            torch.from_numpy(occurrences[start:]).float().to(device),
        )
        return (loss,)

    def _negatives(self, items: np.ndarray) -> np.ndarray:
        """For each target an item that the sequence does not have, int64 ``[B, L]``; any where it has all."""
        drawn = self.rng.integers(1, self.n_items, size=(len(items), items.shape[1] - 1))
        for row, sequence in enumerate(items):
            free = np.setdiff1d(np.arange(1, self.n_items), sequence)
            if len(free):
                drawn[row] = free[drawn[row] % len(free)]
        return drawn

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``: ``[B, C]``; with None the whole catalog: ``[B, n_items]``."""
        users = self.represent_distinct_users(interaction)
        return self.item_table.scores(users, candidates)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        return self.score(interaction, interaction[self.ITEM_ID][:, None])[:, 0]
