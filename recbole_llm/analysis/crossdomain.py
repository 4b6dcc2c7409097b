"""Trained on one dataset, tested on another, whose items and users it has never seen (LLM-SRec, Table 8).

What a model has learned, its projections, heads and LoRA, is put behind the prompts of the other dataset with that dataset's
texts. The item vectors of the training dataset's teacher say nothing of other items; what stands in their slots is a condition:

* ``without``: no vectors, prompts of text alone. All that the model knows of the new items is their titles: the case of items
  that lack collaborative information.
* ``own``: the vectors of a teacher that is trained on the other dataset, behind the projection that was trained for the first
  one. The spaces of two teachers have nothing to do with each other, so that this shows what vectors of a foreign space do.
* ``untrained``: the model before any training, with text alone: what the frozen LLM and random heads give by themselves.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from recbole.config import Config
from recbole.utils import get_model, init_seed
from torch import Tensor

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.order import rank
from recbole_llm.analysis.tables import decimal, format_columns, p_value
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.evaluation.intervals import DRAWS, compare
from recbole_llm.evaluation.ranking import is_per_user, per_user, split_metric
from recbole_llm.registry import is_ours

UNTRAINED = "untrained"
VECTORS = ("without", "own")


@dataclass(frozen=True)
class CrossSettings:
    """Where the model is trained, and what stands for the other dataset's item vectors.

    Attributes:
        train: the dataset that the models are trained on; the job's dataset is the one they are tested on.
        vectors: of ``without`` and ``own``, see above.
        bootstrap: draws of the intervals.
    """

    train: str = ""
    vectors: tuple[str, ...] = VECTORS
    bootstrap: int = DRAWS

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("name the dataset to train on: --train=A --dataset=B tests on B.")
        unknown = [name for name in self.vectors if name not in VECTORS]
        if unknown or not self.vectors:
            raise UserError(f"vectors: {', '.join(unknown) or 'nothing'} is none of {', '.join(VECTORS)}.")


def transplant(learned: Mapping[str, Tensor], model: Any) -> None:
    """Put what one model has learned into another of the same kind, built for other data.

    Raises:
        UserError: they differ in a parameter or its shape.
    """
    parameters = model.trained_parameters()
    different = sorted(set(learned) ^ set(parameters)) or sorted(
        name for name, parameter in parameters.items() if parameter.shape != learned[name].shape
    )
    if different:
        raise UserError(
            f"a model of one dataset does not fit the other: {different[0]} differs; give both the same settings, the "
            "teacher's too."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(learned[name])


def measure(
    name: str, learned: Mapping[str, Tensor], config: Config, data: SharedData, settings: CrossSettings
) -> tuple[dict[str, Any], dict[str, Sequence]]:
    """Test what was learned elsewhere on the test users of ``config``.

    Args:
        name: of the model.
        learned: its trained parameters.
        config: of the dataset that it is tested on.
        data: builds the dataset.
        settings: what is tested.

    Returns:
        ``users``, ``untrained`` (metrics) and ``conditions``, each with ``vectors`` and by metric the comparison with the
        untrained model, see :func:`recbole_llm.evaluation.intervals.compare`; and each user's values.
    """
    splits = data.splits(config)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, data.train(config)).to(config["device"])
    reads = min(config["history_length"], config["MAX_ITEM_LIST_LENGTH"])
    ours = TrainedModel(name, config, splits, model, model.score, reads, None, {})
    model.eval()
    ranked = {}
    for condition in (UNTRAINED, *settings.vectors):
        if condition != UNTRAINED:
            transplant(learned, model)  # changed weights: items are encoded anew, with or without vectors
        model.show_vectors(condition == "own")
        ranked[condition] = rank(ours, splits["test"]).ranking
    metrics = [metric for metric in ranked[UNTRAINED].metrics if is_per_user(metric)]
    values = {
        condition: {metric: per_user(ranking.ranks, *split_metric(metric)) for metric in metrics}
        for condition, ranking in ranked.items()
    }
    conditions = [
        {
            "vectors": condition,
            "metrics": {
                metric: compare(values[UNTRAINED][metric], values[condition][metric], config["seed"], settings.bootstrap)
                for metric in metrics
            },
        }
        for condition in settings.vectors
    ]
    users = list(ranked[UNTRAINED].user_ids)
    columns: dict[str, Any] = {
        "model": [name] * len(users) * len(values),
        "seed": [config["seed"]] * len(users) * len(values),
        "condition": [condition for condition in values for _ in users],
        "user": users * len(values),
    }
    for metric in metrics:
        columns[metric] = [value for found in values.values() for value in found[metric].tolist()]
    return {"users": len(users), UNTRAINED: ranked[UNTRAINED].metrics, "conditions": conditions}, columns


def analyze(job: Job, settings: CrossSettings) -> list[dict[str, Any]]:
    """Train each model of a job on ``settings.train``, or find it, and test it on the job's dataset; what was done is read."""
    others = [name for name in job.models if not is_ours(name.partition(":")[0])]
    if others:
        raise UserError(f"analyze crossdomain: {others[0]} knows items by their ids alone; name models of this library.")
    if settings.train == job.dataset:
        raise UserError(f"train: {settings.train} is the dataset of the test, too; name another.")
    data, results = SharedData(), []
    pairs = zip(replace(job, dataset=settings.train).configs(), job.configs(), strict=True)
    for (name, source), (_, config) in pairs:
        known = [trained.identity(name, source, data), trained.identity(name, config, data), asdict(settings)]

        def compute(name=name, source=source, config=config):
            model = trained.obtain(name, source, data, job.models)
            if not hasattr(model.model, "show_vectors"):
                raise UserError(f"analyze crossdomain: {name} builds its prompts in a way of its own; leave it out.")
            parameters = model.model.trained_parameters()
            learned = {key: parameter.detach().clone() for key, parameter in parameters.items()}
            del model, parameters
            gc.collect()
            found, columns = measure(name, learned, config, data, settings)
            head = {"analysis": "crossdomain", "model": name, "dataset": config["dataset"], "seed": config["seed"]}
            return head | {"train": settings.train, "protocol": config["protocol"]} | found, columns

        results.append(stored(job.folder("crossdomain", name, config, known, settings.train), known, compute))
        gc.collect()
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line per model, vectors and metric."""
    lines = []
    for result in results:
        for condition in result["conditions"]:
            for metric, found in condition["metrics"].items():
                low, high = found["difference_interval"]
                figures = [decimal(found["original"]), decimal(found["perturbed"]), f"{found['difference']:+.4f}"]
                bounds = f"[{low:+.4f}, {high:+.4f}]"
                head = [result["model"], str(result["seed"]), condition["vectors"], metric]
                lines.append([*head, *figures, bounds, p_value(found["p_value"])])
    header = ["model", "seed", "vectors", "metric", "untrained", "trained", "difference", "95 % interval", "p"]
    first = results[0]
    return (
        f"trained on {first['train']}, tested on {first['dataset']} · {first['users']:,} users · protocol {first['protocol']}"
        + "\n\n"
        + format_columns(header, lines, left=4)
        + "\n\nvectors: what stands for the item vectors of the test's dataset; without: text alone; own: those of its"
        " own teacher."
    )
