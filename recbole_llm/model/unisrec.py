"""UniSRec: text vectors whitened and mixed by experts, a SASRec encoder, contrastive pre-training, and two ways to fine-tune.

Reference:
    Yupeng Hou et al., "Towards Universal Sequence Representation Learning for Recommender Systems", KDD 2022.

Reference code:
    https://github.com/RUCAIBox/UniSRec
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.config.settings import select
from recbole_llm.loss.two_tower import contrastive_loss
from recbole_llm.teacher.item_embedding import VectorEmbedding

_LEAST_NOISE = 1e-2  # of the gates, in the public code


@dataclass(frozen=True)
class UniSRecSettings:
    """The model's settings; each field is the key of the same name."""

    hidden_size: int
    initializer_range: float
    experts: int
    adaptor_dropout_prob: float
    temperature: float
    finetuning: str
    pretrain_epochs: int
    sequence_weight: float
    item_drop_ratio: float
    fixed_encoder: bool


class MixtureOfWhitening(nn.Module):
    """A mixture of parametric whitenings (equations 1 to 3)::

        expert k:  (dropout(x) - b_k) W_k
        gates:     softmax(x W_g + noise * softplus(x W_n)), the noise in training alone
        result:    sum_k gate_k expert_k(x)

    Args:
        size: of x.
        settings: of the model.
    """

    def __init__(self, size: int, settings: UniSRecSettings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.adaptor_dropout_prob)
        self.biases = nn.Parameter(torch.zeros(settings.experts, size))
        weights = torch.randn(settings.experts, size, settings.hidden_size)
        self.weights = nn.Parameter(weights * settings.initializer_range)
        self.gate = nn.Parameter(torch.zeros(size, settings.experts))
        self.noise = nn.Parameter(torch.zeros(size, settings.experts))

    def forward(self, vectors: Tensor) -> Tensor:
        """``[n, size]`` to ``[n, hidden size]``."""
        logits = vectors @ self.gate
        if self.training:
            scale = functional.softplus(vectors @ self.noise) + _LEAST_NOISE
            logits = logits + torch.randn_like(logits) * scale
        gates = logits.softmax(dim=-1)
        result = vectors.new_zeros(len(vectors), self.weights.shape[2])
        for expert, (bias, weight) in enumerate(zip(self.biases, self.weights, strict=True)):
            result = result + gates[:, expert, None] * ((self.dropout(vectors) - bias) @ weight)
        return result


class AdaptedEmbedding(VectorEmbedding):
    """The adaptor's vectors, and in transductive fine-tuning an embedding of each item's number added.

    Args:
        own, vectors: see :class:`VectorEmbedding`.
        adaptor: its projection.
        numbers: first values of the items' own embeddings, ``[items - 1, d]``; None: they have none.
    """

    def __init__(self, own: Tensor, vectors: Tensor, adaptor: nn.Module, numbers: Tensor | None) -> None:
        super().__init__(own, vectors, adaptor)
        self.numbers = None if numbers is None else nn.Parameter(numbers.clone())
        self.adds_numbers = True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed
        """The whole table, ``[num_embeddings, d]``."""
        table = super().weight
        if self.numbers is None or not self.adds_numbers:
            return table
        return table + functional.pad(self.numbers, (0, 0, 1, len(table) - 1 - len(self.numbers)))


class UniSRec(SASRec):
    """Scores are cosines over a temperature: ``s(u, i) = cos(h_u, v_i) / tau``, v_i = the adaptor's vector of item i's text
    (inductive), or that and the item's embedding (transductive).

    Pre-training is that of section 2.3.1, on the data set itself: a sequence against its next item, and against itself with
    items left out, each with the others of the batch as negatives. (The public code pre-trains on other domains, and in one
    batch of ten leaves out words in place of items.) Fine-tuning is cross-entropy over all items.

    Args:
        config: RecBole configuration.
        dataset: the training split.
    """

    def __init__(self, config: Config, dataset: SequentialDataset) -> None:
        super().__init__(config, dataset)
        self.settings = select(UniSRecSettings, config)
        self.train_stage = "pretrain" if self.settings.pretrain_epochs else "finetune"

    def embed_vectors(self, own: Tensor, vectors: Tensor) -> AdaptedEmbedding:
        """The item embeddings made of text vectors, see :func:`recbole_llm.teacher.item_embedding.use_item_vectors`."""
        numbers = None
        if self.settings.finetuning == "transductive":
            numbers = torch.randn(len(vectors), own.shape[1]) * self.settings.initializer_range
        embedding = AdaptedEmbedding(own, vectors, MixtureOfWhitening(vectors.shape[1], self.settings), numbers)
        embedding.adds_numbers = self.train_stage != "pretrain"
        return embedding

    def begin_finetuning(self) -> None:
        """After the pre-training: items get embeddings of their own, and the encoder is fixed where that is set."""
        self.train_stage = "finetune"
        self.item_embedding.adds_numbers = True
        if self.settings.fixed_encoder:
            self.position_embedding.requires_grad_(False)
            self.trm_encoder.requires_grad_(False)

    def _logits(self, states: Tensor, vectors: Tensor) -> Tensor:
        return functional.normalize(states, dim=-1) @ functional.normalize(vectors, dim=-1).T

    def next_item_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of positions with ``states`` ``[P, d]`` and next items int64 ``[P]`` (equation 10)."""
        return functional.cross_entropy(self._logits(states, self.item_embedding.weight) / self.settings.temperature, targets)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """The loss of one target for each row: of pre-training (equation 8), or of fine-tuning."""
        histories, lengths, targets = (interaction[name] for name in (self.ITEM_SEQ, self.ITEM_SEQ_LEN, self.POS_ITEM_ID))
        states = self.forward(histories, lengths)
        if self.train_stage != "pretrain":
            return self.next_item_loss(states, targets)
        tau = self.settings.temperature
        items = contrastive_loss(states, self.item_embedding(targets), targets, tau)
        shortened = self.forward(*without_some_items(histories, self.settings.item_drop_ratio))
        return items + self.settings.sequence_weight * contrastive_loss(states, shortened, targets, tau)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalog for each row, ``[B, n_items]``."""
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self._logits(states, self.item_embedding.weight)

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return functional.cosine_similarity(states, self.item_embedding(interaction[self.ITEM_ID]))


def without_some_items(histories: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Leave out each item but the first with probability ``ratio``.

    Args:
        histories: int64 ``[B, L]``, right padded with 0.

    Returns:
        what is left, of the same shape, and its lengths ``[B]``.
    """
    kept = torch.rand(histories.shape, device=histories.device) >= ratio
    kept[:, 0] = True
    kept &= histories > 0
    order = torch.argsort(~kept, dim=1, stable=True)  # what is kept first, in its order
    return (histories * kept).gather(1, order), kept.sum(dim=1)
