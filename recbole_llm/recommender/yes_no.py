"""Recommending by an LLM's Yes or No to a given item (Bao et al., TALLRec, RecSys 2023)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import EncoderCounts, EncoderSettings
from recbole_llm.backbone.generation import score_titles, title_loss
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.yes_no import YesNoPrompts, YesNoPromptSettings
from recbole_llm.recommender.form import Form


@dataclass(frozen=True)
class YesNoSettings:
    """What the form reads; each field is the key of the same name."""

    backbone: str
    yes_no_prompt: str
    empty_list: str
    title_words: list[str]
    history_length: int
    max_prompt_tokens: int | None
    max_item_tokens: int
    like_threshold: float
    rating_field: str = field(metadata={"key": "RATING_FIELD"})
    list_suffix: str = field(metadata={"key": "LIST_SUFFIX"})


class YesNoAnswers:
    """Asks an LLM whether a user will enjoy an item.

    The answer is one token: the first of `` Yes`` or `` No`` as it is tokenized behind the prompt, whose own white space at
    its end comes first where it has such. Where both begin with the
    same tokens (a space of its own, say), these end the prompt, and the answer is the first token in which they differ.

    Args:
        backbone: the LLM.
        item_texts: text of each item by internal id.
        settings: wording and limits.
        batching: how prompts are batched.
        counts: prompts and tokens are added to it.

    Attributes:
        answers: token of No and of Yes.

    Raises:
        UserError: the LLM has no output head, its tokenizer cannot tell Yes from No, or a template lacks a place.
    """

    def __init__(
        self,
        backbone: Backbone,
        item_texts: list[str],
        settings: YesNoSettings,
        batching: EncoderSettings,
        counts: EncoderCounts,
    ) -> None:
        backbone.require_output_head(settings.backbone, "answer Yes or No")
        self.backbone, self.counts = backbone, counts
        self.cost = {"micro_batch_tokens": batching.micro_batch_tokens, "call_cost": batching.call_cost}
        self.recompute = batching.recompute
        template = settings.yes_no_prompt.replace("{item}", settings.title_words[0])
        before = template[len(template.rstrip()) :] or " "  # what separates prompt and answer belongs to the answer
        no, yes = encode_text(backbone.tokenizer, [f"{before}No", f"{before}Yes"])
        alike = os.path.commonprefix([no, yes])
        if len(alike) in (len(no), len(yes)):
            raise UserError("backbone: its tokenizer writes Yes and No with the same tokens; choose another LLM.")
        self.answers = no[len(alike)], yes[len(alike)]
        self.prompts = YesNoPrompts(
            lambda texts: encode_text(backbone.tokenizer, texts),
            item_texts,
            YesNoPromptSettings(
                template=template,
                history_length=settings.history_length,
                max_prompt_tokens=min(settings.max_prompt_tokens or backbone.context_length, backbone.context_length),
                max_item_tokens=settings.max_item_tokens,
                empty_list=settings.empty_list,
            ),
            prefix_ids=backbone.prefix_ids,
            suffix_ids=alike,
        )

    def loss(self, batch: PromptBatch, likes: np.ndarray) -> Tensor:
        """Cross-entropy of the answer over the whole vocabulary, the mean over the prompts; a scalar.

        Args:
            batch: B prompts.
            likes: whether the user liked the target, bool ``[B]``.
        """
        self.counts.add(batch)
        answers = [[self.answers[like]] for like in likes.astype(int)]
        losses, _ = title_loss(self.backbone, batch, self._no_vectors(), answers, **self.cost, recompute=self.recompute)
        return losses.mean()

    @torch.no_grad()
    def probability(self, batch: PromptBatch) -> Tensor:
        """P(Yes) against P(No) at the answer's place, ``exp(z_yes) / (exp(z_yes) + exp(z_no))``: float64 ``[B]``."""
        self.counts.add(batch)
        answers = [[[answer] for answer in self.answers]] * len(batch)
        scores, _ = score_titles(self.backbone, batch, self._no_vectors(), answers, **self.cost)
        no, yes = torch.from_numpy(np.stack(scores)).T
        return torch.sigmoid(yes - no)

    def _no_vectors(self) -> Tensor:
        return torch.zeros(0, self.backbone.input_size)


class YesNoForm(Form):
    """The prompt lists what a user liked and disliked and names an item; the LLM learns to answer whether the user liked it,
    and P(Yes) against P(No) is what it predicts.

    Attributes:
        yes_no: asks the LLM.
    """

    loss_names = ("answer",)
    protocol = "yes_no"
    ranks_catalogue = False

    def __init__(self, model: Any, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(model, config, dataset)
        self.settings = select(YesNoSettings, config)

    def prepare(self) -> None:
        encoder = self.model.encoder
        self.yes_no = YesNoAnswers(
            self.model.backbone, self.dataset.item_texts, self.settings, encoder.settings, encoder.counts
        )

    @property
    def prompts(self) -> YesNoPrompts:
        """Builds prompts."""
        return self.yes_no.prompts

    def build_prompts(self) -> None:
        """These prompts show no vectors: there is nothing to build anew."""

    def user_prompts(self, interaction: Interaction) -> PromptBatch:
        """The prompt of each row: its history with the ratings so far, and its item, whose rating is not read."""
        history, lengths = self.model.history_items(interaction)
        ratings = interaction[self.settings.rating_field + self.settings.list_suffix]
        liked = ratings.cpu().numpy() > self.settings.like_threshold
        return self.prompts.prompts(history, lengths, liked, interaction[self.model.ITEM_ID].cpu().numpy())

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """Cross-entropy of the answer."""
        likes = interaction[self.settings.rating_field].cpu().numpy() > self.settings.like_threshold
        return (self.yes_no.loss(self.user_prompts(interaction), likes),)

    def predict(self, interaction: Interaction) -> Tensor:
        """P(Yes) to the item of each row: float64 ``[B]``."""
        return self.yes_no.probability(self.user_prompts(interaction))

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        raise UserError("recommend_by: yes_no judges an item that is given; to rank items, train by retrieval.")
