"""Hidden states of a frozen LLM for fixed prompts, computed once and stored on disk.

A file holds the states of one list of prompts. Its name holds a digest of everything that the states depend on: the LLM, the
vectors that go into the prompts, the data, and the token ids. A later run with the same inputs finds it; other inputs give
another file. It is memory-mapped, so that it may be larger than the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recbole_llm.files import replace_file
from recbole_llm.lock import held
from recbole_llm.processes import group as processes
from recbole_llm.prompt.batch import PromptBatch

ROWS_AT_ONCE = 512


class StoredStates:
    """The hidden states at the out tokens of a list of prompts.

    Args:
        place: folder and beginning of the name of the file.
        identity: everything that the states depend on beside the prompts.
        encode: prompts to the states at their out tokens, prompt by prompt, float32 ``[P, width]``.
        width: of a state.
        build: makes the prompts of rows int64 ``[n]``.
        rows: number of prompts.

    Attributes:
        file: the file of the states, a NumPy array float32 ``[all out tokens, width]``.
        reads: number of states of each prompt, int64 ``[rows]``.
    """

    def __init__(
        self,
        place: Path,
        identity: bytes,
        encode: Callable[[PromptBatch], Tensor],
        width: int,
        build: Callable[[np.ndarray], PromptBatch],
        rows: int,
    ) -> None:
        digest, reads = hashlib.sha256(identity), []
        for part in _parts(rows):
            batch = build(part)
            for values in (batch.tokens, batch.offsets, batch.out_positions):
                digest.update(values.tobytes())
            reads.append(batch.is_read.sum(axis=1))
        self.reads = np.concatenate(reads)
        self._starts = np.r_[0, np.cumsum(self.reads)]
        self._row_of: dict[bytes, int] = {}
        self.file = place.with_name(f"{place.name}-{digest.hexdigest()[:16]}.npy")
        if processes.decide(not self.file.is_file()):
            getLogger().info(f"Hidden states of {rows:,} prompts: computing them once; they will be stored in {self.file}")
            self.file.parent.mkdir(parents=True, exist_ok=True)

            def write(temporary: Path) -> None:
                # Written, not mapped: a full disk is an error of a write, and ends a process that has mapped the file.
                with open(temporary, "wb") as file:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (int(self._starts[-1]), width)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in _parts(rows):
                        file.write(encode(build(part)).cpu().numpy().astype("<f4", copy=False).tobytes())

            with processes.main_only(held(self.file)):
                if processes.decide(not self.file.is_file()):  # else another run was faster
                    if processes.is_main():
                        replace_file(self.file, write)
                    else:  # takes its share of the work
                        for part in _parts(rows):
                            encode(build(part))
            processes.decide()  # the file is there
        self._values = np.load(self.file, mmap_mode="r", allow_pickle=False)

    def name_rows(self, history: np.ndarray, lengths: np.ndarray) -> None:
        """Make the rows known to :meth:`rows_of` by their histories, item ids int64 ``[rows, L]``, right padded."""
        self._row_of = {key: row for row, key in enumerate(_names(history, lengths))}

    def rows_of(self, history: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The row of each history, -1 for one that is not among the prompts: int64 ``[n]``."""
        names = _names(history, lengths)
        return np.fromiter((self._row_of.get(name, -1) for name in names), dtype=np.int64, count=len(lengths))

    def states(self, rows: np.ndarray) -> Tensor:
        """The states of rows int64 ``[n]``, prompt by prompt: float32 ``[sum of their reads, width]``."""
        reads = self.reads[rows]
        ends = np.cumsum(reads)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[rows] - (ends - reads), reads)
        return torch.from_numpy(self._values[places])


def _parts(rows: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + ROWS_AT_ONCE, rows)) for start in range(0, rows, ROWS_AT_ONCE))


def _names(history: np.ndarray, lengths: np.ndarray) -> Iterator[bytes]:
    """A short hash of each history: the histories themselves would take more memory than the index of the states."""
    return (
        hashlib.blake2b(items[:length].astype(np.int64).tobytes(), digest_size=16).digest()
        for items, length in zip(history, lengths.tolist(), strict=True)
    )
