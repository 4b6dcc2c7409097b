"""Vectors of the items' texts as the item embeddings of RecBole's own models (key ``item_vectors``).

A model is changed after RecBole has built it: its ``item_embedding`` starts from the vectors, or is replaced by a
:class:`VectorEmbedding`, which the model reads as it reads any other.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.item_vectors import VectorSource, item_vectors, transformed
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError

NAME = "item_embedding"  # of the attribute of RecBole's models


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a model uses the vectors; each field is the key of the same name."""

    model: str
    item_vectors: str | None
    item_vectors_use: str
    item_vectors_transform: str
    item_vectors_std: float | None
    item_vectors_projection: str
    item_vectors_hidden_size: int | None


@dataclass(frozen=True)
class CatalogueVectors:
    """The vectors of a data set's items.

    Attributes:
        vectors: float32 ``[items - 1, t]``, by internal id, without the padding.
        identity: sha256 of them.
        stored_files: where an encoder's are kept.
    """

    vectors: np.ndarray
    identity: str
    stored_files: list[str]


class VectorEmbedding(nn.Embedding):
    """An embedding whose rows are vectors that stay as they are, or a trained projection of these.

    The padding, and rows behind the items such as a [MASK], are trained as in any embedding.

    Args:
        own: what is trained row by row, the padding first, float32 ``[1 + rows behind the items, d]``.
        vectors: of items 1, 2, ..., float32 ``[items - 1, t]``; t = d where nothing projects.
        projection: t to d; None: the vectors themselves.
    """

    def __init__(self, own: Tensor, vectors: Tensor, projection: nn.Module | None = None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's would make a table of weights
        self.num_embeddings, self.embedding_dim = len(own) + len(vectors), own.shape[1]
        self.padding_idx, self.max_norm, self.norm_type = 0, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.own = nn.Parameter(own.clone())
        self.register_buffer("vectors", vectors.clone())  # in the checkpoint, so that loading needs no encoder
        self.projection = projection

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed
        """The whole table, ``[num_embeddings, d]``."""
        items = self.vectors if self.projection is None else self.projection(self.vectors)
        return torch.cat([self.own[:1], items, self.own[1:]])

    def forward(self, input: Tensor) -> Tensor:
        """The rows of ids ``[...]``: ``[..., d]``."""
        return functional.embedding(input, self.weight, self.padding_idx)


def catalogue_vectors(config: Config, dataset: TextSequentialDataset) -> CatalogueVectors | None:
    """The vectors that a stock model's settings name, computed where they are not stored yet; None where they name none.

    Raises:
        UserError: see :func:`recbole_llm.backbone.item_vectors.item_vectors`.
    """
    if not config["item_vectors"]:
        return None
    source = select(VectorSource, config)
    items = dataset.field2id_token[dataset.iid_field].tolist()
    vectors = item_vectors(source, items, dataset.item_texts, dataset.item_file_tokens)
    stored = [] if source.is_file else [str(source.stored_file(dataset.item_texts[1:]))]
    return CatalogueVectors(vectors, hashlib.sha256(vectors.tobytes()).hexdigest(), stored)


def has_item_embedding(model_class: type) -> bool:
    """Whether the source of a RecBole model, or of a class it stands on, makes an ``item_embedding``."""
    modules = {owner.__module__ for owner in model_class.__mro__ if "recbole" in owner.__module__}
    sources = (inspect.getsource(sys.modules[module]) for module in modules)
    return any(re.search(rf"self\.{NAME} = nn\.Embedding\(", source) for source in sources)


def no_item_embedding(model: str) -> UserError:
    return UserError(
        f"item_vectors: {model} has no item_embedding that vectors could stand for; choose a model that has, such as SASRec, "
        f"GRU4Rec, Caser or BERT4Rec, or leave item_vectors away."
    )


def use_item_vectors(model: nn.Module, config: Config, vectors: np.ndarray) -> None:
    """Let the item embeddings of ``model`` start from vectors, be them, or be a projection of them.

    Args:
        model: a RecBole model as it was built.
        config: its configuration.
        vectors: of the items, see :class:`CatalogueVectors`.

    Raises:
        UserError: no item embeddings, or vectors of another width.
    """
    settings = select(EmbeddingSettings, config)
    embedding = _embedding_of(model, settings.model, len(vectors))
    table = embedding.weight.detach()
    items, width = slice(1, len(vectors) + 1), table.shape[1]
    own = torch.cat([table[:1], table[items.stop :]])
    if hasattr(model, "embed_vectors"):  # a model that is made of them
        ready = torch.from_numpy(transformed(vectors, settings.item_vectors_transform))
        setattr(model, NAME, model.embed_vectors(own, ready))
        return
    std = settings.item_vectors_std or float(table[items].std())
    projects = settings.item_vectors_use == "project"
    ready = torch.from_numpy(transformed(vectors, settings.item_vectors_transform, None if projects else width))
    if not projects and settings.item_vectors_transform in ("none", "zca") and ready.shape[1] != width:
        raise UserError(
            f"item_vectors_transform: {settings.item_vectors_transform} keeps the {ready.shape[1]} numbers of a vector, and "
            f"{settings.model}'s item embeddings have {width}: take pca or whiten, item_vectors_use: project, or make the "
            f"model {ready.shape[1]} wide."
        )
    if settings.item_vectors_use == "initialize":
        # Of a small catalogue's vectors there may be fewer numbers than the model is wide: the others stay random.
        table[items, : ready.shape[1]] = _scaled(ready, std).to(table)
        return
    if not projects:
        ready = functional.pad(_scaled(ready, std), (0, width - ready.shape[1]))
        setattr(model, NAME, VectorEmbedding(own, ready))
        return
    ready = _scaled(ready, 1.0)
    projection = _projection(settings, ready.shape[1], width)
    with torch.no_grad():
        last = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)][-1]
        last.bias.zero_()
        last.weight *= std / projection(ready).std()
    setattr(model, NAME, VectorEmbedding(own, ready, projection))


