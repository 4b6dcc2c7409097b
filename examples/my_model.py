"""A retrieval model of another package: the LLM reads titles and the teacher's item vectors, one loss is trained."""

from __future__ import annotations

from pathlib import Path

from recbole.data.interaction import Interaction
from torch import Tensor

import recbole_llm
from recbole_llm.recommender.llm_recommender import LLMRecommender


class MyModel(LLMRecommender):
    """The target against sampled negatives, weighted."""

    loss_names = ("retrieval",)

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.retrieval_weight = config["retrieval_weight"]

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        return (self.retrieval_weight * self.retrieval_loss(interaction),)


def register() -> None:
    """Named by the entry point."""
    recbole_llm.register_model("MyModel", model=MyModel, properties=Path(__file__).with_name("my_model.yaml"))
