"""RSLLM: item IDs as a language of their own beside the titles, and users and items aligned by two towers.

Reference:
    "Integrating Recommendation Systems as a New Language in Large Models" (RSLLM). No public code.
"""

from __future__ import annotations

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.two_tower import contrastive_loss
from recbole_llm.recommender.heads import perceptron
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.trainer.stages import stages_to_run

_EMBEDDING_SPREAD = 0.02  # with which the teachers' own item embeddings begin


class RSLLM(LLMRecommender):
    """RSLLM: behind each title stand a learned marker [DSR] and the item's ID, first as a token, then as a vector.

    Prompts (section 4.1), by the stages of training (section 4.2):

    * Text-ID: ``{title} [DSR] [IID]``, a learned token for each item.
    * hybrid: ``{title} [DSR] [e_c]``, the teacher's item vector, projected into the LLM.

    Loss (section 4.2.1), the same in both stages: ``L = L_NIP + gamma L_I + beta L_U``. The user tower reads the history
    and, behind it, the target's title; the target tower reads the target alone. g^U, g^IU and g^I are mean hidden states
    of the history, of the title behind it, and of the target alone.

    The paper writes titles. In ``recommend_by: retrieval`` L_retrieval stands in place of L_NIP, the towers are the
    representations of user and item, and L_I, which needs a target behind its history, has no counterpart.

    Attributes:
        hybrid: whether prompts are hybrid, else Text-ID.
    """

    has_marker = True

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.id_tokens, self.behaviour_tokens = config["id_tokens"], config["behaviour_tokens"]
        self.gamma, self.beta, self.temperature = config["gamma"], config["beta"], config["temperature"]
        if self.id_tokens:
            self.id_embedding = nn.Embedding.from_pretrained(self._token_vectors(dataset.item_num), freeze=False)
        if self.behaviour_tokens and self.teacher is None:
            self.item_embedding = nn.Embedding(dataset.item_num, config["embedding_size"])
            nn.init.normal_(self.item_embedding.weight, std=_EMBEDDING_SPREAD)
        if self.recommend_by == "generation":
            losses = {"title": 1.0, "item": self.gamma, "user": self.beta}
        else:
            losses = {"retrieval": 1.0, "user": self.beta}
        self.loss_names = tuple(name for name, weight in losses.items() if weight)
        self.show_vectors(stages_to_run(config)[-1]["vectors"])

    def _needs_teacher(self, config: Config) -> bool:
        return config["behaviour_tokens"] and config["preload_embeddings"]

    def _item_projection(self, config: Config) -> nn.Module | None:
        """The projector of the behaviour tokens: a two-layer perceptron (section 4.1.2)."""
        if not config["behaviour_tokens"]:
            return None
        width, size = self.backbone.input_size, self.teacher.size if self.teacher else config["embedding_size"]
        return perceptron(size, config["item_projection_hidden_size"] or width, width)

    def show_vectors(self, shown: bool) -> None:
        """Build hybrid prompts, or Text-ID prompts; where an ablation leaves out what they add, prompts of text alone."""
        self.hybrid = shown
        super().show_vectors(self.behaviour_tokens if shown else self.id_tokens)
        self.forget_items()

    def item_inputs(self, items: Tensor) -> Tensor:
        """What stands behind the marker: the items' behaviour tokens, or their ID tokens."""
        if not self.has_item_vectors:
            return super().item_inputs(items)
        if not self.hybrid:
            return self.id_embedding(items)
        return self.item_projection(self.teacher.item_vectors[items] if self.teacher else self.item_embedding(items))

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """L_NIP, gamma L_I and beta L_U; or L_retrieval and beta L_U. Parts of weight 0 are left out."""
        if self.recommend_by == "generation":
            return self._generation_losses(interaction)
        users = self.represent_users(interaction)
        candidates = self.training_candidates(interaction)
        items = self.represent_candidates(candidates)
        losses = [retrieval_loss(torch.einsum("bd,bcd->bc", users, items))]
        if self.beta:
            losses.append(self.beta * self._align(users, items[:, 0], candidates[:, 0]))
        return tuple(losses)

    def _generation_losses(self, interaction: Interaction) -> tuple[Tensor, ...]:
        if not self.gamma and not self.beta:
            return (self.title_loss(interaction),)
        questions = self.title_questions(interaction)
        losses, counts, history, answers = self.titles.features(*questions, self.rng)  # ..., g^U, g^IU
        targets = questions[2][:, 0]
        distinct, place = np.unique(targets, return_inverse=True)
        alone = self.titles.item_features(distinct, self.vectors)[torch.from_numpy(place).to(history.device)]  # g^I
        parts = [losses.sum() / counts.sum()]
        if self.gamma:
            parts.append(self.gamma * self._align(alone, answers, targets))
        if self.beta:
            parts.append(self.beta * self._align(history, alone, targets))
        return tuple(parts)

    def _align(self, queries: Tensor, keys: Tensor, items: np.ndarray) -> Tensor:
        return contrastive_loss(queries, keys, torch.from_numpy(items).to(queries.device), self.temperature)