def make_room(model: nn.Module, config: Config, weights: Mapping[str, Tensor]) -> None:
    """Give ``model`` the item embeddings that the weights of a checkpoint fit into, without the vectors themselves.

    Raises:
        RuntimeError: the weights have none, as where weights do not fit a module.
    """
    settings = select(EmbeddingSettings, config)
    builds = getattr(model, "embed_vectors", None)
    if not settings.item_vectors or (settings.item_vectors_use == "initialize" and builds is None):
        return
    own, vectors = (weights.get(f"{NAME}.{part}") for part in ("own", "vectors"))
    if own is None or vectors is None or own.ndim != 2 or vectors.ndim != 2:
        raise RuntimeError("the weights have no item vectors")
    embedding = _embedding_of(model, settings.model, len(vectors))
    if own.shape != (embedding.num_embeddings - len(vectors), embedding.embedding_dim):
        raise RuntimeError("the item vectors are of another size")
    if builds is not None:
        setattr(model, NAME, builds(torch.zeros(own.shape), torch.zeros(vectors.shape)))
        return
    projection = None
    if settings.item_vectors_use == "project":
        projection = _projection(settings, vectors.shape[1], own.shape[1])
    setattr(model, NAME, VectorEmbedding(torch.zeros(own.shape), torch.zeros(vectors.shape), projection))


def _embedding_of(model: nn.Module, name: str, items: int) -> nn.Embedding:
    embedding = getattr(model, NAME, None)
    if not isinstance(embedding, nn.Embedding) or embedding.num_embeddings <= items:
        raise no_item_embedding(name)
    return embedding


def _projection(settings: EmbeddingSettings, size: int, width: int) -> nn.Module:
    if settings.item_vectors_projection == "linear":
        return nn.Linear(size, width)
    hidden = settings.item_vectors_hidden_size or size
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, width))


def _scaled(vectors: Tensor, std: float) -> Tensor:
    return vectors * (std / vectors.std())


def identity_of(settings: Mapping[str, Any], vectors: CatalogueVectors | None) -> dict[str, Any]:
    """The deciding settings of a stock model with its vectors in place of where they came from."""
    if vectors is None:
        return dict(settings)
    return {**settings, "item_vectors": vectors.identity}
