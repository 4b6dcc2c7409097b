"""A model from outside the package: the LLM as two towers, trained on the batch's own targets.

Reference:
    Xinyang Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019.

``pip install ./examples`` makes it known; then ``recbole-llm run --model=SASRec,MyModel --dataset=ml-100k``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recbole_llm import register_model
from recbole_llm.config.settings import select
from recbole_llm.recommender.llm_recommender import LLMRecommender


@dataclass(frozen=True)
class MyModelSettings:
    """The model's own keys; ``my_model.yaml`` has their types, defaults and meanings."""

    temperature: float
    correct_popularity: bool


class MyModel(LLMRecommender):
    """L = mean over the batch of ``-log softmax_j( s(u, j) / temperature - log p_j )`` at the user's own target.

    The candidates j are all targets of the batch, so that no item is encoded for a negative alone. Popular items are
    candidates more often than others: ``log p_j``, an item's share of the training targets, corrects that (equation 3).
    """

    loss_names = ("in_batch",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.settings = select(MyModelSettings, config)
        targets = dataset.inter_feat[dataset.iid_field]
        counts = torch.bincount(targets, minlength=dataset.item_num).clamp(min=1)
        self.register_buffer("log_share", (counts / counts.sum()).log(), persistent=False)

    def calculate_loss(self, interaction):
        targets = interaction[self.POS_ITEM_ID]
        users = self.represent_users(interaction)  # [B, d']
        items = self.represent_candidates(targets.cpu().numpy()[:, None])[:, 0]  # [B, d'], each distinct one encoded once
        scores = users @ items.T / self.settings.temperature
        if self.settings.correct_popularity:
            scores = scores - self.log_share[targets]
        # Another row with the same target is no negative.
        same = (targets[:, None] == targets) & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        scores = scores.masked_fill(same, float("-inf"))
        return (torch.nn.functional.cross_entropy(scores, torch.arange(len(targets), device=scores.device)),)


def register() -> None:
    """Called by recbole-llm: ``pyproject.toml`` names this function under the entry-point group ``recbole_llm.models``."""
    register_model(
        "MyModel",
        model=MyModel,
        properties=Path(__file__).with_name("my_model.yaml"),
        paper="Yi et al., Sampling-Bias-Corrected Neural Modeling, RecSys 2019, with an LLM as both towers",
    )
