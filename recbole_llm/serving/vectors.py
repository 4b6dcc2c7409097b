"""A model's score as a product of two vectors: what is searched, and what encodes a history to search with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm import registry
from recbole_llm.errors import UserError
from recbole_llm.recommend import TrainedRecommender
from recbole_llm.teacher.teacher import USER_STATE, sequence_state

Encode = Callable[[Interaction], Tensor]
_TOLERANCE = 1e-3  # of scores, as a share of their spread
_TRIED = 4  # histories with which a product is compared with the model's scores


@dataclass(frozen=True)
class Vectors:
    """``score(u, i) = <encode(u), items[i]>``, up to a factor above 0.

    Attributes:
        items: float32 ``[items + 1, d]``, by internal id; row 0, of the padding, is zero.
        encode: rows of histories -> ``[B, d]``, without gradient.
    """

    items: Tensor
    encode: Encode


def vectors_of(trained: TrainedRecommender) -> Vectors:
    """The vectors of a trained model, compared with its scores for some histories before they are returned.

    Raises:
        UserError: its score is no product of a history's vector and an item's.
    """
    trained.prepare()
    name = trained.config["model"]
    rows = _some_histories(trained)
    scores = trained.scores(rows)[:, 1:].float()
    for encode, items in _candidates(trained):
        for vectors in _forms(encode, items):
            if _agree(vectors.encode(rows) @ vectors.items[1:].T, scores):
                return vectors
    raise UserError(
        f"{name} does not score by a product of a history's vector and an item's, which a search needs: choose a model that "
        f"does, such as LLMSRec, LLMSTAR (recommend_by: retrieval), SASRec or GRU4Rec, or ask it by recbole-llm recommend."
    )


def _candidates(trained: TrainedRecommender) -> Iterator[tuple[Encode, Tensor]]:
    """What may encode a model's histories, and its items' vectors."""
    model = trained.model
    count, table = model.n_items, getattr(model, "item_table", None)
    if registry.is_ours(trained.config["model"]):
        encode = getattr(model, "represent_distinct_users", None) or getattr(model, "represent_users", None)
        with torch.no_grad():
            if table is not None and encode is not None:
                yield _plain(encode), table.whole().float()
            elif hasattr(model, "user_states") and isinstance(getattr(model, "head", None), nn.Linear):  # ST2SI
                yield _plain(model.user_states), functional.pad(model.head.weight.detach().float(), (0, 0, 1, 0))
        return
    embedding = getattr(model, "item_embedding", None)
    if not hasattr(model, "ITEM_SEQ") or not isinstance(embedding, nn.Embedding):
        return
    state = USER_STATE.get(trained.config["model"], sequence_state)
    items = embedding.weight.detach()[:count].float().clone()
    items[0] = 0
    yield _plain(lambda rows: state(model, rows)), items


def _plain(encode: Callable[[Interaction], Any]) -> Encode:
    @torch.no_grad()
    def encoded(rows: Interaction) -> Tensor:
        return encode(rows).float()

    return encoded


def _forms(encode: Encode, items: Tensor) -> Iterator[Vectors]:
    """The vectors as they are, and the two ways in which a model's score may be a cosine."""
    yield Vectors(items, encode)
    units = functional.normalize(items, dim=-1)
    yield Vectors(units, encode)
    yield Vectors(units, lambda rows: functional.normalize(encode(rows), dim=-1))


def _agree(products: Tensor, scores: Tensor) -> bool:
    """Whether scores are the products times a factor above 0, the same for all."""
    if products.shape != scores.shape or not (products.isfinite().all() and scores.isfinite().all()):
        return False
    scores = scores.to(products.device)
    factor = (products * scores).sum() / products.square().sum().clamp_min(1e-30)
    return bool(factor > 0) and alike(factor * products, scores)


def alike(scores: Tensor, expected: Tensor) -> bool:
    """Whether scores ``[B, C]`` are the expected ones but for rounding."""
    spread = expected.std(dim=1).mean().clamp_min(1e-30)
    return bool((scores - expected).abs().max() <= _TOLERANCE * spread)


def _some_histories(trained: TrainedRecommender) -> Interaction:
    """Histories of one to four items, spread over the catalog."""
    count = trained.model.n_items - 1
    histories = [[1 + (37 * place + row) % count for place in range(row + 1)] for row in range(_TRIED)]
    users = torch.zeros(_TRIED, dtype=torch.long)
    return trained.rows([trained.sequence_of_items(history) for history in histories], users)
