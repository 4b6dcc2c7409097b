"""Scores of RecBole's own models for the candidates of each row."""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.config.checks import SCORED_BY_VECTORS
from recbole_llm.data.padding import can_trim, parts_by_length
from recbole_llm.evaluation.evaluate import PredictRows, ScoreRows

# Candidates' vectors alone are faster than the whole catalogue where it holds this many times as many items.
_VECTORS_PAY = 20


def stock_predictions(model: Any) -> PredictRows:
    """Make a function that predicts the item of each row by a RecBole model; ``model`` as in :func:`stock_scores`."""
    scores = stock_scores(model)

    def predict(interaction: Interaction) -> Tensor:
        return scores(interaction, interaction[model.ITEM_ID][:, None])[:, 0]

    return predict


def stock_scores(model: Any, *, max_scores: int = 2**25, max_rows: int = 2**13) -> ScoreRows:
    """Make a scoring function of a RecBole model.

    ``full_sort_predict`` encodes each history once, and the candidates' scores are gathered from its row; of some models
    (:data:`SCORED_BY_VECTORS`) the candidates' vectors alone are multiplied, where they are few. Where a model has none,
    ``predict`` is called on one row per (history, candidate), each of which encodes the history again. A model with
    ``score_candidates`` is asked for its candidates by that.

    Args:
        model: a RecBole sequential recommender. It is put into eval mode for each call, and back after it.
        max_scores: most scores over the catalogue, or numbers of candidates' vectors, held at a time (2**25 are 128 MB in
            float32).
        max_rows: most rows given to ``predict`` at a time.

    Returns:
        A ``score_rows`` for :func:`evaluate_ranking`.
    """
    has_full_sort = True
    by_vectors = type(model).__module__.startswith("recbole.model.") and type(model).__name__ in SCORED_BY_VECTORS

    def score(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        interaction = interaction.to(model.device)
        candidates = None if candidates is None else candidates.to(model.device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if candidates is not None and hasattr(model, "score_candidates"):
                    return model.score_candidates(interaction, candidates)
                if not can_trim(type(model)):
                    return of_rows(interaction, candidates)
                parts, order = [], []
                for places, rows in parts_by_length(model, interaction):
                    parts.append(of_rows(rows, None if candidates is None else candidates[places]))
                    order.append(places)
                return torch.cat(parts)[torch.cat(order).argsort()]
        finally:
            model.train(was_training)

    def of_rows(interaction: Interaction, candidates: Tensor | None) -> Tensor:
        nonlocal has_full_sort
        if candidates is not None and by_vectors and candidates.shape[1] * _VECTORS_PAY < model.n_items:
            return by_vector(interaction, candidates)
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

    def by_vector(interaction: Interaction, candidates: Tensor) -> Tensor:
        states = model.forward(interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN])
        step = max(1, max_scores // (candidates.shape[1] * states.shape[1]))
        parts = [
            torch.bmm(model.item_embedding(some), of_some[:, :, None])[:, :, 0]
            for some, of_some in zip(candidates.split(step), states.split(step), strict=True)
        ]
        return torch.cat(parts)

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
