"""What trainer, evaluation and checkpoints need of a recommender, and the base of all that run an LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType, init_seed
from torch import Tensor, nn

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.load import fetch_backbone, load_backbone
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.processes import group as processes
from recbole_llm.teacher.stock import StockRun
from recbole_llm.teacher.teacher import Teacher


@runtime_checkable
class Recommender(Protocol):
    """What the trainer, the evaluation and the checkpoints need of a model, whatever it makes of its LLMs.

    B is the number of rows of an Interaction, C the number of candidates of a row. A model is a ``torch.nn.Module``.

    Attributes:
        loss_names: names of the parts of :meth:`calculate_loss`, in order.
        fingerprint: identity of the data (items and their texts, split and filters); a checkpoint belongs to it.
        progress: share of the training (of its present stage) that is done, 0 to 1; set by the trainer.
        rng: the randomness of a training step, renewed by :meth:`seed_step`.
        teacher_run: the run of the stock model that is learned from, with its folder; None without one.
    """

    loss_names: tuple[str, ...]
    fingerprint: str
    progress: float
    rng: np.random.Generator
    teacher_run: StockRun | None

    @property
    def teacher(self) -> Teacher | None:
        """The frozen stock model that is learned from; None without one."""

    @property
    def backbone(self) -> Backbone:
        """The usual LLM: the one that reads prompts."""

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """Every LLM, causal or bidirectional, by the key under which a checkpoint names it; the usual one is ``backbone``."""

    @property
    def tokens_read(self) -> int:
        """Tokens given to the LLMs so far, padding not counted."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by name: what a checkpoint holds. A stage may train a part of it."""

    def seed_step(self, step: int) -> None:
        """Make the randomness of a training step depend on the seed and the step (from 0) alone."""

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The weighted parts of the loss of B rows: scalars, named by ``loss_names`` (trailing ones may be left out), whose
        sum is minimized."""

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``: ``[B, C]``; or, with None, the whole catalog: ``[B, n_items]``.

        Raises:
            UserError: a form that cannot rank what is asked for.
        """

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row: ``[B]``.

        Raises:
            UserError: a form that needs a row's candidates together.
        """

    def reset_metrics(self) -> None:
        """Begin to count anew what :meth:`answer_metrics` reports."""

    def answer_metrics(self) -> dict[str, float]:
        """Figures of the answers since :meth:`reset_metrics` (ValidRatio, say) by name; often none."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode, as ``torch.nn.Module`` does; frozen parts stay as they are."""

    def eval(self) -> Any:
        """Set evaluation mode."""


@dataclass(frozen=True)
class ModelSettings:
    """What every model reads; each field is the key of the same name."""

    seed: int
    reproducibility: bool
    single_spec: bool
    device: torch.device
    micro_batch_tokens: int
    call_cost: int | None
    share_header: bool
    share_prefix: bool
    skip_unread: bool
    recompute_activations: bool
    list_suffix: str = field(metadata={"key": "LIST_SUFFIX"})

    def encoder(self) -> EncoderSettings:
        """How prompts are batched."""
        return EncoderSettings(
            micro_batch_tokens=self.micro_batch_tokens,
            call_cost=self.call_cost or (32 if torch.device(self.device).type == "cpu" else 1024),
            share_header=self.share_header,
            share_prefix=self.share_prefix,
            skip_unread=self.skip_unread,
            recompute=self.recompute_activations,
        )


