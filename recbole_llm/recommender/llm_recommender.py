"""What every LLM-based retrieval recommender shares: prompts, vector injection, heads, candidates and scores.

    interaction -> histories -> prompts -> encoder (vectors in, hidden states out) -> heads -> scores
"""

from __future__ import annotations

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.backbone.text import encode_text
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.loss.retrieval import retrieval_loss
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.generation import TitlePrompts, TitlePromptSettings
from recbole_llm.prompt.retrieval import Histories, PromptBuilder, PromptSettings
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.recommender.generation import TitleGenerator, VectorsOf
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.item_table import ItemTable
from recbole_llm.teacher.teacher import obtain_teacher


class LLMRecommender(BackboneRecommender):
    """Base of all models, in the two forms that the papers compare.

    ``recommend_by: retrieval``: a user and an item are hidden states at out tokens, projected into one space;
    ``s(u, i) = <f_user(h_U), f_item(h_I)>`` (LLM-SRec section 2.1.2). ``recommend_by: generation``: the LLM writes the title
    of a candidate (:class:`~recbole_llm.recommender.generation.TitleGenerator`). A model file adds its losses, and where
    it differs its prompts.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset`` (its ``splits`` serve the teacher).

    Attributes:
        has_item_vectors: whether prompts hold the teacher's item vectors; without them there is no teacher.
        has_user_vector: whether user prompts begin with the teacher's user representation.
        has_marker: whether a learned vector stands before each item vector (RSLLM's [DSR]).
    """

    loss_names: tuple[str, ...] = ("retrieval",)
    has_item_vectors = True
    has_user_vector = False
    has_marker = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.user_items = dataset.user_items
        self.train_negatives = config["train_negatives"]
        self.recommend_by = config["recommend_by"] or "retrieval"
        if self.has_item_vectors:
            self.item_projection = self._item_projection(config)  # f_I
        if self.has_user_vector:
            self.user_projection = self._user_projection(config)
        if self.has_marker:
            self.marker = self._token_vectors(1)
        if self.recommend_by == "retrieval":
            self._prepare_retrieval(config, dataset)
        else:
            self._prepare_generation(config, dataset)

    def _prepare_before_backbone(self, config: Config, dataset: TextSequentialDataset) -> None:
        if self._needs_teacher(config):
            self.teacher, self.teacher_run = obtain_teacher(config, dataset.splits)

    def _needs_teacher(self, config: Config) -> bool:
        return self.has_item_vectors

    def _item_projection(self, config: Config) -> nn.Module:
        """f_I: the teacher's item vectors into the LLM's input space."""
        width = self.backbone.input_size
        return projection(self.teacher.size, config["item_projection_hidden_size"] or width, width)

    def _user_projection(self, config: Config) -> nn.Module:
        """The teacher's user representation into the LLM's input space."""
        return self._item_projection(config)

    def _prepare_retrieval(self, config: Config, dataset: TextSequentialDataset) -> None:
        """Prompts, heads and out tokens of ``recommend_by: retrieval``."""
        backbone = self.backbone
        self.prompts = self._prompt_builder(config, dataset, self.has_item_vectors, self.has_user_vector)
        size, hidden = config["representation_size"], config["head_hidden_size"]
        self.item_head = projection(backbone.hidden_size, hidden, size)  # f_item
        self.user_head = projection(backbone.hidden_size, hidden, size)  # f_user
        self.user_out = self._token_vectors(config["out_tokens"])  # [UserOut]
        self.item_out = self._token_vectors(config["out_tokens"])  # [ItemOut]
        self._table: ItemTable | None = None

    def _prompt_builder(
        self, config: Config, dataset: TextSequentialDataset, item_vectors: bool, user_vector: bool
    ) -> PromptBuilder:
        backbone = self.backbone
        return PromptBuilder(
            lambda texts: encode_text(backbone.tokenizer, texts),
            dataset.item_texts,
            PromptSettings(
                sentence=config["prompt_sentence"],
                request=config["prompt_request"].replace("{goal}", config["prompt_goal"]),
                history_length=config["history_length"],
                max_prompt_tokens=min(config["max_prompt_tokens"] or backbone.context_length, backbone.context_length),
                max_item_tokens=config["max_item_tokens"],
                item_vectors=item_vectors,
                user_vector=user_vector,
                out_tokens=config["out_tokens"],
                marker=self.has_marker,
            ),
            format_dates=dataset.item_dates if dataset.has_dates else None,
            prefix_ids=backbone.prefix_ids,
        )

    def _prepare_generation(self, config: Config, dataset: TextSequentialDataset) -> None:
        """Prompts and decoding of ``recommend_by: generation``."""
        backbone = self.backbone
        backbone.require_output_head(config["backbone"], "write titles")
        self.loss_names = ("title",)
        self.train_candidates = config["train_candidates"]
        templates = config["title_prompts"] or []
        if not templates or len(config["title_words"]) != 3:
            raise UserError("title_prompts needs a template, and title_words three words: item, to buy, bought.")
        words = dict(zip(("{item}", "{verb}", "{past}"), config["title_words"], strict=True))
        for place, word in words.items():
            templates = [template.replace(place, word) for template in templates]
        end = backbone.tokenizer.eos_token_id
        if end is None:
            raise UserError("backbone: its tokenizer has no end-of-text token, which ends a title; choose another LLM.")

        def prompts(item_vectors: bool, user_vector: bool) -> TitlePrompts:
            return TitlePrompts(
                lambda texts: encode_text(backbone.tokenizer, texts),
                dataset.item_texts,
                TitlePromptSettings(
                    templates=templates,
                    history_length=config["history_length"],
                    max_prompt_tokens=config["max_prompt_tokens"] or backbone.context_length,
                    max_item_tokens=config["max_item_tokens"],
                    item_vectors=item_vectors,
                    user_vector=user_vector,
                    context_length=backbone.context_length,
                    marker=self.has_marker,
                ),
                prefix_ids=backbone.prefix_ids,
                end_id=end,
            )

        self._title_prompts = prompts
        self.titles = TitleGenerator(
            backbone,
            prompts(self.has_item_vectors, self.has_user_vector),
            config["decode"],
            self.seed,
            self.encoder.settings,
            self.encoder.counts,
        )

    def show_vectors(self, shown: bool) -> None:
        """Build prompts with the teacher's vectors, or of text alone (the first step of CoLLM and of staged training)."""
        items, user = shown and type(self).has_item_vectors, shown and type(self).has_user_vector
        if (items, user) == (self.has_item_vectors, self.has_user_vector):
            return
        self.has_item_vectors, self.has_user_vector = items, user
        if self.recommend_by == "retrieval":
            self.prompts = self._prompt_builder(self._config, self._dataset, items, user)
            self.forget_items()
        else:
            self.titles.prompts = self._title_prompts(items, user)

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights."""
        if self._table is None:
            self._table = ItemTable(self.represent_items, self.trained_parameters().values(), self.n_items)
        return self._table

    def forget_items(self) -> None:
        """Have the items' representations computed anew: their prompts changed."""
        self._table = None

    def enter_stage(self, number: int, vectors: bool) -> None:
        """Get ready for stage ``number`` of a training in stages, on prompts with or without the teacher's vectors."""
        if self._trained_names is None:
            self._trained_names = list(self.trained_parameters())
        self.stage = number
        self.show_vectors(vectors)

    # Representations

    def histories(self, interaction: Interaction) -> Histories:
        """The part of each row's history that its prompt shows."""
        times = interaction[self.time_list_field] if self.time_list_field in interaction else None
        return self.prompts.select_histories(
            interaction[self.ITEM_SEQ].cpu().numpy(),
            interaction[self.ITEM_SEQ_LEN].cpu().numpy(),
            None if times is None else times.cpu().numpy(),
        )

    def item_inputs(self, items: Tensor) -> Tensor:
        """What goes into the slots of items int64 ``[n]``: f_I of the teacher's vectors, ``[n, input size]``."""
        if not self.has_item_vectors:
            return torch.zeros(0, self.backbone.input_size, device=self.backbone.device)
        return self.item_projection(self.teacher.item_vectors[items])

    def user_inputs(self, interaction: Interaction) -> Tensor | None:
        """What goes into the user's slot of each row, ``[B, input size]``; None where prompts have no such slot."""
        return self.user_projection(self.teacher.represent(interaction)) if self.has_user_vector else None

    def vectors(self, batch: PromptBatch, out: Tensor | None = None, users: Tensor | None = None) -> Tensor:
        """What goes into a batch: the items' inputs, then the out tokens, the marker and the users' inputs."""
        items = self.item_inputs(torch.from_numpy(batch.vector_items).to(self.backbone.device))
        marker = self.marker if self.has_marker and self.has_item_vectors else None
        return torch.cat([items, *(vectors for vectors in (out, marker, users) if vectors is not None)])

    def represent_items(self, items: np.ndarray) -> Tensor:
        """f_item(h_I) of internal item ids int64 ``[n]``: float32 ``[n, d']``."""
        batch = self.prompts.item_prompts(items)
        return self.item_head(self.encoder(batch, self.vectors(batch, self.item_out)).mean(dim=1))

    def represent_prompts(self, batch: PromptBatch, users: Tensor | None = None) -> Tensor:
        """f_user(h_U) of user prompts, ``users`` in their users' slots: float32 ``[N, d']``."""
        return self.user_head(self.encoder(batch, self.vectors(batch, self.user_out, users)).mean(dim=1))

    def represent_users(self, interaction: Interaction) -> Tensor:
        """f_user(h_U) of each row's history: float32 ``[B, d']``."""
        prompts = self.prompts.user_prompts(self.histories(interaction))
        return self.represent_prompts(prompts, self.user_inputs(interaction))

    @torch.no_grad()
    def represent_distinct_users(self, interaction: Interaction) -> Tensor:
        """As :meth:`represent_users` without gradient, each distinct history encoded once: float32 ``[B, d']``."""
        first, row_of = self.distinct_histories(interaction)
        users = self.represent_users(interaction[first])
        return users[row_of.to(users.device)]

    # Training

    def training_candidates(self, interaction: Interaction, negatives: int | None = None) -> np.ndarray:
        """C_u in training: the target and ``train_negatives`` distinct items that the user never interacted with.

        Args:
            interaction: B rows.
            negatives: how many; None: ``train_negatives``.

        Returns:
            int64 ``[B, 1 + negatives]``, the target in column 0.
        """
        targets = interaction[self.POS_ITEM_ID].cpu().numpy()
        negatives = self.train_negatives if negatives is None else negatives
        candidates = np.empty((len(targets), 1 + negatives), dtype=np.int64)
        candidates[:, 0] = targets
        for row, user in enumerate(interaction[self.USER_ID].cpu().numpy()):
            known = self.user_items[user]
            chosen: list[int] = []
            while len(chosen) < negatives:
                item = int(self.rng.integers(1, self.n_items))
                place = np.searchsorted(known, item)
                if item not in chosen and not (place < len(known) and known[place] == item):
                    chosen.append(item)
            candidates[row, 1:] = chosen
        return candidates

    def represent_candidates(self, candidates: np.ndarray) -> Tensor:
        """f_item(h_I) of candidates int64 ``[B, C]``: float32 ``[B, C, d']``. Each distinct item is encoded once."""
        items, position = np.unique(candidates, return_inverse=True)
        representations = self.represent_items(items)
        return representations[torch.from_numpy(position.reshape(candidates.shape)).to(representations.device)]

    def score_candidates(self, users: Tensor, candidates: np.ndarray) -> Tensor:
        """s(u, i) with gradient for each user's candidates int64 ``[B, C]``: ``[B, C]``."""
        return torch.einsum("bd,bcd->bc", users, self.represent_candidates(candidates))

    def retrieval_loss(self, interaction: Interaction) -> Tensor:
        """L_retrieval of a batch: the target against its negatives."""
        users = self.represent_users(interaction)
        return retrieval_loss(self.score_candidates(users, self.training_candidates(interaction)))

    def title_questions(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray, np.ndarray, VectorsOf]:
        """Histories, lengths and ``train_candidates`` candidates of each row, and what goes into the prompts' slots."""
        candidates = self.training_candidates(interaction, self.train_candidates - 1)
        users = self.user_inputs(interaction)
        return *self.history_items(interaction), candidates, lambda batch: self.vectors(batch, None, users)

    def title_loss(self, interaction: Interaction) -> Tensor:
        """Cross-entropy of the target's title, the candidates listed in the prompt."""
        return self.titles.loss(*self.title_questions(interaction), self.rng)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The weighted parts of the loss, scalars, named by ``loss_names``; their sum is minimised.

        Here: L_retrieval, or the cross-entropy of the target's title.
        """
        if self.recommend_by == "generation":
            return (self.title_loss(interaction),)
        return (self.retrieval_loss(interaction),)

    # Scoring

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates from the item table.

        Args:
            interaction: B rows; only their histories are read.
            candidates: int64 ``[B, C]``, or None for the whole catalogue.

        Returns:
            float32 ``[B, C]`` or ``[B, n_items]`` (column 0, the padding item, is -inf).
        """
        if self.recommend_by == "generation":
            if candidates is None:
                raise UserError("recommend_by: generation chooses among listed candidates: full ranking needs retrieval.")
            users = self.user_inputs(interaction)
            history, lengths = self.history_items(interaction)
            return self.titles.score(
                history, lengths, candidates.cpu().numpy(), lambda batch: self.vectors(batch, None, users)
            )
        users = self.represent_distinct_users(interaction)
        if candidates is not None:
            return torch.einsum("bd,bcd->bc", users, self.item_table.rows(candidates.cpu().numpy()))
        items = self.item_table.rows(np.arange(1, self.n_items))
        padding = users.new_full((len(users), 1), float("-inf"))
        return torch.cat([padding, users @ items.T], dim=1)

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``.

        RecBole repeats a history once per candidate: the distinct ones are found again and encoded once.
        """
        if self.recommend_by == "generation":
            raise UserError("recommend_by: generation needs each user's candidates together: compare by run_recbole_llm.py.")
        users = self.represent_distinct_users(interaction)
        items = self.item_table.rows(interaction[self.ITEM_ID].cpu().numpy())
        return (users * items).sum(dim=-1)
