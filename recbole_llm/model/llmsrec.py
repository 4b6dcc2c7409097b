"""LLM-SRec: distil a sequential teacher's user representation into a frozen LLM.

Reference:
    Sein Kim et al., "Lost in Sequence: Do Large Language Models Understand Sequential Recommendation?", KDD 2025.

Reference code:
    https://github.com/Sein-Kim/LLM-SRec
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.loss.distillation import distillation_loss
from recbole_llm.loss.uniformity import uniformity_loss
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.retrieval import RetrievalForm


@dataclass(frozen=True)
class LLMSRecSettings:
    """The model's settings; each field is the key of the same name."""

    user_vector: bool
    representation_size: int
    teacher_head_hidden_size: int
    distill_loss: str
    distill_weight: float
    distill_temperature: float
    mse_reduction: str
    uniform_weight: float


class LLMSRec(LLMRecommender):
    """LLM-SRec: L = L_retrieval + L_distill + L_uniform (equation 4).

    The LLM and the teacher are frozen. Trained: f_I, f_item, f_user, f_CF-user and the vectors [UserOut], [ItemOut].
    """

    forms = {"retrieval": RetrievalForm}
    loss_names = ("retrieval", "distillation", "uniformity")

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(LLMSRecSettings, config)
        self.has_user_vector = settings.user_vector
        super().__init__(config, dataset)
        self.teacher_head = projection(  # f_CF-user
            self.teacher.size, settings.teacher_head_hidden_size, settings.representation_size, "gelu"
        )

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        # Equation 1: the target against its negatives.
        users = self.represent_users(interaction)  # f_user(h_U)
        retrieval, _ = self.draw_candidates(interaction).retrieval(self, users)

        # Equation 2: the student's representation towards the teacher's, O_u.
        ends = self.window_ends(interaction)
        teacher_users = self.teacher_head(self.teacher.represent_windows(interaction, ends))  # f_CF-user(O_u)
        distillation = distillation_loss(
            users, teacher_users, settings.distill_loss, settings.mse_reduction, settings.distill_temperature
        )

        # Equation 3: neither side may let all users look the same.
        last = np.unique(ends)  # one representation of each user
        uniformity = uniformity_loss(users[last]) + uniformity_loss(teacher_users[last])
        return retrieval, settings.distill_weight * distillation, settings.uniform_weight * uniformity
