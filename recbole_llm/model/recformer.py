"""Recformer: items are sentences of attributes, a history is a sentence of items, and one Longformer reads both.

Reference:
    Jiacheng Li et al., "Text Is All You Need: Learning Language Representations for Sequential Recommendation", KDD 2023.

Reference code:
    https://github.com/AaronHeee/RecFormer
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.encoder import EncoderSettings
from recbole_llm.backbone.longformer import LongformerSettings, Sentence, SentenceReader, load_longformer, word_starts
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.sequences import user_sequences
from recbole_llm.loss.item_contrast import cosine_logits, item_contrast_loss
from recbole_llm.prompt.item_sentences import ItemSentences, mask_words
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.recommender.item_table import ItemTable
from recbole_llm.trainer.stages import StageSettings, stages_to_run


@dataclass(frozen=True)
class RecformerSettings:
    """The model's settings; each field is the key of the same name."""

    longformer: str
    hidden_size: int
    n_layers: int
    n_heads: int
    attention_window: int
    history_length: int
    max_prompt_tokens: int
    max_attributes: int
    max_attribute_tokens: int
    temperature: float
    mlm_weight: float
    mlm_share: float
    device: torch.device
    seed: int


class Recformer(BackboneRecommender):
    """``s(u, i) = cos(h_u, h_i) / temperature``, h the state at the first token of a sentence.

    Pre-training: ``L = L_IIC + mlm_weight * (L_MLM of the sequences + L_MLM of the items)``, a sequence being cut at a
    random place of its second half. Fine-tuning: ``L = -log softmax_i s(u, i)`` over the matrix of all items,
    a sequence being cut anywhere. The matrix is computed anew in each epoch of a stage, or kept (``vectors: True``).

    Attributes:
        item_matrix: h of each item, which no gradient moves; 0 until fine-tuning begins.
        without_gradient: what is kept with the trained parameters and moved otherwise.
        epoch_steps: training steps in an epoch, set by the trainer.
        parts: what a stage may train; a stage that trains ``mlm`` is one of pre-training.
    """

    has_llm = False
    without_gradient = ("item_matrix",)
    parts = {"encoder": ("encoder.*",), "mlm": ("mlm_head.*", "mlm_bias")}

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(RecformerSettings, config)
        self.stages = stages_to_run(select(StageSettings, config), self.parts)
        super().__init__(config, dataset)
        tokenizer, size = self.backbone.tokenizer, self.backbone.hidden_size
        self.mlm_head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.mlm_bias = nn.Parameter(torch.zeros(len(self.encoder.words)))
        self.item_matrix = nn.Parameter(torch.zeros(self.n_items, size))
        self.sentences = ItemSentences(
            lambda texts: encode_text(tokenizer, texts),
            dataset.item_attribute_names(),
            dataset.item_attributes,
            tokenizer.bos_token_id,
            settings.history_length,
            settings.max_prompt_tokens,
            settings.max_attributes,
            settings.max_attribute_tokens,
        )
        self._begins_word = word_starts(tokenizer)
        rows = dataset.splits["train"]
        users = np.unique(rows.inter_feat[rows.uid_field].numpy())
        self.sequences = dict(zip(users.tolist(), user_sequences(rows), strict=True))
        self.epoch_steps = 1
        self._fresh: ItemTable | None = None
        self._set_losses()

    def _fetch_backbone(self, config: Config) -> None:
        """The Longformer's files are fetched where it is read."""

    def _load_encoder(self, config: Config, dataset: TextSequentialDataset, settings: EncoderSettings) -> SentenceReader:
        own = self.settings
        wanted = LongformerSettings(
            own.longformer, own.hidden_size, own.n_layers, own.n_heads, own.attention_window, own.max_prompt_tokens, own.seed
        )
        names = {name for names in dataset.item_attribute_names() for name in names}
        texts = [*sorted(names), *(text for texts in dataset.item_attributes for text in texts)]
        return SentenceReader(load_longformer(wanted, texts, own.device), settings, own.history_length)

    # Stages

    @property
    def is_pretraining(self) -> bool:
        """Whether the present stage is one of pre-training."""
        return "mlm" in self.stages[self.stage]["trains"]

    def enter_stage(self, number: int, vectors: bool) -> None:
        """Get ready for stage ``number``; ``vectors``: the matrix of items stays as it is."""
        if self._trained_names is None:
            self._trained_names = list(self.trained_parameters())
        self.stage = number
        self._set_losses()

    def _set_losses(self) -> None:
        self.loss_names = ("item_contrast", "masked_words") if self.is_pretraining else ("next_item",)

    def seed_step(self, step: int) -> None:
        """Also compute the matrix of items anew where an epoch begins, as the weights are then."""
        super().seed_step(step)
        if self.is_pretraining:
            return
        begins = step % self.epoch_steps == 0 and not self.stages[self.stage]["vectors"]
        if begins or not self._has_matrix:
            self.update_item_matrix()

    @property
    def _has_matrix(self) -> bool:
        return bool(self.item_matrix.any())

    @torch.no_grad()
    def update_item_matrix(self) -> None:
        """Encode all items with the weights of now, without dropout."""
        was_training = self.training
        self.eval()
        self.item_matrix[1:] = self.represent_items(np.arange(1, self.n_items))
        self.train(was_training)

    # Representations

    def represent(self, sequences: list[np.ndarray]) -> Tensor:
        """h of sequences of items, oldest first: float32 ``[n, hidden size]``."""
        return self.encoder.first_states([Sentence(*self.sentences.sentence(items.tolist())) for items in sequences])

    def represent_items(self, items: np.ndarray) -> Tensor:
        """h of internal item ids int64 ``[n]``: float32 ``[n, hidden size]``."""
        return self.represent([items[place : place + 1] for place in range(len(items))])

    @torch.no_grad()
    def represent_distinct_users(self, interaction: Interaction) -> Tensor:
        """h of each row's history, each distinct one encoded once: ``[B, hidden size]``."""
        first, row_of = self.distinct_histories(interaction)
        history, lengths = self.history_items(interaction[first])
        users = self.represent([items[:length] for items, length in zip(history, lengths, strict=True)])
        return users[row_of.to(users.device)]

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights: what stands in for the matrix before fine-tuning."""
        if self._fresh is None:
            self._fresh = ItemTable(self.represent_items, self.encoder.parameters(), self.n_items)
        return self._fresh

    # Training

    def cut_sequences(self, users: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """A part of each user's training sequence, and the item that follows it; in pre-training one of the second half."""
        parts, targets = [], np.empty(len(users), dtype=np.int64)
        for row, user in enumerate(users.tolist()):
            sequence = self.sequences[user]
            first = max(1, (len(sequence) - 1) // 2) if self.is_pretraining else 1
            place = int(self.rng.integers(first, len(sequence)))
            parts.append(sequence[max(0, place - self.settings.history_length) : place])
            targets[row] = sequence[place]
        return parts, targets

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The parts named by ``loss_names``."""
        parts, targets = self.cut_sequences(interaction[self.USER_ID].cpu().numpy())
        users = self.represent(parts)
        if not self.is_pretraining:
            logits = cosine_logits(users, self.item_matrix.detach()[1:], self.settings.temperature)
            return (functional.cross_entropy(logits, torch.from_numpy(targets - 1).to(logits.device)),)
        contrast = item_contrast_loss(users, self.represent_items(targets), self.settings.temperature)
        masked = self.masked_word_loss(parts) + self.masked_word_loss([targets[row : row + 1] for row in range(len(targets))])
        return contrast, self.settings.mlm_weight * masked

    def masked_word_loss(self, sequences: list[np.ndarray]) -> Tensor:
        """L_MLM: cross-entropy of the tokens that are hidden,."""
        settings, words = self.settings, self.encoder.words
        sentences, truth = [], []
        for items in sequences:
            sentence = Sentence(*self.sentences.sentence(items.tolist()))
            mask = self.backbone.tokenizer.mask_token_id
            shown, labels = mask_words(
                sentence.tokens, self._begins_word, settings.mlm_share, mask, len(self._begins_word), self.rng
            )
            sentences.append(sentence._replace(tokens=shown))
            truth.append(torch.from_numpy(labels))
        labels = torch.cat(truth).to(words.device)
        hidden = torch.cat(self.encoder(sentences))[labels >= 0]
        logits = self.mlm_head(hidden) @ words.T + self.mlm_bias
        return functional.cross_entropy(logits, labels[labels >= 0], reduction="sum") / max(1, len(hidden))

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``: ``[B, C]``; with None the whole catalog: ``[B, n_items]``."""
        users, matrix = self.represent_distinct_users(interaction), self._matrix(candidates)
        scores = cosine_logits(users, matrix, self.settings.temperature)
        if candidates is not None:
            return scores.gather(1, candidates.to(scores.device))
        scores[:, 0] = float("-inf")  # the padding item
        return scores

    def _matrix(self, candidates: Tensor | None) -> Tensor:
        """The matrix of items, ``[n_items, hidden size]``; before fine-tuning of those at least that are candidates."""
        if self._has_matrix:
            return self.item_matrix.detach()
        if candidates is None:
            return self.item_table.whole()
        wanted = np.unique(candidates.cpu().numpy())
        matrix = self.item_matrix.detach().clone()
        matrix[torch.from_numpy(wanted).to(matrix.device)] = self.item_table.rows(wanted)
        return matrix

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        return self.score(interaction, interaction[self.ITEM_ID][:, None])[:, 0]
