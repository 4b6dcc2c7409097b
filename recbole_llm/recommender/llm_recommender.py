"""What the LLM-based recommenders share: the form in which they are asked, vectors in their prompts, representations.

    interaction -> histories -> prompts -> encoder (vectors in, hidden states out) -> heads -> scores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_llm.config.checks import SCORED_BY_VECTORS
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.item_catalog import ItemCatalog
from recbole_llm.data.sequences import training_items
from recbole_llm.data.windows import SHOWN, TrainingWindows, window_ends
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.retrieval import Histories
from recbole_llm.recommender.base import BackboneRecommender
from recbole_llm.recommender.candidates import OwnCandidates, SharedCandidates, SharedDraw, SoftTargets, inner_products
from recbole_llm.recommender.form import Form
from recbole_llm.recommender.generation import GenerationForm
from recbole_llm.recommender.heads import projection
from recbole_llm.recommender.item_table import ItemTable
from recbole_llm.recommender.residual import Residual
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.teacher import stock
from recbole_llm.teacher.folds import obtain_fold_teachers
from recbole_llm.teacher.teacher import Teacher, obtain_teacher


@dataclass(frozen=True)
class LLMRecommenderSettings:
    """What the base of the models reads; each field is the key of the same name."""

    model: str
    recommend_by: str | None
    train_negatives: int
    negatives: str | None
    negatives_leave_out: str
    train_targets: str
    history_length: int
    item_projection_hidden_size: int | None
    residual_to_teacher: bool | None
    teacher_folds: int | None
    soft_targets: float | None
    seed: int


class LLMRecommender(BackboneRecommender):
    """Base of the models that may be asked in several forms.

    The key ``recommend_by`` chooses the form from ``forms``. A model file adds its losses, and where it differs its
    prompts and its forms.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset`` (its ``splits`` serve the teacher).

    Attributes:
        forms: the forms in which the model may be asked, by the value of ``recommend_by``; the first is the default.
        form: the one in which it is asked.
        parts: what a stage of training may train, by the names of parameters (with ``*`` for any text).
        has_item_vectors: whether prompts hold the teacher's item vectors; without them there is no teacher.
        has_user_vector: whether user prompts begin with the teacher's user representation.
        has_marker: whether a learned vector stands before each item vector (RSLLM's [DSR]).
        residual: the teacher's part of the scores under ``residual_to_teacher``; else None.
    """

    forms: Mapping[str, type[Form]] = {"retrieval": RetrievalForm, "generation": GenerationForm}
    parts: Mapping[str, tuple[str, ...]] = {
        "lora": ("*lora_*",),
        "mapping": ("item_projection.*", "user_projection.*"),
        "heads": ("item_head.*", "user_head.*", "user_out", "item_out"),
    }
    has_item_vectors = True
    has_user_vector = False
    has_marker = False
    _fold_teachers: tuple[list[Teacher], np.ndarray] = [], np.zeros(0, dtype=np.int64)

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        settings = select(LLMRecommenderSettings, config)
        form = self._form_named(settings)
        super().__init__(config, dataset)
        self.train_negatives = settings.train_negatives
        has_scores = self.teacher is not None and self.teacher.name in SCORED_BY_VECTORS and not settings.residual_to_teacher
        self.soft_targets = (settings.soft_targets or 0.0) if has_scores else 0.0
        if not isinstance(dataset, ItemCatalog):  # from which nothing is trained
            # Items that are no training negatives of a user.
            self.user_items = dataset.user_items if settings.negatives_leave_out == "all" else training_items(dataset)
            self._shared_draw = self._draw_of(settings, dataset) if settings.negatives == "in_batch" else None
        self.item_projection_hidden_size = settings.item_projection_hidden_size or self.backbone.input_size
        if self.has_item_vectors:
            self.item_projection = self._item_projection()  # f_I
        if self.has_user_vector:
            self.user_projection = self._user_projection()
        if self.has_marker:
            self.marker = self._token_vectors(1)
        self.residual = self._residual_of(settings, dataset) if settings.residual_to_teacher else None
        self.form = form(self, config, dataset)
        self.form.prepare()
        self.loss_names = self.loss_names or self.form.loss_names

    def _draw_of(self, settings: LLMRecommenderSettings, dataset: TextSequentialDataset) -> SharedDraw:
        rows, weights = dataset.inter_feat, None
        if settings.train_targets == "window":
            rows = dataset.all_rows.inter_feat
            weights = TrainingWindows(dataset, min(settings.history_length, dataset.max_item_list_len)).coverage()
        counts = np.bincount(rows[self.POS_ITEM_ID].numpy(), weights=weights, minlength=dataset.item_num).astype(float)
        return SharedDraw(self.user_items, counts, 1 / len(dataset.inter_feat), settings.train_negatives)

    def _residual_of(self, settings: LLMRecommenderSettings, dataset: TextSequentialDataset) -> Residual:
        folds, fold_of = self._fold_teachers
        residual = Residual(self.teacher, self.USER_ID, folds, fold_of).to(self.backbone.device)
        if folds:
            rows = dataset.inter_feat
            residual.fit_scale(rows, rows[self.POS_ITEM_ID].numpy(), np.random.default_rng([settings.seed, len(folds)]))
        return residual

    def _form_named(self, settings: LLMRecommenderSettings) -> type[Form]:
        name = settings.recommend_by or next(iter(self.forms))
        if name not in self.forms:
            known = ", ".join(f"recommend_by: {known}" for known in self.forms)
            raise UserError(f"recommend_by: {settings.model} cannot recommend by {name}; set {known}.")
        return self.forms[name]

    def _prepare_before_backbone(self, config: Config, dataset: TextSequentialDataset) -> None:
        if self._needs_teacher():
            self.teacher, self.teacher_run = obtain_teacher(config, dataset.splits)
            settings = select(LLMRecommenderSettings, config)
            if settings.residual_to_teacher and stock.may_train():
                self._fold_teachers = obtain_fold_teachers(config, self.teacher_run.splits, settings.teacher_folds or 2)

    def _needs_teacher(self) -> bool:
        return self.has_item_vectors

    def _item_projection(self) -> nn.Module | None:
        """f_I: the teacher's item vectors into the LLM's input space."""
        return projection(self.teacher.size, self.item_projection_hidden_size, self.backbone.input_size)

    def _user_projection(self) -> nn.Module:
        """The teacher's user representation into the LLM's input space."""
        return projection(self.teacher.size, self.item_projection_hidden_size, self.backbone.input_size)

    def show_vectors(self, shown: bool) -> None:
        """Build prompts with the teacher's vectors, or of text alone (the first step of CoLLM and of staged training)."""
        items, user = shown and type(self).has_item_vectors, shown and type(self).has_user_vector
        if (items, user) != (self.has_item_vectors, self.has_user_vector):
            self.has_item_vectors, self.has_user_vector = items, user
            self.form.build_prompts()

    def enter_stage(self, number: int, vectors: bool) -> None:
        """Get ready for stage ``number`` of a training in stages, on prompts with or without the teacher's vectors."""
        if self._trained_names is None:
            self._trained_names = list(self.trained_parameters())
        self.stage = number
        self.show_vectors(vectors)

    @property
    def prompts(self) -> Any:
        """Builds the prompts of the form."""
        return self.form.prompts

    @property
    def item_table(self) -> ItemTable:
        """Item representations under the current weights, in the retrieval form."""
        return self.form.item_table

    # What stands in prompts

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

    # Representations, in the retrieval form

    def histories(self, interaction: Interaction) -> Histories:
        """The part of each row's history that its prompt shows."""
        times = interaction[self.time_list_field] if self.time_list_field in interaction else None
        shown = interaction[SHOWN].cpu().numpy() if SHOWN in interaction else None
        times = None if times is None else times.cpu().numpy()
        return self.prompts.select_histories(*self.history_items(interaction), times, shown)

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

    def represent_candidates(self, candidates: np.ndarray) -> Tensor:
        """f_item(h_I) of candidates int64 ``[B, C]``: float32 ``[B, C, d']``. Each distinct item is encoded once."""
        items, position = np.unique(candidates, return_inverse=True)
        representations = self.represent_items(items)
        return representations[torch.from_numpy(position.reshape(candidates.shape)).to(representations.device)]

    # Training

    def training_candidates(self, interaction: Interaction, negatives: int | None = None) -> np.ndarray:
        """C_u in training: the target and ``train_negatives`` distinct items that the user has not (``negatives_leave_out``).

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

    def draw_candidates(self, interaction: Interaction) -> OwnCandidates | SharedCandidates:
        """What the targets of a step are compared with, as the key ``negatives`` says."""
        ends = self.window_ends(interaction)
        drawn: OwnCandidates | SharedCandidates
        if self._shared_draw is None:
            drawn = OwnCandidates(self.training_candidates(interaction))
        else:
            users, targets = (interaction[field].cpu().numpy() for field in (self.USER_ID, self.POS_ITEM_ID))
            drawn = self._shared_draw(users, targets, len(np.unique(ends)), self.rng)
        if self.soft_targets > 0:
            drawn = replace(drawn, soft=SoftTargets(self._teacher_scores(interaction, ends, drawn.items), self.soft_targets))
        if self.residual is None:
            return drawn
        return replace(drawn, offsets=self.residual.of_training(interaction, ends, drawn.items))

    def _teacher_scores(self, interaction: Interaction, ends: np.ndarray, items: np.ndarray) -> Tensor:
        """What the teacher scores items int64 ``[C]`` or ``[B, C]`` for each row, ``[B, C]``."""
        vectors = self.teacher.item_vectors[torch.from_numpy(items).to(self.teacher.item_vectors.device)]
        return inner_products(self.teacher.represent_windows(interaction, ends), vectors)

    def window_ends(self, interaction: Interaction) -> np.ndarray:
        """For each row the last row of its window (``train_targets: window``), int64 ``[B]``; else each row is its own."""
        return window_ends(interaction, self.USER_ID)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The weighted parts of the loss, scalars, named by ``loss_names``; their sum is minimized. Here: the form's."""
        return self.form.loss(interaction)

    # Recommending

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates.

        Args:
            interaction: B rows; only their histories are read.
            candidates: int64 ``[B, C]``, or None for the whole catalog.

        Returns:
            ``[B, C]`` or ``[B, n_items]`` (column 0, the padding item, is -inf).

        Raises:
            UserError: the form cannot rank what is asked for.
        """
        return self.form.score(interaction, candidates)

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``.

        Raises:
            UserError: the form needs a row's candidates together.
        """
        return self.form.predict(interaction)

    def reset_metrics(self) -> None:
        """Begin to count anew what :meth:`answer_metrics` reports."""
        self.form.reset()

    def answer_metrics(self) -> dict[str, float]:
        """Figures of the form's answers since :meth:`reset_metrics`, by name."""
        return self.form.metrics()
