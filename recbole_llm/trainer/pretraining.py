"""The foundation of ST2SI: an LLM trained on several source datasets at once, for heads of other datasets to stand on.

Every source has its own head W over one LLM and one query token (Zhai et al. 2025, section 4.3.1 and appendix B). A
foundation is kept like a teacher: the same sources, settings, LLM and seed find it again::

    saved/ST2SI-food+cell-seed2020-1f3c.../
        recbole_llm.json       what it is
        model.safetensors      weights of the LLM that were trained, LoRA multiplied out, and [Q]
        heads/<dataset>/       head of each source, for the key head
        training/              an unfinished training (removed when it ends)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

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
from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.evaluation.evaluate import evaluate_ranking, sample_rows
from recbole_llm.trainer.linear_head import ST2SITrainer

WHAT_AN_LLM_IS = ("source", "name", "sha256", "revision", "architecture", "layers")


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
        """Put the weights into an LLM of the same kind, and [Q] into ``query``.

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
    configs = source_configs(config)
    if config["pretrained"]:
        return _load(Path(config["pretrained"]))
    if not configs:
        return None
    datasets = [TextSequentialDataset(source).build()[0] for source in configs]
    # The texts and the LLM have identities of their own, by content.
    settings = [deciding_settings(source, without=("text", "teacher")) for source in configs]
    settings = [{key: value for key, value in one.items() if not key.startswith("backbone")} for one in settings]
    llm = [fetch_backbone(config), config["backbone_layers"], config["backbone_dtype"]]
    identity = [settings, [_identity(dataset) for dataset in datasets], llm]
    digest = hashlib.sha256(json.dumps(identity, default=str, sort_keys=True).encode()).hexdigest()[:10]
    names = "+".join(config["pretrain_datasets"])
    folder = Path(config["checkpoint_dir"]) / f"{config['model']}-{names}-seed{config['seed']}-{digest}"
    if checkpoint.exists(folder):
        getLogger().info(f"Foundation: using the LLM in {folder}, pre-trained on {names}")
    else:
        getLogger().info(f"Foundation: pre-training the LLM on {names} now; it will be kept in {folder}")
        _pretrain(folder, configs, datasets, bool(config["resume"]))
    return _load(folder)


def source_configs(config: Config) -> list[Config]:
    """The configuration of the pre-training on each of ``config["pretrain_datasets"]``: its own dataset, this run's LLM.

    Raises:
        UserError: an unknown dataset or setting, or a pre-training that would not train the LLM.
    """
    names = config["pretrain_datasets"] or []
    if names and config["pretrained"]:
        raise UserError("pretrained names an LLM that was pre-trained before: leave pretrain_datasets unset.")
    if (names or config["pretrained"]) and config["backbone_quantization"]:
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
    model_class = get_model(configs[0]["model"])
    models = []
    for source, dataset in zip(configs, datasets, strict=True):
        models.append(model_class(source, dataset, shared=models[0] if models else None))
    model = SourceModels(models).to(configs[0]["device"])
    trainer = PretrainingTrainer(configs[0], model)
    trainer.saved_model_file = str(folder / "training")
    if resume and trainer.can_resume(trainer.saved_model_file):
        trainer.resume_checkpoint(trainer.saved_model_file)
    rows = SourceRows(datasets)
    _, result = trainer.fit(rows, rows, show_progress=configs[0]["show_progress"])
    trainer.load_weights(trainer.saved_model_file)

    weights = trained_weights(model.backbone)
    sha256 = digest_of({**weights, "query": models[0].query})
    record = {
        "kind": "foundation",
        "model": configs[0]["model"],
        "datasets": [source["dataset"] for source in configs],
        "fingerprint": model.fingerprint,
        "seed": configs[0]["seed"],
        "backbone": model.backbone.identity,
        "sha256": sha256,
        "train_seconds": trainer.train_seconds,
        "valid_result": result,
    }
    for source in models:
        source.save_head(folder / "heads" / source._config["dataset"], foundation=sha256)
    checkpoint.write(folder, record, {**weights, "query": models[0].query})
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
    """Models of several datasets over one LLM, as one model for the trainer.

    A batch holds rows of all sources in proportion to their sizes; its loss is the mean over all its query tokens.

    Args:
        models: one for each source; they share the encoder and the query token.
    """

    teacher = foundation = None
    recommend_by = "retrieval"
    id_alignment = False  # its accuracy is no figure of a pre-training

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.loss_names = tuple(model._config["dataset"] for model in models)
        self.fingerprint = "+".join(model.fingerprint for model in models)
        self.progress, self.epoch_steps = 0.0, 1

    @property
    def encoder(self):
        """Runs prompts through the LLM that the models share."""
        return self.models[0].encoder

    @property
    def backbone(self) -> Backbone:
        """The LLM that the models share."""
        return self.encoder.backbone

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def seed_step(self, step: int) -> None:
        """Make the randomness of a training step depend on the seed and the step alone."""
        for model in self.models:
            model.epoch_steps = self.epoch_steps
            model.seed_step(step)
        self.rng = np.random.default_rng([self.models[0].seed, step])

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The part of each source in the mean loss over all query tokens of a batch."""
        parts = []
        for number, model in enumerate(self.models):
            rows = interaction["row"][interaction["source"] == number].cpu()
            losses = list(model.query_losses(model._dataset.inter_feat[rows].to(model.query.device))) if len(rows) else []
            if not losses and model.id_alignment:
                losses = [model.alignment_losses()]
            parts.append(torch.cat(losses) if losses else model.query.new_zeros(0))
        total = sum(map(len, parts))
        return tuple(part.sum() / total for part in parts)


class PretrainingTrainer(ST2SITrainer):
    """Trains one LLM on several datasets; a validation's metrics are their means over the datasets."""

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Validate on every dataset; ``eval_data`` is not read."""
        self.model.eval()
        results = []
        for source in self.model.models:
            split, config = source._dataset.splits["valid"], source._config
            rows = sample_rows(split, config["valid_users"], config["seed"])
            results.append(
                evaluate_ranking(
                    source.score,
                    split,
                    config,
                    "valid",
                    rows=rows,
                    pool=config["valid_items"],
                    progress=show_progress,
                    eval_batch_rows=config["eval_batch_rows"],
                    rank_targets=source.rank_targets,
                ).metrics
            )
        return {name: float(np.mean([metrics[name] for metrics in results])) for name in results[0]}
