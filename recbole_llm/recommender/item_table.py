"""Item representations, computed once per set of weights and only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from recbole_llm.recommender.candidates import inner_products


class ItemTable:
    """A cache of item representations that empties itself when the weights they came from change.

    Every in-place change of a parameter (an optimizer step, loading a checkpoint) raises the version that PyTorch
    keeps of it, so that no caller has to remember to invalidate the table. Fused optimizers alone leave it as it is: code that
    uses one calls ``torch.autograd.graph.increment_version`` after its step, as the trainer does.

    Args:
        encode: internal item ids int64 ``[n]`` -> representations ``[n, d']``.
        parameters: those that ``encode`` depends on and that may change.
        items: size of the catalog, padding included.

    Attributes:
        encoded: how many items have been encoded since the table was made; counts work, for tests and benchmarks.
    """

    def __init__(self, encode: Callable[[np.ndarray], Tensor], parameters: Iterable[nn.Parameter], items: int) -> None:
        self._encode = encode
        self._parameters = list(parameters)
        self._items = items
        self._version: tuple[tuple[int, int], ...] | None = None
        self._table: Tensor | None = None
        self._present = np.zeros(items, dtype=bool)
        self.encoded = 0

    def _current_version(self) -> tuple[tuple[int, int], ...]:
        return tuple((parameter.data_ptr(), parameter._version) for parameter in self._parameters)

    def whole(self) -> Tensor:
        """Representations of the whole catalog, ``[items, d']``, without gradient; row 0, of the padding, is zero."""
        if self._current_version() != self._version or not self._present[1:].all():
            self.rows(np.arange(1, self._items))
        assert self._table is not None
        return self._table

    def fill(self, table: Tensor) -> None:
        """Take over the whole table, as :meth:`whole` once returned it for the weights of now."""
        self._version, self._table = self._current_version(), table
        self._present[1:] = True

    @torch.no_grad()
    def rows(self, items: np.ndarray) -> Tensor:
        """Return the representations of ``items`` (int64, any shape), encoding those not yet in the table.

        Returns:
            float32 ``[*items.shape, d']``, without gradient.
        """
        version = self._current_version()
        if version != self._version:
            self._version, self._table = version, None
            self._present[:] = False
        wanted = np.unique(items)
        missing = wanted[~self._present[wanted]]
        if len(missing):
            encoded = self._encode(missing)
            if self._table is None:
                self._table = encoded.new_zeros((self._items, encoded.shape[-1]))
            self._table[torch.from_numpy(missing).to(encoded.device)] = encoded
            self._present[missing] = True
            self.encoded += len(missing)
        return self._table[torch.from_numpy(items).to(self._table.device)]

    def scores(self, users: Tensor, candidates: Tensor | None) -> Tensor:
        """Inner products of users ``[B, d']`` with their candidates int64 ``[B, C]``, ``[B, C]``; with None those of the whole
        catalog, ``[B, items]`` (column 0, the padding item, is -inf)."""
        if candidates is not None:
            return inner_products(users, self.rows(candidates.cpu().numpy()))
        scores = inner_products(users, self.whole())
        scores[:, 0] = float("-inf")
        return scores
