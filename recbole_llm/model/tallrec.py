"""TALLRec: an LLM tuned by LoRA on prompts of text alone.

Reference:
    Keqin Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
    Recommendation", RecSys 2023. ``recommend_by: yes_no`` is the form of that paper; the others are those in which the
    LLM-SRec and RSLLM papers compare it.

Reference code:
    https://github.com/SAI990323/TALLRec
"""

from __future__ import annotations

from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.yes_no import YesNoAnswers


class TALLRec(LLMRecommender):
    """TALLRec: titles in, no item vectors and no teacher; LoRA matrices and the heads are trained.

    By Yes and No (the form of the paper): the prompt lists the items that the user liked and disliked so far and names the
    next one; the LLM learns to answer whether the user liked it, and P(Yes) against P(No) is what it predicts.
    """

    has_item_vectors = False

    def _prepare_generation(self, config: Config, dataset: TextSequentialDataset) -> None:
        if self.recommend_by != "yes_no":
            super()._prepare_generation(config, dataset)
            return
        self.loss_names = ("answer",)
        self.rating_field, self.like_threshold = config["RATING_FIELD"], config["like_threshold"]
        self.rating_list_field = self.rating_field + config["LIST_SUFFIX"]
        self.yes_no = YesNoAnswers(self.backbone, dataset.item_texts, config, self.encoder.settings, self.encoder.counts)

    def yes_no_prompts(self, interaction: Interaction) -> PromptBatch:
        """The question of each row: its history with the ratings so far, and its item, whose rating is not read."""
        history, lengths = self.history_items(interaction)
        liked = interaction[self.rating_list_field].cpu().numpy() > self.like_threshold
        return self.yes_no.prompts.prompts(history, lengths, liked, interaction[self.ITEM_ID].cpu().numpy())

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        if self.recommend_by != "yes_no":
            return super().calculate_loss(interaction)
        likes = interaction[self.rating_field].cpu().numpy() > self.like_threshold
        return (self.yes_no.loss(self.yes_no_prompts(interaction), likes),)

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of each row's item, ``[B]``; P(Yes) under ``recommend_by: yes_no``."""
        if self.recommend_by != "yes_no":
            return super().predict(interaction)
        return self.yes_no.probability(self.yes_no_prompts(interaction))

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        if self.recommend_by == "yes_no":
            raise UserError("recommend_by: yes_no judges an item that is given; to rank items, train by retrieval.")
        return super().score(interaction, candidates)
