"""What the trainer, the evaluation and the checkpoints need of any recommender that runs an LLM, whatever it makes of it."""

from __future__ import annotations

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType, init_seed
from torch import Tensor, nn

from recbole_llm.backbone.encoder import EncoderSettings, PromptEncoder
from recbole_llm.backbone.load import fetch_backbone, load_backbone
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError


class BackboneRecommender(SequentialRecommender):
    """An LLM behind RecBole's interface.

    A model gives ``calculate_loss`` (scalars, named by ``loss_names``, whose sum is minimised) and ``score``.

    Args:
        config: RecBole configuration.
        dataset: the training split of a ``TextSequentialDataset`` (its ``splits`` serve the teacher).
        encoder: an encoder to share with another model; None: load the LLM of ``config``.

    Attributes:
        loss_names: names of the parts that ``calculate_loss`` returns, in order.
        encoder: runs prompts through the LLM.
        teacher, teacher_run: the frozen stock model that is learned from and its run; None without one.
        recommend_by: ``retrieval`` (scores) or ``generation`` (titles that the LLM writes).
        fingerprint: identity of the data.
        progress: how much of the training (of its present stage) is done, 0 to 1; set by the trainer.
        stage: number of the present stage, 0 where there is one only.
        rng: the randomness of a training step.
    """

    input_type = InputType.POINTWISE
    loss_names: tuple[str, ...] = ()
    recommend_by = "retrieval"

    def __init__(self, config: Config, dataset: TextSequentialDataset, encoder: PromptEncoder | None = None) -> None:
        super().__init__(config, dataset)
        if not config["single_spec"]:
            raise UserError("nproc: the LLM recommenders train in one process; leave nproc and world_size unset.")
        self.teacher = self.teacher_run = None
        if encoder is None:
            fetch_backbone(config)  # before anything is trained
            self._prepare_before_backbone(config, dataset)
        # What was trained just now, or was not because it was found, must not decide how our own weights begin.
        init_seed(config["seed"], config["reproducibility"])
        self.encoder = encoder or PromptEncoder(
            load_backbone(config),
            EncoderSettings(
                micro_batch_tokens=config["micro_batch_tokens"],
                call_cost=config["call_cost"] or (32 if torch.device(config["device"]).type == "cpu" else 1024),
                share_header=config["share_header"],
                share_prefix=config["share_prefix"],
                skip_unread=config["skip_unread"],
                recompute=config["recompute_activations"],
            ),
        )
        self.progress, self.stage = 0.0, 0
        self._trained_names: list[str] | None = None
        self._config, self._dataset = config, dataset
        self.time_list_field = dataset.time_field + config["LIST_SUFFIX"]
        self.fingerprint = dataset.fingerprint
        self.seed = config["seed"]
        self.rng = np.random.default_rng(self.seed)

    def _prepare_before_backbone(self, config: Config, dataset: TextSequentialDataset) -> None:
        """Train or load whatever the LLM learns from, before the LLM takes its memory."""

    @property
    def backbone(self):
        """The LLM."""
        return self.encoder.backbone

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
        """Score each row's candidates int64 ``[B, C]``, or, with None, the whole catalogue ``[B, n_items]``."""
        raise NotImplementedError

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Score the whole catalogue for each row, ``[B, n_items]``."""
        return self.score(interaction, None)

    def other_parameter(self) -> dict:
        return {}

    def __str__(self) -> str:
        trained = self.trained_parameters()
        teacher = self.teacher.name if self.teacher else "none"
        lines = [f"{type(self).__name__}: backbone {self.backbone.identity}, teacher {teacher}"]
        lines += [f"  {name}: {tuple(parameter.shape)}" for name, parameter in trained.items()]
        lines.append(f"Trainable parameters: {sum(parameter.numel() for parameter in trained.values()):,}")
        return "\n".join(lines)
