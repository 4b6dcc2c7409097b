"""Scores of RecBole's own models for the candidates of each row."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.evaluation.evaluate import PredictRows, ScoreRows


def stock_predictions(model: Any) -> PredictRows:
    """Make a function that predicts the item of each row by a RecBole model; ``model`` as in :func:`stock_scores`."""
    scores = stock_scores(model)

    def predict(interaction: Interaction) -> Tensor:
        return scores(interaction, interaction[model.ITEM_ID][:, None])[:, 0]

    return predict


def stock_scores(model: Any, *, max_scores: int = 2**25, max_rows: int = 2**13) -> ScoreRows:
    """Make a scoring function of a RecBole model.

    ``full_sort_predict`` encodes each history once, and the candidates' scores are gathered from its row. Where a model has
    none, ``predict`` is called on one row per (history, candidate), each of which encodes the history again. A model with
    ``score_candidates`` is asked for its candidates by that.

    Args:
        model: a RecBole sequential recommender. It is put into eval mode for each call, and back after it.
        max_scores: most scores over the catalogue held at a time (2**25 are 128 MB in float32).
        max_rows: most rows given to ``predict`` at a time.

    Returns:
        A ``score_rows`` for :func:`evaluate_ranking`.
    """
    has_full_sort = True

    def score(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        nonlocal has_full_sort
        interaction = interaction.to(model.device)
        candidates = None if candidates is None else candidates.to(model.device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if candidates is not None and hasattr(model, "score_candidates"):
                    return model.score_candidates(interaction, candidates)
                if has_full_sort:
                    try:
                        return by_catalogue(interaction, candidates)
                    except NotImplementedError:
                        has_full_sort = False
                if candidates is None:
                    items = torch.arange(model.n_items, device=model.device)
                    items[0] = 1  # padding: some models have no score for it; the column is never read
                    candidates = items.expand(len(interaction), -1)
                return by_row(interaction, candidates)
        finally:
            model.train(was_training)

    def by_catalogue(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        step = max(1, max_scores // model.n_items)
        parts = []
        for start in range(0, len(interaction), step):
            part = interaction[slice(start, start + step)]
            scores = model.full_sort_predict(part).reshape(len(part), -1)[:, : model.n_items]
            parts.append(scores if candidates is None else scores.gather(1, candidates[start : start + step]))
        return torch.cat(parts)

    def by_row(interaction: Interaction, candidates: Tensor) -> Tensor:
        width = candidates.shape[1]
        items = candidates.reshape(-1)
        parts = []
        for start in range(0, len(items), max_rows):
            index = torch.arange(start, min(start + max_rows, len(items)))
            part = interaction[index // width]
            part.update(Interaction({model.ITEM_ID: items[index]}))
            parts.append(model.predict(part).reshape(-1))
        return torch.cat(parts).view(-1, width)

    return score
