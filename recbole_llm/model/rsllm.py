"""RSLLM: item IDs as a language of their own beside the titles, and users and items aligned by two towers.

Reference:
    "Integrating Recommendation Systems as a New Language in Large Models" (RSLLM). No public code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.loss.two_tower import contrastive_loss
from recbole_llm.recommender.generation import GenerationForm
from recbole_llm.recommender.heads import perceptron
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.trainer.stages import StageSettings, stages_to_run

_EMBEDDING_SPREAD = 0.02  # with which the teachers' own item embeddings begin


@dataclass(frozen=True)
class RSLLMSettings:
    """The model's settings; each field is the key of the same name."""

    id_tokens: bool
    behaviour_tokens: bool
    preload_embeddings: bool
    embedding_size: int
    gamma: float
    beta: float
    temperature: float


class GenerationTowers(GenerationForm):
    """``L = L_NIP + gamma L_I + beta L_U`` (section 4.2.1). The user tower reads the history and, behind it, the target's
    title; the target tower reads the target alone. g^U, g^IU and g^I are mean hidden states of the history, of the title
    behind it, and of the target alone."""

    def __init__(self, model: RSLLM, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(model, config, dataset)
        weights = {"title": 1.0, "item": model.settings.gamma, "user": model.settings.beta}
        self.loss_names = tuple(name for name, weight in weights.items() if weight)

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """L_NIP, gamma L_I and beta L_U, those of weight 0 left out."""
        model, gamma, beta = self.model, self.model.settings.gamma, self.model.settings.beta
        if not gamma and not beta:
            return super().loss(interaction)
        inputs = self.training_inputs(interaction)
        times = self.history_times(interaction)
        losses, counts, history, title = self.generator.features(*inputs, model.rng, times)  # ..., g^U, g^IU
        targets = inputs[2][:, 0]
        distinct, place = np.unique(targets, return_inverse=True)
        alone = self.generator.item_features(distinct, model.vectors)[torch.from_numpy(place).to(history.device)]  # g^I
        parts = [losses.sum() / counts.sum()]
        if gamma:
            parts.append(gamma * model.align(alone, title, targets))
        if beta:
            parts.append(beta * model.align(history, alone, targets))
        return tuple(parts)


class RetrievalTowers(RetrievalForm):
    """L_retrieval stands in place of L_NIP, the towers are the representations of user and item, and L_I, which needs a
    target behind its history, has no counterpart: ``L = L_retrieval + beta L_U``."""

    def __init__(self, model: RSLLM, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(model, config, dataset)
        self.loss_names = ("retrieval", "user") if model.settings.beta else ("retrieval",)

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """L_retrieval and beta L_U, which is left out where its weight is 0."""
        model, beta = self.model, self.model.settings.beta
        users = model.represent_users(interaction)
        retrieval, targets = model.draw_candidates(interaction).retrieval(model, users)
        if not beta:
            return (retrieval,)
        return retrieval, beta * model.align(users, targets, interaction[model.POS_ITEM_ID].cpu().numpy())


class RSLLM(LLMRecommender):
    """RSLLM: behind each title stand a learned marker [DSR] and the item's ID, first as a token, then as a vector.

    Prompts (section 4.1), by the stages of training (section 4.2):

    * Text-ID: ``{title} [DSR] [IID]``, a learned token for each item.
    * hybrid: ``{title} [DSR] [e_c]``, the teacher's item vector, projected into the LLM.

    The loss is the same in both stages: :class:`GenerationTowers`, the paper's, or :class:`RetrievalTowers`.

    Attributes:
        hybrid: whether prompts are hybrid, else Text-ID.
    """

    forms = {"retrieval": RetrievalTowers, "generation": GenerationTowers}
    parts = {
        "lora": LLMRecommender.parts["lora"],
        "tokens": ("id_embedding.*", "marker"),
        "mapping": ("item_embedding.*", *LLMRecommender.parts["mapping"]),
        "heads": LLMRecommender.parts["heads"],
    }
    has_marker = True

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(RSLLMSettings, config)
        super().__init__(config, dataset)
        if settings.id_tokens:
            self.id_embedding = nn.Embedding.from_pretrained(self._token_vectors(dataset.item_num), freeze=False)
        if settings.behaviour_tokens and self.teacher is None:
            self.item_embedding = nn.Embedding(dataset.item_num, settings.embedding_size)
            nn.init.normal_(self.item_embedding.weight, std=_EMBEDDING_SPREAD)
        self.show_vectors(stages_to_run(select(StageSettings, config), self.parts)[-1]["vectors"])

    def _needs_teacher(self) -> bool:
        return self.settings.behaviour_tokens and self.settings.preload_embeddings

    def _item_projection(self) -> nn.Module | None:
        """The projector of the behavior tokens: a two-layer perceptron (section 4.1.2)."""
        if not self.settings.behaviour_tokens:
            return None
        size = self.teacher.size if self.teacher else self.settings.embedding_size
        return perceptron(size, self.item_projection_hidden_size, self.backbone.input_size)

    def show_vectors(self, shown: bool) -> None:
        """Build hybrid prompts, or Text-ID prompts; where an ablation leaves out what they add, prompts of text alone."""
        self.hybrid = shown
        super().show_vectors(self.settings.behaviour_tokens if shown else self.settings.id_tokens)
        self.form.forget_items()

    def item_inputs(self, items: Tensor) -> Tensor:
        """What stands behind the marker: the items' behavior tokens, or their ID tokens."""
        if not self.has_item_vectors:
            return super().item_inputs(items)
        if not self.hybrid:
            return self.id_embedding(items)
        return self.item_projection(self.teacher.item_vectors[items] if self.teacher else self.item_embedding(items))

    def align(self, queries: Tensor, keys: Tensor, items: np.ndarray) -> Tensor:
        """Contrast the rows of one tower ``[B, d]`` with the other's ``[B, d]``; ``items``: the targets, int64 ``[B]``."""
        return contrastive_loss(queries, keys, torch.from_numpy(items).to(queries.device), self.settings.temperature)
