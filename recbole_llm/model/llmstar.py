"""LLM-STAR: anchor the LLM between a sequential teacher and the same history in other orders.

Reference:
    "LLM-STAR: Sequence-Teacher-Anchored LLM Recommender with Adaptive Regularization", under double-blind review.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.perturbation import draw_negatives
from recbole_llm.loss.sequence_anchor import bounded_anchor, sequence_anchor_loss, teacher_confidence
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.retrieval import RetrievalForm


@dataclass(frozen=True)
class LLMSTARSettings:
    """The model's settings; each field is the key of the same name."""

    head_hidden_size: int
    representation_size: int
    beta: float
    similarity: str
    temperature: float
    confidence: str
    confidence_scale: str
    anchor_norm: str
    negative_grad: bool
    shuffle_negatives: int
    window_negatives: int
    last_negatives: int
    window_shortest: int
    window_longest: int
    windows_shuffled: int | None
    last_items: int


class LLMSTAR(LLMRecommender):
    """LLM-STAR: L = L_rec + beta L_seq (equation 4).

    The LLM and the teacher are frozen. Trained: f_I, f_item, f_user, the user adapter and the vectors [UserOut], [ItemOut].

    Ablations of the paper's Table 5: (a) ``beta: 0``; (b) ``confidence: none``; (c) as it is.
    """

    forms = {"retrieval": RetrievalForm}
    loss_names = ("retrieval", "sequence")

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.settings = settings = select(LLMSTARSettings, config)
        self.perturbations = {
            "whole": settings.shuffle_negatives,
            "window": settings.window_negatives,
            "last": settings.last_negatives,
            "window_shortest": settings.window_shortest,
            "window_longest": settings.window_longest,
            "windows_shuffled": settings.windows_shuffled,
            "last_items": settings.last_items,
        }
        self.user_adapter = projection(  # f_user of section 3.2
            self.teacher.size, settings.head_hidden_size, settings.representation_size
        )

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        settings, candidates = self.settings, self.draw_candidates(interaction)
        if settings.beta == 0:  # ablation (a): no anchors, and no cost of them
            return (candidates.retrieval(self, self.represent_users(interaction))[0],)

        # Section 3.2: the history and its multi-scale perturbations, encoded together (they share their beginnings). Of a
        # window the whole history alone has anchors.
        histories, last = self.histories(interaction), np.unique(self.window_ends(interaction))
        perturbed, parents = draw_negatives(histories.items[last], histories.lengths[last], self.rng, **self.perturbations)
        representations = self.represent_prompts(self.prompts.perturbed_prompts(histories, perturbed, last[parents]))
        users, negatives = representations.split([len(histories.lengths), len(parents)])
        if not settings.negative_grad:
            negatives = negatives.detach()

        # Equation 1.
        retrieval, _ = candidates.retrieval(self, users)

        # The positive anchor u_pos, and section 3.3: how sure the teacher is of the true next item.
        teacher_users = self.teacher.represent(interaction[torch.from_numpy(last)])  # u_cf
        items, left_out = (torch.from_numpy(table).to(users.device) for table in candidates.of_rows(last))
        confidence = teacher_confidence(teacher_users, self.teacher.item_vectors[items], settings.confidence, left_out)

        if settings.confidence_scale == "mean":
            confidence = confidence / confidence.mean().clamp_min(1e-6)
        positive = self.user_adapter(teacher_users)
        if settings.anchor_norm == "bounded":
            positive = bounded_anchor(positive, users[last])

        # Equation 3.
        sequence = sequence_anchor_loss(
            users[last],
            positive,
            negatives,
            torch.from_numpy(parents).to(users.device),
            confidence,
            settings.similarity,
            settings.temperature,
        )
        return retrieval, settings.beta * sequence
