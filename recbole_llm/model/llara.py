"""LLaRA: hybrid prompts of titles and projected item vectors, learned from text-only to hybrid.

Reference:
    Jiayi Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024.

Reference code:
    https://github.com/ljy0ustc/LLaRA
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.recommender.heads import perceptron
from recbole_llm.recommender.llm_recommender import LLMRecommender


@dataclass(frozen=True)
class LLaRASettings:
    """The model's settings; each field is the key of the same name."""

    curriculum: str
    placeholder: str


class LLaRA(LLMRecommender):
    """LLaRA: each title is followed by the teacher's vector of its item, projected into the LLM.

    Curriculum (section 3.4): at training progress p a batch shows the vectors with probability p, and otherwise a neutral
    placeholder in their places. LoRA matrices, the projector and the heads are trained.

    Attributes:
        hybrid: whether the present batch shows the vectors.
    """

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.settings = select(LLaRASettings, config)
        self.hybrid = True
        placeholder = encode_text(self.backbone.tokenizer, [self.settings.placeholder])[0]
        if not placeholder:
            raise UserError("placeholder: a text of at least one token stands where an item's vector will be.")
        self.register_buffer("placeholder_ids", torch.tensor(placeholder, device=self.backbone.device), persistent=False)

    def _item_projection(self) -> nn.Module:
        """The projector: two linear layers with GELU between them, without normalization."""
        return perceptron(self.teacher.size, self.item_projection_hidden_size, self.backbone.input_size)

    def item_inputs(self, items: Tensor) -> Tensor:
        if self.hybrid:
            return super().item_inputs(items)
        neutral = self.backbone.embedding(self.placeholder_ids).mean(dim=0)
        return neutral.float().expand(len(items), -1)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        self.hybrid = self.settings.curriculum == "none" or bool(self.rng.random() < self.progress)
        try:
            return super().calculate_loss(interaction)
        finally:
            self.hybrid = True  # evaluation always shows the vectors
