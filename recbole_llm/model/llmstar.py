"""LLM-STAR: anchor the LLM between a sequential teacher and the same history in other orders.

Reference:
    "LLM-STAR: Sequence-Teacher-Anchored LLM Recommender with Adaptive Regularization", under double-blind review.
"""

from __future__ import annotations

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.perturbation import draw_negatives
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.loss.sequence_anchor import sequence_anchor_loss, teacher_confidence
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.llm_recommender import LLMRecommender


class LLMSTAR(LLMRecommender):
    """LLM-STAR: L = L_rec + beta L_seq (equation 4).

    The LLM and the teacher are frozen. Trained: f_I, f_item, f_user, the user adapter and the vectors [UserOut], [ItemOut].

    Ablations of the paper's Table 5: (a) ``beta: 0``; (b) ``confidence: none``; (c) as it is.
    """

    loss_names = ("retrieval", "sequence")

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.beta = config["beta"]
        self.similarity = config["similarity"]
        self.temperature = config["temperature"]
        self.confidence = config["confidence"]
        self.negative_grad = config["negative_grad"]
        self.perturbations = {
            "whole": config["shuffle_negatives"],
            "window": config["window_negatives"],
            "last": config["last_negatives"],
            "window_shortest": config["window_shortest"],
            "window_longest": config["window_longest"],
            "last_items": config["last_items"],
        }
        hidden, size = config["head_hidden_size"], config["representation_size"]
        self.user_adapter = projection(self.teacher.size, hidden, size)  # f_user of section 3.2

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        candidates = self.training_candidates(interaction)
        if self.beta == 0:  # ablation (a): no anchors, and no cost of them
            return (retrieval_loss(self.score_candidates(self.represent_users(interaction), candidates)),)

        # Section 3.2: the history and its multi-scale perturbations, encoded together (they share their beginnings).
        histories = self.histories(interaction)
        perturbed, parents = draw_negatives(histories.items, histories.lengths, self.rng, **self.perturbations)
        representations = self.represent_prompts(self.prompts.perturbed_prompts(histories, perturbed, parents))
        users, negatives = representations.split([len(histories.lengths), len(parents)])
        if not self.negative_grad:
            negatives = negatives.detach()

        # Equation 1.
        retrieval = retrieval_loss(self.score_candidates(users, candidates))

        # The positive anchor u_pos, and section 3.3: how sure the teacher is of the true next item.
        teacher_users = self.teacher.represent(interaction)  # u_cf
        candidate_vectors = self.teacher.item_vectors[torch.from_numpy(candidates).to(users.device)]
        confidence = teacher_confidence(teacher_users, candidate_vectors, self.confidence)

        # Equation 3.
        sequence = sequence_anchor_loss(
            users,
            self.user_adapter(teacher_users),
            negatives,
            torch.from_numpy(parents).to(users.device),
            confidence,
            self.similarity,
            self.temperature,
        )
        return retrieval, self.beta * sequence
