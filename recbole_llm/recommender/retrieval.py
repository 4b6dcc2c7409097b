"""Recommending by retrieval: users and items are hidden states at out tokens, projected into one space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.prompt.pieces import Encode
from recbole_llm.prompt.retrieval import PromptBuilder, PromptSettings
from recbole_llm.recommender.form import Form
from recbole_llm.recommender.heads import projection, standardized_projection
from recbole_llm.recommender.item_table import ItemTable


@dataclass(frozen=True)
class RetrievalSettings:
    """What the form reads; each field is the key of the same name."""

    prompt_sentence: str
    prompt_request: str
    prompt_goal: str
    prompt_basis: str
    history_length: int
    max_prompt_tokens: int | None
    max_item_tokens: int
    out_tokens: int
    representation_size: int
    head_hidden_size: int
    standardize_states: bool
    standardize_by: str


class RetrievalForm(Form):
    """``s(u, i) = <f_user(h_U), f_item(h_I)>`` (LLM-SRec section 2.1.2), trained by L_retrieval.

    Adds to the model f_item (``item_head``), f_user (``user_head``) and the out tokens [UserOut] and [ItemOut]
    (``user_out``, ``item_out``).

    Attributes:
        prompts: builds user and item prompts.
    """

    loss_names = ("retrieval",)

    def __init__(self, model: Any, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(model, config, dataset)
        self.settings = select(RetrievalSettings, config)
        self._table: ItemTable | None = None
        self._remembered: dict[bytes, Tensor] | None = None

    def prepare(self) -> None:
        model, settings = self.model, self.settings
        self.build_prompts()
        hidden, size = settings.head_hidden_size, settings.representation_size
        head = partial(standardized_projection, by=settings.standardize_by) if settings.standardize_states else projection
        model.item_head = head(model.backbone.hidden_size, hidden, size)
        model.user_head = head(model.backbone.hidden_size, hidden, size)
        model.user_out = model._token_vectors(settings.out_tokens)
        model.item_out = model._token_vectors(settings.out_tokens)

    def build_prompts(self, encode: Encode | None = None) -> None:
        """Make ``prompts``; ``encode`` in the place of the LLM's tokenizer, where its results are at hand."""
        model, settings, dataset, backbone = self.model, self.settings, self.dataset, self.model.backbone
        self.prompts = PromptBuilder(
            encode or (lambda texts: encode_text(backbone.tokenizer, texts)),
            dataset.item_texts,
            PromptSettings(
                sentence=settings.prompt_sentence,
                request=self._request(),
                history_length=min(settings.history_length, dataset.max_item_list_len),
                max_prompt_tokens=min(settings.max_prompt_tokens or backbone.context_length, backbone.context_length),
                max_item_tokens=settings.max_item_tokens,
                item_vectors=model.has_item_vectors,
                user_vector=model.has_user_vector,
                out_tokens=settings.out_tokens,
                marker=model.has_marker,
            ),
            format_dates=dataset.item_dates if dataset.has_dates else None,
            prefix_ids=backbone.prefix_ids,
        )
        self.prompts.check_fits()
        self.forget_items()

    def _request(self) -> str:
        """The end of a user prompt; where the user's representation is shown, it may be among what the request is based on."""
        settings, request = self.settings, self.settings.prompt_request
        if self.model.has_user_vector:
            request = request.replace(",{goal}", f"{settings.prompt_basis},{{goal}}")
        return request.replace("{goal}", settings.prompt_goal)

    @property
    def size(self) -> int:
        """Width of the representations."""
        return self.settings.representation_size

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights."""
        if self._table is None:
            model = self.model
            decisive = (parameter for name, parameter in model.trained_parameters().items() if not name.startswith("residual."))
            self._table = ItemTable(model.represent_items, decisive, model.n_items)
        return self._table

    def forget_items(self) -> None:
        self._table = None

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """L_retrieval of a batch: the target against its negatives."""
        users = self.model.represent_users(interaction)
        return (self.model.draw_candidates(interaction).retrieval(self.model, users)[0],)

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates, or the whole catalog, from the item table; see :meth:`Form.score`."""
        scores = self.item_table.scores(self._users(interaction), candidates)
        residual = self.model.residual
        return scores if residual is None else residual.total(interaction, candidates, scores)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``.

        RecBole repeats a history once per candidate: the distinct ones are found again and encoded once.
        """
        users = self.model.represent_distinct_users(interaction)
        items = self.item_table.rows(interaction[self.model.ITEM_ID].cpu().numpy())
        scores, residual = (users * items).sum(dim=-1), self.model.residual
        if residual is None:
            return scores
        asked = interaction[self.model.ITEM_ID][:, None].to(scores.device)
        return residual.total(interaction, asked, scores[:, None])[:, 0]

    def _users(self, interaction: Interaction) -> Tensor:
        if self._remembered is None:
            return self.model.represent_distinct_users(interaction)
        key = b"".join(interaction[field].cpu().numpy().tobytes() for field in (self.model.ITEM_SEQ, self.model.ITEM_SEQ_LEN))
        if key not in self._remembered:
            self._remembered[key] = self.model.represent_distinct_users(interaction)
        return self._remembered[key]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within the context users that are scored again are not encoded again: neither weights nor users' dates may change."""
        self._remembered = {}
        try:
            yield
        finally:
            self._remembered = None
