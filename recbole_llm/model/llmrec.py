"""LLM-Rec: a history and an item are both texts, read by one LLM, and scored by an inner product.

Reference:
    Zuoli Tang et al., "One Model for All: Large Language Models are Domain-Agnostic Recommendation Systems", 2023.

Reference code:
    https://github.com/WHUIR/LLMRec
"""

from __future__ import annotations

import numpy as np
from recbole.config import Config
from torch import Tensor

from recbole_llm.backbone.text import encode_text
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.pieces import Encode
from recbole_llm.prompt.retrieval import PromptSettings
from recbole_llm.prompt.texts import TextPrompts
from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.retrieval import RetrievalForm


class TextForm(RetrievalForm):
    """``s(u, i) = <h_u, h_i>``, h being the hidden state at the end-of-text token: no heads, no learned tokens."""

    def prepare(self) -> None:
        if self.model.backbone.tokenizer.eos_token_id is None:
            raise UserError(
                "backbone: its tokenizer has no end-of-text token, at which LLMRec reads a text; choose another LLM."
            )
        self.build_prompts()

    def build_prompts(self, encode: Encode | None = None) -> None:
        """Make ``prompts``; ``encode`` in the place of the LLM's tokenizer."""
        settings, dataset, backbone = self.settings, self.dataset, self.model.backbone
        self.prompts = TextPrompts(
            encode or (lambda texts: encode_text(backbone.tokenizer, texts)),
            dataset.item_texts,
            PromptSettings(
                history_length=min(settings.history_length, dataset.max_item_list_len),
                max_prompt_tokens=min(settings.max_prompt_tokens or backbone.context_length, backbone.context_length),
                max_item_tokens=settings.max_item_tokens,
            ),
            prefix_ids=backbone.prefix_ids,
        )
        self.prompts.check_fits()
        self.forget_items()

    @property
    def size(self) -> int:
        """Width of the representations: that of the hidden states."""
        return self.model.backbone.hidden_size


class LLMRec(LLMRecommender):
    """LLM-Rec: ``L = -log softmax_i <h_u, h_i>`` over the target and ``train_negatives`` items.

    What differs from the public code, knowingly: a negative is never an item of the user's; a token that the tokenizer puts
    before every text (a BOS token) stands there; and one dataset is one domain.
    """

    forms = {"retrieval": TextForm}
    has_item_vectors = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        ends = self.backbone.embedding.weight.new_full((1,), self.backbone.tokenizer.eos_token_id).long()
        self.register_buffer("end_ids", ends, persistent=False)

    def _read(self, batch: PromptBatch) -> Tensor:
        """The hidden state at the end of each text, float32 ``[N, hidden size]``."""
        return self.encoder(batch, self.vectors(batch, self.backbone.embedding(self.end_ids)))[:, 0]

    def represent_items(self, items: np.ndarray) -> Tensor:
        """h_i of internal item ids int64 ``[n]``: float32 ``[n, hidden size]``."""
        return self._read(self.prompts.item_prompts(items))

    def represent_prompts(self, batch: PromptBatch, users: Tensor | None = None) -> Tensor:
        """h_u of histories' texts: float32 ``[N, hidden size]``."""
        return self._read(batch)
