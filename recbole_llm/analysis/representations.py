"""How far does a user's representation move when the history is put into another order? (LLM-SRec, Tables 5 and 13)"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.order import OrderSettings, perturbed
from recbole_llm.analysis.tables import decimal, format_columns
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.recommender.retrieval import RetrievalForm
from recbole_llm.teacher.teacher import Teacher


@torch.no_grad()
def represent(model: TrainedModel, split: TextSequentialDataset) -> Tensor:
    """The representation of each row's user, float32 ``[rows, d]``: what is multiplied with the items' representations.

    Raises:
        UserError: a model without one.
    """
    config = model.config
    if model.run is not None:
        encode = Teacher(model.run).represent
    elif hasattr(model.model, "represent_distinct_users") and isinstance(getattr(model.model, "form", None), RetrievalForm):
        encode = model.model.represent_distinct_users
    else:
        raise UserError(
            f"analyze representations: {model.name}, as it is asked here, has no user representation; "
            f"use a retrieval model or a stock model with item embeddings."
        )
    step = config["eval_batch_rows"] or 512
    parts = [
        encode(split.inter_feat[slice(start, start + step)].to(config["device"])).float().cpu()
        for start in range(0, len(split.inter_feat), step)
    ]
    return torch.cat(parts)


def mean_distance(vectors: Tensor, rows_at_once: int = 1024) -> float:
    """Mean Euclidean distance over all pairs of different rows of ``vectors`` ``[N, d]``."""
    count = len(vectors)
    if count < 2:
        return 0.0
    vectors = vectors.double()
    total = sum(float(torch.cdist(part, vectors).sum()) for part in vectors.split(rows_at_once))
    return total / (count * (count - 1))


def compare_representations(model: TrainedModel, settings: OrderSettings) -> dict[str, Any]:
    """Similarity of original and perturbed representations, and distances between users.

    Returns:
        ``distance``: the mean Euclidean distance between two users; ``unit_distance``: the same of vectors of length 1;
        ``cosine_between_users``: the mean cosine between two users, which a cosine between orders is to be seen against;
        ``conditions``: per perturbation the mean cosine between a user's two representations over the users that have another
        order, and its 5 %, 50 % and 95 % quantiles.
    """
    test, seed = model.splits["test"], model.config["seed"]
    original = represent(model, test)
    unit = functional.normalize(original.double(), dim=1)
    count = len(unit)
    total = unit.sum(dim=0)
    conditions = []
    for kind in settings.inference:
        cosines = []
        for draw in range(1 if kind == "reverse" else settings.draws):
            split, changed = perturbed(test, kind, seed, draw, settings.within or model.reads)
            moved = represent(model, split)
            cosines.append(functional.cosine_similarity(original.double(), moved.double(), dim=1)[torch.from_numpy(changed)])
        cosine = torch.stack(cosines).mean(dim=0).numpy()
        quantiles = np.quantile(cosine, [0.05, 0.5, 0.95]).tolist() if len(cosine) else [None] * 3
        mean = float(cosine.mean()) if len(cosine) else None
        conditions.append({"condition": f"inference {kind}", "users": len(cosine), "cosine": mean, "quantiles": quantiles})
    return {
        "users": count,
        "distance": mean_distance(original),
        "unit_distance": mean_distance(unit),
        "cosine_between_users": float((total @ total - count) / (count * (count - 1))) if count > 1 else None,
        "conditions": conditions,
    }


def analyze(job: Job, settings: OrderSettings) -> list[dict[str, Any]]:
    """Representations of each model and seed of a job; what was computed before is read."""
    data, results = SharedData(), []
    for name, config in job.configs():
        known = [trained.identity(name, config, data), asdict(settings)]
        head = {"analysis": "representations", "model": name, "dataset": config["dataset"], "seed": config["seed"]}

        def compute(name=name, config=config, head=head):
            model = trained.obtain(name, config, data, job.models)
            return head | {"settings": asdict(settings)} | compare_representations(model, settings), None

        results.append(stored(job.folder("representations", name, config, known), known, compute))
        gc.collect()
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table, one line per model and condition."""
    lines = []
    for result in results:
        for condition in result["conditions"]:
            numbers = [condition["cosine"], *condition["quantiles"], result["cosine_between_users"]]
            distances = [decimal(result[name], 3) for name in ("distance", "unit_distance")]
            head = [result["model"], str(result["seed"]), condition["condition"]]
            lines.append([*head, *(decimal(number) for number in numbers), *distances])
    header = ["model", "seed", "condition", "cosine", "5 %", "median", "95 %", "between users", "distance", "unit distance"]
    return (
        f"{results[0]['dataset']} · user representations · {results[0]['users']:,} users\n\n"
        + format_columns(header, lines, left=3)
        + "\n\ncosine: between a user's two representations, over the users that have another order, with quantiles.\n"
        "between users: mean cosine of two users. distance: mean Euclidean distance of two users."
    )
