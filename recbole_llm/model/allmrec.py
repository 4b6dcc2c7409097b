"""A-LLMRec: one joint vector of an item's text and its collaborative embedding, then a frozen LLM that reads it.

Reference:
    Sein Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender
    System", KDD 2024.

Reference code:
    https://github.com/ghdtjr/A-LLMRec
"""

from __future__ import annotations

from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch
from recbole.config import Config
from torch import Tensor, nn

from recbole_llm.backbone.sentence_encoder import load_sentence_encoder
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.lock import held
from recbole_llm.processes import group as processes
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.trainer.alignment import train_alignment

# What alignment_weights are of, as the loss names them.
WEIGHTS = ("matching_weight", "item_reconstruction_weight", "text_reconstruction_weight", "recommendation_weight")


@dataclass(frozen=True)
class ALLMRecSettings:
    """The model's settings; each field is the key of the same name."""

    checkpoint_dir: str
    device: torch.device
    seed: int
    sentence_encoder: str
    latent_size: int
    alignment_epochs: int
    alignment_batch_size: int
    alignment_learning_rate: float
    alignment_weights: list[float]
    sentence_text: list[str] | None
    item_text_separator: str


class ALLMRec(LLMRecommender):
    """A-LLMRec: stage 1 aligns two auto-encoders (section 4.1); stage 2 trains projections into a frozen LLM (4.2).

    Attributes:
        joint_vectors: float32 ``[items, latent_size]``, the joint collaborative-text vector of each item.
    """

    has_user_vector = True

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = select(ALLMRecSettings, config)
        if len(self.settings.alignment_weights) != len(WEIGHTS):
            raise UserError("alignment_weights: give four numbers, of matching, reconstructed items and texts, recommendation.")
        super().__init__(config, dataset)
        self.register_buffer("joint_vectors", self._align(dataset), persistent=False)

    def _sentences(self, dataset: TextSequentialDataset) -> list[str]:
        """What the sentence encoder reads of each item."""
        if self.settings.sentence_text is None:
            return dataset.item_texts
        separator = self.settings.item_text_separator
        texts = [separator.join(attributes) for attributes in dataset.attributes_of(self.settings.sentence_text)]
        return [text or usual for text, usual in zip(texts, dataset.item_texts, strict=True)]

    def _align(self, dataset: TextSequentialDataset) -> Tensor:
        """Stage 1, or what it gave before for the same teacher, texts and settings."""
        settings = self.settings
        encoder = load_sentence_encoder(settings.sentence_encoder, settings.device)
        texts = encoder.encode(self._sentences(dataset))
        rows = dataset.inter_feat
        with torch.no_grad():
            users = torch.cat(
                [
                    self.teacher.represent(rows[slice(start, start + 1024)].to(settings.device)).cpu()
                    for start in range(0, len(rows), 1024)
                ]
            )
        folder = Path(settings.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        getLogger().info(f"A-LLMRec stage 1: {len(rows)} rows, {settings.alignment_epochs} epochs")
        file = folder / f"alignment-{dataset.fingerprint[:10]}-{self.teacher.identity[:10]}.safetensors"
        self.stored_files = [file]
        with processes.main_first(), held(file):
            alignment = train_alignment(
                self.teacher.item_vectors.cpu(),
                texts.cpu(),
                users,
                rows[self.POS_ITEM_ID].cpu(),
                rows[self.ITEM_SEQ].cpu(),
                latent_size=settings.latent_size,
                epochs=settings.alignment_epochs,
                batch_size=settings.alignment_batch_size,
                learning_rate=settings.alignment_learning_rate,
                weights=dict(zip(WEIGHTS, settings.alignment_weights, strict=True)),
                seed=settings.seed,
                device=settings.device,
                checkpoint=file,
            )
        with torch.no_grad():
            return alignment.joint(self.teacher.item_vectors)

    def _item_projection(self) -> nn.Module:
        """f_I, of the joint vectors."""
        return projection(self.settings.latent_size, self.item_projection_hidden_size, self.backbone.input_size)

    def item_inputs(self, items: Tensor) -> Tensor:
        """The projected joint vectors."""
        return self.item_projection(self.joint_vectors[items])