class BackboneRecommender(SequentialRecommender):
    """An LLM behind RecBole's interface: a :class:`Recommender` that lacks ``calculate_loss``, ``score`` and ``predict``.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset`` (its ``splits`` serve the teacher).
        encoder: an encoder to share with another model; None: load the LLM of ``config``.

    Attributes:
        encoder: runs prompts through the LLM.
        stage: number of the present stage of training, from 0.
        has_llm: whether it reads the LLM of the key ``backbone``, and not a text encoder of its own.
        stored_files: files in ``checkpoint_dir`` that it reads beside its own folder, such as stored hidden states.
    """

    input_type = InputType.POINTWISE
    has_llm = True
    stored_files: Sequence[Path] = ()
    loss_names: tuple[str, ...] = ()

    def __init__(self, config: Config, dataset: TextSequentialDataset, encoder: PromptEncoder | None = None) -> None:
        super().__init__(config, dataset)
        settings = select(ModelSettings, config)
        if not settings.single_spec:
            raise UserError(
                "nproc: RecBole's own start of several processes does not serve LLM recommenders: give --nproc to "
                "run_recbole_llm.py, or start it by torchrun."
            )
        processes.check_started()
        self.teacher_run: StockRun | None = None
        if encoder is None:
            with processes.main_first():
                self._fetch_backbone(config)  # before anything is trained
                self._prepare_before_backbone(config, dataset)
        # Whether something was trained just now, or found, must not decide how our own weights begin.
        init_seed(settings.seed, settings.reproducibility)
        self.encoder = encoder or self._load_encoder(config, dataset, settings.encoder())
        self.progress, self.stage = 0.0, 0
        self._trained_names: list[str] | None = None
        self._dataset = dataset
        self.time_list_field = dataset.time_field + settings.list_suffix
        self.fingerprint = dataset.text_fingerprint
        self.seed = settings.seed
        self.rng = np.random.default_rng(self.seed)

    def _fetch_backbone(self, config: Config) -> None:
        """Have the LLM's files at hand."""
        fetch_backbone(config)

    def _load_encoder(self, config: Config, dataset: TextSequentialDataset, settings: EncoderSettings) -> Any:
        """Read the LLM. What is returned has it as ``backbone``, and ``counts`` of the tokens that were given to it."""
        return PromptEncoder(load_backbone(config), settings)

    def _prepare_before_backbone(self, config: Config, dataset: TextSequentialDataset) -> None:
        """Train or load whatever the LLM learns from, before the LLM takes its memory."""

    @property
    def teacher(self) -> Teacher | None:
        """The frozen stock model that is learned from; None without one."""
        return self._modules.get("teacher")  # a property, since isinstance() of a Protocol finds no submodules

    @property
    def backbone(self) -> Backbone:
        """The LLM."""
        return self.encoder.backbone

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """Every LLM by name."""
        return {"backbone": self.backbone}

    @property
    def tokens_read(self) -> int:
        """Tokens given to the LLM so far."""
        return self.encoder.counts.tokens

    def _token_vectors(self, count: int) -> nn.Parameter:
        """Vectors of new tokens ``[count, input size]``, drawn with the mean and spread of the LLM's input embeddings."""
        embedding = self.backbone.embedding
        with torch.no_grad():  # called, not read: Gemma's scales its weight
            drawn = embedding(torch.arange(len(embedding.weight), device=embedding.weight.device)).float()
        return nn.Parameter(torch.normal(drawn.mean().item(), drawn.std().item(), (count, drawn.shape[1])))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by name: what a checkpoint holds. A stage may train a part of it."""
        named = dict(self.named_parameters())
        if self._trained_names is None:
            return {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        return {name: named[name] for name in self._trained_names}

    def seed_step(self, step: int) -> None:
        """Make the randomness of a training step depend on the seed and the step alone, so that a resumed run repeats it."""
        self.rng = np.random.default_rng([self.seed, step, self.stage] if self.stage else [self.seed, step])

    def history_items(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray]:
        """Item ids int64 ``[B, L]``, right padded, and how many int64 ``[B]``."""
        return interaction[self.ITEM_SEQ].cpu().numpy(), interaction[self.ITEM_SEQ_LEN].cpu().numpy()

    def distinct_histories(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """RecBole repeats a history once per candidate: a row of each distinct one, and which of them each row is, ``[B]``."""
        fields = [interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN][:, None]]
        if self.time_list_field in interaction:
            fields.append(interaction[self.time_list_field])
        keys = np.concatenate([field.cpu().numpy().astype(np.float64) for field in fields], axis=1)
        _, first, row_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        return torch.from_numpy(first), torch.from_numpy(row_of.reshape(-1))

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``, or, with None, the whole catalog ``[B, n_items]``."""
        raise NotImplementedError

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalog for each row, ``[B, n_items]``."""
        return self.score(interaction, None)

    def reset_metrics(self) -> None:
        """Begin to count anew what :meth:`answer_metrics` reports: nothing, where a model only scores."""

    def answer_metrics(self) -> dict[str, float]:
        """Figures of the answers since :meth:`reset_metrics`, by name."""
        return {}

    def other_parameter(self) -> dict:
        return {}

    def __str__(self) -> str:
        trained = self.trained_parameters()
        teacher = self.teacher.name if self.teacher else "none"
        lines = [f"{type(self).__name__}: backbone {self.backbone.identity}, teacher {teacher}"]
        lines += [f"  {name}: {tuple(parameter.shape)}" for name, parameter in trained.items()]
        lines.append(f"Trainable parameters: {sum(parameter.numel() for parameter in trained.values()):,}")
        return "\n".join(lines)
