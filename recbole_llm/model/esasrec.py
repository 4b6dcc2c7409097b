"""eSASRec: SASRec's shifted sequences, LiGR layers, and a softmax over sampled items. Without text, and without an LLM.

Reference:
    Daria Tikhonovich et al., "eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion", RecSys 2025. The
    layers: Fedor Borisyuk et al., "From Features to Transformers: Redefining Ranking for Scalable Impact" (LiGR), 2025.

Reference code:
    https://github.com/blondered/transformer_benchmark, https://github.com/MobileTeleSystems/RecTools
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.config.settings import select
from recbole_llm.errors import UserError
from recbole_llm.loss.retrieval import retrieval_loss


@dataclass(frozen=True)
class ESASRecSettings:
    """The model's settings; each field is the key of the same name."""

    hidden_size: int
    inner_size: int
    n_layers: int
    n_heads: int
    hidden_dropout_prob: float
    attn_dropout_prob: float
    positions: str
    n_negatives: int | None


class LiGRLayer(nn.Module):
    """``x + sigmoid(W x) * f(LayerNorm(x))``, once with f = causal self-attention, once with f = SwiGLU.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: ESASRecSettings) -> None:
        super().__init__()
        size, inner = settings.hidden_size, settings.inner_size
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, settings.n_heads, settings.attn_dropout_prob, batch_first=True)
        self.attention_gate, self.feed_forward_gate = nn.Linear(size, size), nn.Linear(size, size)
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)

    def forward(self, states: Tensor, hidden: Tensor) -> Tensor:
        """One layer over ``states`` ``[B, L, d]``; ``hidden`` bool ``[L, L]``: what each position does not see."""
        normed = self.attention_norm(states)
        attended, _ = self.attention(normed, normed, normed, attn_mask=hidden, is_causal=True, need_weights=False)
        states = states + self.attention_gate(states).sigmoid() * self.dropout(attended)
        normed = self.feed_forward_norm(states)
        inner = self.dropout(functional.silu(self.gate(normed)) * self.up(normed))
        return states + self.feed_forward_gate(states).sigmoid() * self.dropout(self.down(inner))


class eSASRec(SequentialRecommender):
    """Every position of a sequence predicts the next item: ``s(n, i) = <h_n, e_i>``, e_i also being the items' inputs.

    The loss of a position is the cross-entropy of its target among ``n_negatives`` items more, which are drawn uniformly, with
    replacement, for each position anew, and enter uncorrected.

    Args:
        config: RecBole configuration.
        dataset: the training split.

    Attributes:
        item_embedding: e, ``[items, d]``.
        position_embedding: added to the inputs.
    """

    def __init__(self, config: Config, dataset: SequentialDataset) -> None:
        super().__init__(config, dataset)
        self.settings = settings = select(ESASRecSettings, config)
        if settings.hidden_size % settings.n_heads:
            raise UserError(f"n_heads: {settings.n_heads} heads do not divide hidden_size {settings.hidden_size}.")
        self.item_embedding = nn.Embedding(self.n_items, settings.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, settings.hidden_size)
        self.layers = nn.ModuleList(LiGRLayer(settings) for _ in range(settings.n_layers))
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)
        # Whether the state at a position is the same when later items are cut off: else a place counts from the end.
        self.is_prefix_stable = settings.positions == "from_start"
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.item_embedding.weight[0] = 0

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """h at the last item of histories int64 ``[B, L]``, right padded: ``[B, d]``."""
        length = item_seq.shape[1]
        places = torch.arange(length, device=item_seq.device).expand_as(item_seq)
        if self.settings.positions == "from_end":
            places = (item_seq_len[:, None] - 1 - places).clamp_min(0)  # what stands behind the end is seen by nobody
        states = self.dropout(self.item_embedding(item_seq) + self.position_embedding(places))
        hidden = torch.ones(length, length, dtype=torch.bool, device=item_seq.device).triu(1)
        for layer in self.layers:
            states = layer(states, hidden)
        return self.gather_indexes(states, item_seq_len - 1)

    def next_item_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of positions with ``states`` ``[P, d]`` and next items int64 ``[P]``."""
        vectors, number = self.item_embedding.weight, self.settings.n_negatives
        if number is None:
            return functional.cross_entropy(states @ vectors[1:].T, targets - 1)
        negatives = torch.randint(1, self.n_items, (len(targets), number), device=targets.device)
        candidates = self.item_embedding(torch.cat([targets[:, None], negatives], dim=1))
        return retrieval_loss(torch.einsum("pd,pcd->pc", states, candidates))

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """The loss of one target for each row (``teacher_training: prefix``)."""
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self.next_item_loss(states, interaction[self.POS_ITEM_ID])

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalog for each row, ``[B, n_items]``."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]) @ self.item_embedding.weight.T

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return (states * self.item_embedding(interaction[self.ITEM_ID])).sum(dim=1)
