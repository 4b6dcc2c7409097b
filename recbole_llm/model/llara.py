"""LLaRA: hybrid prompts of titles and projected item vectors, learned from text-only to hybrid.

Reference:
    Jiayi Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024.

Reference code:
    https://github.com/ljy0ustc/LLaRA
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.recommender.heads import perceptron, projection
from recbole_llm.recommender.llm_recommender import LLMRecommender


@dataclass(frozen=True)
class LLaRASettings:
    """The model's settings; each field is the key of the same name."""

    curriculum: str
    curriculum_epochs: float | None
    epochs: int
    placeholder: str
    projector: str


class LLaRA(LLMRecommender):
    """LLaRA: each title is followed by the teacher's vector of its item, projected into the LLM.

    Curriculum (section 3.4): at training progress p a batch shows the vectors with probability p, and otherwise a neutral
    placeholder in their places (``curriculum: linear``); under ``sample`` each user's prompt is drawn for itself, with the
    prompts of its candidates. ``curriculum_epochs`` reaches p = 1 earlier. LoRA matrices, the projector and the heads are
    trained.

    Attributes:
        hybrid: whether the present batch shows the vectors.
    """

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = select(LLaRASettings, config)
        super().__init__(config, dataset)
        self.hybrid = True
        placeholder = encode_text(self.backbone.tokenizer, [self.settings.placeholder])[0]
        if not placeholder:
            raise UserError("placeholder: a text of at least one token stands where an item's vector will be.")
        self.register_buffer("placeholder_ids", torch.tensor(placeholder, device=self.backbone.device), persistent=False)

    def _item_projection(self) -> nn.Module:
        """The projector: two linear layers with GELU between them; ``normalized``: that of LLM-SRec."""
        make = perceptron if self.settings.projector == "perceptron" else projection
        return make(self.teacher.size, self.item_projection_hidden_size, self.backbone.input_size)

    def item_inputs(self, items: Tensor) -> Tensor:
        if self.hybrid:
            return super().item_inputs(items)
        neutral = self.backbone.embedding(self.placeholder_ids).mean(dim=0)
        return neutral.float().expand(len(items), -1)

    @property
    def share_hybrid(self) -> float:
        """How likely a prompt is to show the vectors at this place of the training, 0 to 1."""
        settings = self.settings
        if settings.curriculum == "none":
            return 1.0
        epochs = settings.curriculum_epochs or settings.epochs
        return min(1.0, self.progress * settings.epochs / epochs)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        share = self.share_hybrid
        try:
            if self.settings.curriculum == "sample" and share < 1:
                return self._mixed_loss(interaction, share)
            self.hybrid = share == 1 or bool(self.rng.random() < share)
            return super().calculate_loss(interaction)
        finally:
            self.hybrid = True  # evaluation always shows the vectors

    def _mixed_loss(self, interaction: Interaction, share: float) -> tuple[Tensor, ...]:
        """Hybrid and text-only users of a batch, each part's losses by its share of the rows."""
        users = interaction[self.USER_ID].cpu().numpy()
        distinct, place = np.unique(users, return_inverse=True)
        hybrid = (self.rng.random(len(distinct)) < share)[place]
        losses: list[tuple[Tensor, ...]] = []
        for self.hybrid, chosen in ((True, hybrid), (False, ~hybrid)):
            if chosen.any():
                rows = interaction[torch.from_numpy(np.flatnonzero(chosen)).to(interaction[self.USER_ID].device)]
                losses.append(tuple(loss * chosen.mean() for loss in super().calculate_loss(rows)))
        return tuple(sum(parts[1:], parts[0]) for parts in zip(*losses, strict=True))
