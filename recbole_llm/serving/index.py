"""Search among item vectors: exact, or by FAISS where the catalog is large."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from logging import getLogger
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recbole_llm.errors import UserError

KINDS = ("auto", "exact", "faiss")
FROM_ITEMS = 1_000_000  # from here on `auto` is FAISS
AT = 10  # recall@10
RECALL = 0.995  # of a sample of users, so that it is .99 and more for the others
_SCORES = 1 << 26  # held at a time: 256 MB
_LEAST_FOR_LISTS = 1024  # of fewer vectors FAISS searches all

Found = tuple[np.ndarray, np.ndarray]  # internal ids int64 and scores float32, best first


class Index(Protocol):
    """Finds the items of highest inner product.

    Attributes:
        name: how, for people.
    """

    name: str

    def search(self, users: Tensor, counts: Sequence[int], excluded: Sequence[np.ndarray]) -> list[Found]:
        """The best items of each user.

        Args:
            users: ``[B, d]``.
            counts: how many for each.
            excluded: internal ids of what each may not be given.
        """


class ExactIndex:
    """Compares with every item.

    Args:
        items: ``[items + 1, d]``, by internal id, the padding first.
    """

    name = "exact"

    def __init__(self, items: Tensor) -> None:
        self.items = items

    @torch.no_grad()
    def search(self, users: Tensor, counts: Sequence[int], excluded: Sequence[np.ndarray]) -> list[Found]:
        """See :class:`Index`."""
        found: list[Found] = []
        step = max(1, _SCORES // len(self.items))
        for start in range(0, len(users), step):
            scores = users[start : start + step].to(self.items.device) @ self.items.T
            scores[:, 0] = float("-inf")
            for row, left_out in enumerate(excluded[start : start + step]):
                scores[row, torch.from_numpy(left_out).to(scores.device)] = float("-inf")
            most = min(max(counts[start : start + step]), scores.shape[1])
            best = scores.topk(most, dim=1)
            for row, count in enumerate(counts[start : start + step]):
                kept = int(torch.isfinite(best.values[row, :count]).sum())
                found.append((best.indices[row, :kept].cpu().numpy(), best.values[row, :kept].cpu().numpy()))
        return found


class FaissIndex:
    """FAISS: items in lists around centers, of which the nearest few are compared with a user.

    How many lists are read is decided here: as many as find the ten best of nearly all users of a sample.

    Args:
        items: ``[items + 1, d]``, by internal id, the padding first.
        sample: vectors of users ``[n, d]``, n >= 1.

    Attributes:
        recall: recall@10 for the sample.
        lists, read: how many lists there are, and how many are read.
    """

    def __init__(self, items: Tensor, sample: Tensor) -> None:
        import faiss  # an extra

        vectors = items[1:].detach().cpu().numpy().astype(np.float32, copy=False)
        users = sample.detach().cpu().numpy().astype(np.float32, copy=False)
        size, count = vectors.shape[1], len(vectors)
        flat = faiss.IndexFlatIP(size)
        if count < _LEAST_FOR_LISTS:
            self._index: Any = flat
            flat.add(vectors)
            self.lists, self.read, self.recall = 1, 1, 1.0
        else:
            self.lists = int(2 ** np.round(np.log2(4 * np.sqrt(count))))
            self.lists = max(1, min(self.lists, count // 39))  # FAISS wants 39 vectors for each center
            self._index = faiss.IndexIVFFlat(flat, size, self.lists, faiss.METRIC_INNER_PRODUCT)
            self._index.cp.seed, self._index.cp.niter, self._index.cp.max_points_per_centroid = 1, 10, 64
            self._index.train(vectors)
            self._index.add(vectors)
            self._tune(ExactIndex(items), torch.from_numpy(users), users)
        self.name = f"FAISS, {self.read} of {self.lists} lists, recall@{AT} {self.recall:.3f}"

    def _tune(self, exact: ExactIndex, sample: Tensor, users: np.ndarray) -> None:
        """Read more and more lists until the sample's best are found."""
        nothing = [np.zeros(0, dtype=np.int64)] * len(users)
        truth = [items for items, _ in exact.search(sample, [AT] * len(users), nothing)]
        self.read = 1
        while True:
            self._index.nprobe = self.read
            _, found = self._index.search(users, AT)
            self.recall = recall(truth, found + 1)
            if self.recall >= RECALL or self.read >= self.lists:
                return
            self.read = min(2 * self.read, self.lists)

    def search(self, users: Tensor, counts: Sequence[int], excluded: Sequence[np.ndarray]) -> list[Found]:
        """See :class:`Index`."""
        wanted = max(count + len(left_out) for count, left_out in zip(counts, excluded, strict=True))
        queries = users.detach().cpu().numpy().astype(np.float32, copy=False)
        scores, items = self._index.search(queries, min(wanted, self._index.ntotal))
        found: list[Found] = []
        for row, (count, left_out) in enumerate(zip(counts, excluded, strict=True)):
            ids = items[row] + 1  # 0 stands where fewer were found
            kept = np.flatnonzero((ids > 0) & ~np.isin(ids, left_out))[:count]
            found.append((ids[kept], scores[row, kept]))
        return found


def recall(truth: Sequence[np.ndarray], found: np.ndarray) -> float:
    """The share of the true best that was found."""
    hits = sum(len(np.intersect1d(best, row)) for best, row in zip(truth, found, strict=True))
    return hits / max(1, sum(map(len, truth)))


def check_kind(kind: str) -> None:
    """Refuse a kind of search that is unknown, or not installed.

    Raises:
        UserError: either.
    """
    if kind not in KINDS:
        raise UserError(f"search is {kind!r}: give {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    if kind == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UserError('search: faiss needs the package faiss: pip install "recbole-llm[faiss]", or take search: exact.')


def make_index(items: Tensor, kind: str, sample: Any) -> Index:
    """The index of item vectors.

    Args:
        items: ``[items + 1, d]``, the padding first.
        kind: auto, exact or faiss.
        sample: a function that returns vectors of users, asked where FAISS is tuned.
    """
    check_kind(kind)
    is_large = len(items) > FROM_ITEMS
    if kind == "auto" and is_large and importlib.util.find_spec("faiss") is None:
        getLogger().warning('%d items are searched one by one: pip install "recbole-llm[faiss]" is faster', len(items) - 1)
        kind = "exact"
    if kind == "faiss" or (kind == "auto" and is_large):
        return FaissIndex(items, sample())
    return ExactIndex(items)
