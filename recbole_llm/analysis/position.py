"""Does the LLM prefer candidates by their place in the prompt? For generation: how often the chosen candidate stands at each
place, and how often the target is hit where it stands there.

Candidates are listed in an order that depends on the user's candidates and the seed alone. A model that reads the titles and
not the places chooses each place equally often, whichever users it is asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from scipy.stats import chisquare
from torch import Tensor

from recbole_llm.analysis import trained
from recbole_llm.analysis.job import Job, stored
from recbole_llm.analysis.tables import decimal, format_columns, p_value, percent
from recbole_llm.analysis.trained import TrainedModel
from recbole_llm.data.shared import SharedData
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import shuffled_columns
from recbole_llm.evaluation.evaluate import evaluate_ranking

LEAST_EXPECTED = 5  # choices per place from which on the chi-square distribution holds


@dataclass(frozen=True)
class PositionSettings:
    """Nothing to choose: the order of candidates is that of the model's own test."""


def chosen_places(scores: np.ndarray, candidates: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the chosen candidate and the target stand in the prompt.

    Args:
        scores: of candidates, float64 ``[users, C]``, see :meth:`recbole_llm.recommender.generation.CandidateGenerator.score`.
        candidates: int64 ``[users, C]``, the target in column 0.
        seed: of the order in which they are listed.

    Returns:
        place of the chosen candidate, int64 ``[users]``, from 0; -1 for an answer that names no candidate, -2 for one that
        several candidates share; and the target's place, int64 ``[users]``.
    """
    order = shuffled_columns(candidates, seed)
    place = np.argsort(order, axis=1)  # of each column
    best = scores.max(axis=1, keepdims=True)
    ties = (scores == best).sum(axis=1)
    chosen = np.take_along_axis(place, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    chosen = np.where(ties > 1, -2, chosen)
    return np.where(np.isfinite(best[:, 0]), chosen, -1), place[:, 0]


def measure(model: TrainedModel) -> tuple[dict[str, Any], dict[str, Sequence]]:
    """Ask a trained model for each test user's item, and count places.

    Returns:
        ``chosen`` (how often each place was chosen), ``hits`` and ``targets`` (of the targets at each place, how many were
        chosen, and how many there are), ``invalid``, ``ambiguous``, ``expected``, ``chi_square`` with ``p_value`` (None where
        nothing was chosen); and each user's places, from 1, 0 for an answer that is none or ambiguous.

    Raises:
        UserError: the model does not recommend by generation.
    """
    config = model.config
    form = getattr(model.model, "form", None)
    generator = getattr(form, "generator", None)
    if generator is None:
        raise UserError(
            f"analyze position: {model.name} lists no candidates in a prompt; name models that do, with "
            "--recommend_by=generation, such as TALLRec or LLaRA."
        )
    chosen, targets = [], []

    def score(batch: Interaction, candidates: Tensor | None) -> Tensor:
        scores = model.score(batch, candidates)
        assert candidates is not None  # the form has refused full ranking
        at, of_target = chosen_places(scores.cpu().double().numpy(), candidates.cpu().numpy(), generator.seed)
        chosen.append(at)
        targets.append(of_target)
        return scores

    form.reset()
    ranking = evaluate_ranking(
        score,
        model.splits["test"],
        config,
        "test",
        progress=config["show_progress"],
        eval_batch_rows=config["eval_batch_rows"] or 512,
    )
    places, of_targets = np.concatenate(chosen), np.concatenate(targets)
    listed = int(of_targets.max()) + 1
    columns = {
        "model": [model.name] * len(places),
        "seed": [config["seed"]] * len(places),
        "user": list(ranking.user_ids),
        "chosen": np.maximum(places, -1) + 1,
        "target": of_targets + 1,
    }
    return count_places(places, of_targets, listed) | {"metrics": ranking.metrics | form.metrics()}, columns


def count_places(chosen: np.ndarray, targets: np.ndarray, listed: int) -> dict[str, Any]:
    """Count places and test whether all are chosen equally often, see :func:`measure`."""
    valid = chosen[chosen >= 0]
    counts = np.bincount(valid, minlength=listed)
    test = chisquare(counts) if len(valid) else None
    return {
        "users": len(chosen),
        "chosen": counts.tolist(),
        "targets": np.bincount(targets, minlength=listed).tolist(),
        "hits": np.bincount(targets[chosen == targets], minlength=listed).tolist(),
        "invalid": int((chosen == -1).sum()),
        "ambiguous": int((chosen == -2).sum()),
        "expected": len(valid) / listed,
        "chi_square": None if test is None else float(test.statistic),
        "p_value": None if test is None else float(test.pvalue),
    }


def analyze(job: Job, settings: PositionSettings) -> list[dict[str, Any]]:
    """Position bias of each model and seed of a job, see :func:`measure`; what was computed before is read."""
    data, results = SharedData(), []
    for name, config in job.configs():
        known = [trained.identity(name, config, data), asdict(settings)]

        def compute(name=name, config=config):
            found, columns = measure(trained.obtain(name, config, data, job.models))
            head = {"analysis": "position", "model": name, "dataset": config["dataset"], "seed": config["seed"]}
            return head | found, columns

        results.append(stored(job.folder("position", name, config, known), known, compute))
        gc.collect()
    return results


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """A table: places downwards, models across; and a test for each model."""
    listed = max(len(result["chosen"]) for result in results)
    names = [f"{result['model']} (seed {result['seed']})" for result in results]
    rows = []
    for place in range(listed):
        cells = [str(place + 1)]
        for result in results:
            count, hits, targets = (result[key][place] for key in ("chosen", "hits", "targets"))
            chosen = percent(count / max(sum(result["chosen"]), 1), signed=False)
            cells += [chosen, decimal(hits / targets if targets else None)]
        rows.append(cells)
    head = ["place", *(part for name in names for part in (name, "hit@1"))]
    tests = [_test(name, result) for name, result in zip(names, results, strict=True)]
    return (
        f"{results[0]['dataset']} · chosen candidates by their place in the prompt\n\n"
        + format_columns(head, rows)
        + f"\n\nEach place is expected in {percent(1 / listed, signed=False)} of the answers. hit@1: of the users whose target"
        " stands there.\n" + "\n".join(tests)
    )


def _test(name: str, result: dict[str, Any]) -> str:
    if result["chi_square"] is None:
        return f"{name}: no answer named a candidate."
    few = "; too few answers for the test" if result["expected"] < LEAST_EXPECTED else ""
    return (
        f"{name}: chi-square {result['chi_square']:.1f} with {len(result['chosen']) - 1} degrees of freedom, p "
        f"{p_value(result['p_value'])}{few}; {result['invalid']} answers named no candidate, {result['ambiguous']} several."
    )
