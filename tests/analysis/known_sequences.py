"""Interactions written down by hand."""

from __future__ import annotations

import numpy as np

from recbole_llm.analysis.dataset import Sequences


def sequences_of(*sequences: list[int], times: list[list[float]] | None = None) -> Sequences:
    users = np.repeat(np.arange(1, len(sequences) + 1), list(map(len, sequences)))
    items = np.concatenate(sequences).astype(np.int64)
    clock = np.concatenate(times) if times else np.arange(len(items), dtype=float)
    tokens = np.array(["[PAD]", *(f"u{number}" for number in range(1, len(sequences) + 1))])
    return Sequences(users, items, clock, tokens, int(items.max()) + 1, "fingerprint")
