"""CoLLM: the user's and the items' collaborative representations inside the prompt, learned in two steps.

Reference:
    Yang Zhang et al., "CoLLM: Integrating Collaborative Embeddings into Large Language Models for Recommendation",
    IEEE TKDE 2025. The sequential forms compared here are those of the LLM-SRec paper.

Reference code:
    https://github.com/zyang1580/CoLLM
"""

from __future__ import annotations

from dataclasses import dataclass

from recbole.config import Config
from torch import nn

from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.recommender.heads import perceptron
from recbole_llm.recommender.llm_recommender import LLMRecommender


@dataclass(frozen=True)
class CoLLMSettings:
    """The model's settings; each field is the key of the same name."""

    mapping: str


class CoLLM(LLMRecommender):
    """CoLLM: step 1 tunes the LLM by LoRA on prompts of text alone; step 2 maps the teacher's representations into it.

    The steps are the key ``stages``; in the second LoRA matrices stay as they are, and the mapping f_I, the user's mapping
    and, in the retrieval form, the heads are trained. Under ``mapping: shared`` users and items have one mapping, that of the
    public code.
    """

    has_user_vector = True

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = select(CoLLMSettings, config)
        super().__init__(config, dataset)

    def _item_projection(self) -> nn.Module | None:
        if self.settings.mapping == "normalized":
            return super()._item_projection()
        return perceptron(self.teacher.size, self.item_projection_hidden_size, self.backbone.input_size, "relu")

    def _user_projection(self) -> nn.Module:
        return self.item_projection if self.settings.mapping == "shared" else super()._user_projection()
