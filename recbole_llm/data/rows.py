"""Rows with their histories, which are cut out of the sequences when they are read.

One row per prefix, each with a history of ``MAX_ITEM_LIST_LENGTH`` items, takes as much memory as the interactions times that
length: twenty million interactions of fifty items, with their times, are 16 GB. Here a history is a place in the sequences
and a length, and what is read of it is copied then: a batch at a time by the dataloaders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.sequences import copy_windows, windows_of

_ROWS_AT_HAND = 1 << 16  # as many rows are copied at once, as a batch is, and kept


@dataclass(frozen=True)
class Histories:
    """A column of histories: of row r the values from ``starts[r]`` on, ``lengths[r]`` of them, and 0 beyond.

    Attributes:
        windows: ``[N, width, ...]``, a view: row n has the ``width`` values from n on.
        starts: ``[R]`` int64.
        lengths: ``[R]`` int64, at most ``width``.
    """

    windows: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, values: Tensor, starts: Tensor, lengths: Tensor, width: int) -> Histories:
        """Of the ``values`` of all sequences, one behind the other, ``[N, ...]``."""
        return cls(windows_of(values, width), starts, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Histories:
        return replace(self, starts=self.starts[index], lengths=self.lengths[index])

    def tensor(self) -> Tensor:
        """``[R, width, ...]``."""
        return copy_windows(self.windows, self.starts, self.lengths)


class _Columns(dict):
    """Columns by name. One that is a :class:`Histories` is copied when it is read, and kept where that is small."""

    def __getitem__(self, name: str) -> Tensor:
        column = super().__getitem__(name)
        if isinstance(column, Histories):
            few, column = len(column) <= _ROWS_AT_HAND, column.tensor()
            if few:
                self[name] = column
        return column

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def values(self) -> Iterator[Tensor]:  # type: ignore[override]
        return (self[name] for name in self)

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)

    def stored(self) -> Iterator[tuple[str, Tensor | Histories]]:
        """The columns as they are."""
        return iter(super().items())


class Rows(Interaction):
    """RecBole's ``Interaction`` whose histories are copied when they are read.

    Some of its rows are ``Rows`` again, and as few as a batch has are a plain ``Interaction``.

    Args:
        columns: a tensor, or histories, for each field.
    """

    def __init__(self, columns: Mapping[str, Tensor | Histories]) -> None:
        self.interaction = _Columns(columns)
        self.length = len(next(iter(columns.values())))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, (int, np.integer)):
            return Interaction({name: values[0] for name, values in self[[int(index)]].interaction.items()})
        rows = Rows({name: column[_tensor(index)] for name, column in self.interaction.stored()})
        return rows if len(rows) > _ROWS_AT_HAND else Interaction(dict(rows.interaction.items()))

    def _reindex(self, index: Any) -> None:
        index = _tensor(index)
        for name, column in list(self.interaction.stored()):
            self.interaction[name] = column[index]


def _tensor(index: Sequence[int] | np.ndarray | Tensor | slice) -> Tensor | slice:
    """An index as torch takes it, without a Python integer for each row where it is an array."""
    if isinstance(index, (Tensor, slice)):
        return index
    return torch.from_numpy(index) if isinstance(index, np.ndarray) else torch.tensor(index, dtype=torch.int64)
