"""Pre-training of a foundation: an LLM trained on several source datasets at once, for heads of other datasets.

Every source has its own linear head over one LLM and one query token (Zhai et al. 2025, section 4.3.1 and appendix B). A
foundation is kept like a teacher: the same sources, settings, LLM and seed find it again::

    saved/<model>-food+cell-seed2020-1f3c.../
        recbole_llm.json       what it is
        model.safetensors      weights of the LLM that were trained, LoRA multiplied out, and the query token's vector
        heads/<dataset>/       head of each source, for the key head
        training/              an unfinished training (removed when it ends)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model
from torch import Tensor, nn

from recbole_llm import checkpoint
from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.load import fetch_backbone
from recbole_llm.backbone.lora import load_weights, trained_weights
from recbole_llm.config.identity import deciding_settings, settings_for_pretraining
from recbole_llm.config.schema import is_file_name
from recbole_llm.config.settings import make_config, select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.evaluation.evaluate import evaluate_ranking, sample_rows
from recbole_llm.lock import held
from recbole_llm.results.describe import settings_of
from recbole_llm.results.log import note_settings, run_log, tracked
from recbole_llm.trainer.linear_head import HeadRecommender, LinearHeadTrainer

WHAT_AN_LLM_IS = ("source", "name", "sha256", "revision", "architecture", "layers")


@dataclass(frozen=True)
class PretrainingSettings:
    """What pre-training reads of a run, and of the configuration of each source; each field is the key of the same name."""

    model: str
    dataset: str
    seed: int
    device: torch.device
    checkpoint_dir: str
    resume: bool
    show_progress: bool
    pretrained: str | None
    pretrain_datasets: list[str] | None
    backbone_layers: int | None
    backbone_dtype: str
    backbone_quantization: str | None
    valid_users: int | None
    valid_items: int | None
    eval_batch_rows: int


class SourceRecommender(HeadRecommender, Protocol):
    """What pre-training needs of a source's model. Its class also takes ``shared``, a model whose LLM and query it shares.

    Attributes:
        query: vector of the query token, ``[1, input size]``.
        seed: the run's seed.
    """

    query: nn.Parameter
    seed: int

    def query_losses(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The loss at each query token of B rows, ``[P]`` each, of the next items and, under ``id_alignment``, of items."""

    def alignment_losses(self) -> Tensor:
        """The losses of the step's items alone, ``[n]``."""

    def rank_targets(self, interaction: Interaction, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How many items score above each row's target int64 ``[B]``, and how many others the same."""


@dataclass(frozen=True)
class Source:
    """One dataset of a pre-training, its configuration and its model."""

    config: Config
    dataset: TextSequentialDataset
    model: SourceRecommender

    @property
    def name(self) -> str:
        return self.config["dataset"]


@dataclass(frozen=True)
class Foundation:
    """A pre-trained LLM in a folder.

    Attributes:
        folder: where it is kept.
        record: what it says of itself.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Identity of its weights."""
        return self.record["sha256"]

    def load_into(self, backbone: Backbone, query: nn.Parameter) -> None:
        """Put the weights into an LLM of the same kind, and the query token's vector into ``query``.

        Raises:
            UserError: it was made of another LLM, or cannot be read.
        """
        for key in WHAT_AN_LLM_IS:
            if self.record["backbone"].get(key) != checkpoint.as_json(backbone.identity.get(key)):
                raise UserError(
                    f"pretrained: {self.folder} was made of an LLM with {key} {self.record['backbone'].get(key)!r}, not "
                    f"{backbone.identity.get(key)!r}: set backbone and backbone_layers to those of the pre-training."
                )
        weights = checkpoint.read_weights(self.folder, backbone.device)
        with torch.no_grad():
            query.copy_(weights.pop("query"))
        load_weights(backbone, weights)
        backbone.identity["foundation"] = self.sha256


def obtain_foundation(config: Config) -> Foundation | None:
    """Load the foundation of ``config``, pre-training it first where none of these sources and settings exists.

    Args:
        config: configuration of the model that wants it: keys ``pretrained``, ``pretrain_datasets``, ``pretrain_settings``.

    Raises:
        UserError: a folder that holds no foundation, or settings that make no sense.
    """
    settings, configs = select(PretrainingSettings, config), source_configs(config)
    if settings.pretrained:
        return _load(Path(settings.pretrained))
    if not configs:
        return None
    datasets = [TextSequentialDataset(source).build()[0] for source in configs]
    # The texts and the LLM have identities of their own, by content.
    of_sources = [deciding_settings(source, without=("text", "teacher")) for source in configs]
    of_sources = [{key: value for key, value in one.items() if not key.startswith("backbone")} for one in of_sources]
    llm = [fetch_backbone(config), settings.backbone_layers, settings.backbone_dtype]
    identity = [of_sources, [_identity(dataset) for dataset in datasets], llm]
    digest = hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()[:10]
    names = "+".join(settings.pretrain_datasets)
    folder = Path(settings.checkpoint_dir) / f"{settings.model}-{names}-seed{settings.seed}-{digest}"
    with held(folder):
        _make_foundation(folder, names, configs, datasets, bool(settings.resume))
    return _load(folder)


def _make_foundation(
    folder: Path, names: str, configs: Sequence[Config], datasets: Sequence[TextSequentialDataset], resume: bool
) -> None:
    """Pre-train the LLM where ``folder`` has none yet; the folder must be held."""
    if checkpoint.exists(folder):
        getLogger().info(f"Foundation: using the LLM in {folder}, pre-trained on {names}")
    else:
        getLogger().info(f"Foundation: pre-training the LLM on {names} now; it will be kept in {folder}")
        resolved = settings_of(configs[0])[0]
        with run_log(configs[0]["model"], folder.name), tracked(folder.name, resolved):
            note_settings(folder.name, resolved)
            _pretrain(folder, configs, datasets, resume)


def source_configs(config: Config) -> list[Config]:
    """The configuration of the pre-training on each of ``config["pretrain_datasets"]``: its own dataset, this run's LLM.

    Raises:
        UserError: an unknown dataset or setting, or a pre-training that would not train the LLM.
    """
    settings = select(PretrainingSettings, config)
    names = settings.pretrain_datasets or []
    wrong = [name for name in names if not is_file_name(name)]
    if wrong:
        raise UserError(f"pretrain_datasets: {wrong[0]!r} is no name of a dataset; give a list of names.")
    if names and settings.pretrained:
        raise UserError("pretrained names an LLM that was pre-trained before: leave pretrain_datasets unset.")
    if (names or settings.pretrained) and settings.backbone_quantization:
        raise UserError("backbone_quantization: a pre-trained LLM's weights are not quantized; leave it unset.")
    if len(set(names)) < len(names):
        raise UserError(f"pretrain_datasets: {names} names a dataset twice.")
    given = {**settings_for_pretraining(config), **(config["pretrain_settings"] or {})}
    configs = [make_config(config["model"], name, config_dict=given) for name in names]
    if configs and configs[0]["tuning"] not in ("full", "lora"):
        raise UserError(f"pretrain_settings: tuning {configs[0]['tuning']} trains no LLM; take full or lora.")
    return configs


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """Sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _identity(dataset: TextSequentialDataset) -> list[str]:
    texts = json.dumps(dataset.item_attributes)
    return [dataset.fingerprint, hashlib.sha256(texts.encode()).hexdigest()]


def _load(folder: Path) -> Foundation:
    record = checkpoint.read_record(folder)
    if record.get("kind") != "foundation":
        raise UserError(f"pretrained: {folder} holds no pre-trained LLM; give a folder that a run with pretrain_datasets made.")
    return Foundation(folder, record)


def _pretrain(folder: Path, configs: Sequence[Config], datasets: Sequence[TextSequentialDataset], resume: bool) -> None:
    """Train the LLM on all sources and write the foundation."""
    settings = select(PretrainingSettings, configs[0])
    model_class = get_model(settings.model)
    sources: list[Source] = []
    for config, dataset in zip(configs, datasets, strict=True):
        shared = sources[0].model if sources else None
        sources.append(Source(config, dataset, model_class(config, dataset, shared=shared)))
    model = SourceModels(sources).to(settings.device)
    trainer = PretrainingTrainer(configs[0], model)
    trainer.saved_model_file = str(folder / "training")
    if resume and trainer.can_resume(trainer.saved_model_file):
        trainer.resume_checkpoint(trainer.saved_model_file)
    rows = SourceRows(datasets)
    _, result = trainer.fit(rows, rows, show_progress=settings.show_progress)
    trainer.load_weights(trainer.saved_model_file)

    weights, query = trained_weights(model.backbone), sources[0].model.query
    sha256 = digest_of({**weights, "query": query})
    record = {
        "kind": "foundation",
        "model": settings.model,
        "datasets": [source.name for source in sources],
        "fingerprint": model.fingerprint,
        "seed": settings.seed,
        "backbone": model.backbone.identity,
        "sha256": sha256,
        "train_seconds": trainer.train_seconds,
        "valid_result": result,
    }
    model.save_head(folder / "heads", foundation=sha256)
    checkpoint.write(folder, record, {**weights, "query": query})
    shutil.rmtree(folder / "training", ignore_errors=True)


class SourceRows:
    """Training rows of several datasets as one list, for the trainer: which dataset, and which row of it."""

    def __init__(self, datasets: Sequence[TextSequentialDataset]) -> None:
        sizes = [len(dataset.inter_feat) for dataset in datasets]
        self.inter_feat = Interaction(
            {
                "source": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
                "row": torch.cat([torch.arange(size) for size in sizes]),
            }
        )
        self._dataset = self

    def transform(self, dataset: SourceRows, rows: Interaction) -> Interaction:
        return rows


class SourceModels(nn.Module):
    """Models of several datasets over one LLM, as one :class:`~recbole_llm.recommender.base.Recommender`.

    A row of an Interaction names its ``source`` and its ``row`` among the training rows there (:class:`SourceRows`). A batch
    holds rows of all sources in proportion to their sizes; its loss is the mean over all its query tokens.

    Args:
        sources: their models share the encoder and the query token.
    """

    teacher = teacher_run = foundation = None
    id_alignment = False  # its accuracy is no figure of a pre-training

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self.sources = sources
        self.models = nn.ModuleList(source.model for source in sources)
        self.loss_names = tuple(source.name for source in sources)
        self.fingerprint = "+".join(model.fingerprint for model in self.models)
        self.progress, self.epoch_steps = 0.0, 1
        self.rng = np.random.default_rng(self.models[0].seed)

    @property
    def backbone(self) -> Backbone:
        """The LLM that the models share."""
        return self.models[0].backbone

    @property
    def backbones(self) -> Mapping[str, Backbone]:
        """Every LLM by name."""
        return self.models[0].backbones

    @property
    def tokens_read(self) -> int:
        """Tokens given to the LLM so far."""
        return self.models[0].tokens_read

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def seed_step(self, step: int) -> None:
        """Make the randomness of a training step depend on the seed and the step alone."""
        for model in self.models:
            model.epoch_steps = self.epoch_steps
            model.seed_step(step)
        self.rng = np.random.default_rng([self.models[0].seed, step])

    def _by_source(self, interaction: Interaction) -> Iterator[tuple[SourceRecommender, Tensor, Interaction]]:
        """Each source's model, which rows are its own, bool ``[B]``, and these rows as it reads them."""
        for number, source in enumerate(self.sources):
            own = (interaction["source"] == number).cpu()
            rows = source.dataset.inter_feat[interaction["row"].cpu()[own]]
            yield source.model, own, rows.to(source.model.query.device)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The part of each source in the mean loss over all query tokens of a batch."""
        parts = []
        for model, _, rows in self._by_source(interaction):
            losses = list(model.query_losses(rows)) if len(rows) else []
            if not losses and model.id_alignment:
                losses = [model.alignment_losses()]
            parts.append(torch.cat(losses) if losses else model.query.new_zeros(0))
        total = sum(map(len, parts))
        return tuple(part.sum() / total for part in parts)

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``, items of its own source: ``[B, C]``.

        Raises:
            UserError: no candidates: the sources have no catalog in common.
        """
        if candidates is None:
            raise UserError("pretrain_datasets: the sources have no catalog in common; rank each by its own model.")
        scores = torch.empty(candidates.shape)
        for model, own, rows in self._by_source(interaction):
            if own.any():
                scores[own] = model.score(rows, candidates[own]).cpu()
        return scores

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row, ``[B]``."""
        scores = torch.empty(len(interaction))
        for model, own, rows in self._by_source(interaction):
            if own.any():
                scores[own] = model.predict(rows).cpu()
        return scores

    def reset_metrics(self) -> None:
        """Nothing is counted."""

    def answer_metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def id_accuracy(self) -> dict[str, float]:
        """Share of the items whose text means their own ID, by source and name."""
        return {
            f"{source.name}/{name}": value for source in self.sources for name, value in source.model.id_accuracy().items()
        }

    def save_head(self, folder: Path, foundation: str | None = None) -> None:
        """Write each source's head to a folder of its name in ``folder``."""
        for source in self.sources:
            source.model.save_head(folder / source.name, foundation)


class PretrainingTrainer(LinearHeadTrainer):
    """Trains one LLM on several datasets; a validation's metrics are their means over the datasets."""

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Validate on every dataset; ``eval_data`` is not read."""
        self.model.eval()
        results = []
        for source in self.model.sources:
            settings, split = select(PretrainingSettings, source.config), source.dataset.splits["valid"]
            rows = sample_rows(split, settings.valid_users, settings.seed)
            results.append(
                evaluate_ranking(
                    source.model.score,
                    split,
                    source.config,
                    "valid",
                    rows=rows,
                    pool=settings.valid_items,
                    progress=show_progress,
                    eval_batch_rows=settings.eval_batch_rows,
                    rank_targets=source.model.rank_targets,
                ).metrics
            )
        return {name: float(np.mean([metrics[name] for metrics in results])) for name in results[0]}
