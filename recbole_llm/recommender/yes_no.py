"""Recommending by an LLM's Yes or No to a given item (Bao et al., TALLRec, RecSys 2023)."""

from __future__ import annotations

import os

import numpy as np
import torch
from recbole.config import Config
from torch import Tensor

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import EncoderCounts, EncoderSettings
from recbole_llm.backbone.generation import score_titles, title_loss
from recbole_llm.backbone.text import encode_text
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.yes_no import YesNoPrompts, YesNoPromptSettings


class YesNoAnswers:
    """Asks an LLM whether a user will enjoy an item.

    The answer is one token: the first of `` Yes`` or `` No`` as it is tokenized behind the prompt. Where both begin with the
    same tokens (a space of its own, say), these end the prompt, and the answer is the first token in which they differ.

    Args:
        backbone: the LLM.
        item_texts: text of each item by internal id.
        config: reads ``yes_no_prompt``, ``title_words``, ``history_length``, ``max_prompt_tokens``, ``max_item_tokens``.
        settings: how prompts are batched.
        counts: prompts and tokens are added to it.

    Attributes:
        answers: token of No and of Yes.

    Raises:
        UserError: the LLM has no output head, its tokenizer cannot tell Yes from No, or a template lacks a place.
    """

    def __init__(
        self, backbone: Backbone, item_texts: list[str], config: Config, settings: EncoderSettings, counts: EncoderCounts
    ) -> None:
        backbone.require_output_head(config["backbone"], "answer Yes or No")
        self.backbone, self.counts = backbone, counts
        self.cost = {"micro_batch_tokens": settings.micro_batch_tokens, "call_cost": settings.call_cost}
        self.recompute = settings.recompute
        no, yes = encode_text(backbone.tokenizer, [" No", " Yes"])
        alike = os.path.commonprefix([no, yes])
        if len(alike) in (len(no), len(yes)):
            raise UserError("backbone: its tokenizer writes Yes and No with the same tokens; choose another LLM.")
        self.answers = no[len(alike)], yes[len(alike)]
        self.prompts = YesNoPrompts(
            lambda texts: encode_text(backbone.tokenizer, texts),
            item_texts,
            YesNoPromptSettings(
                template=config["yes_no_prompt"].replace("{item}", config["title_words"][0]),
                history_length=config["history_length"],
                max_prompt_tokens=min(config["max_prompt_tokens"] or backbone.context_length, backbone.context_length),
                max_item_tokens=config["max_item_tokens"],
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
