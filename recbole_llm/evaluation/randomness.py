"""Random numbers by row: functions of a seed and the row's name, of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

# Working arrays hold at most this many elements at a time (32 MB of int64), whatever the size of the split.
CHUNK_ELEMENTS = 2**22



def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers: the output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def absorb(state: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Mix the integers ``part`` into the keys ``state`` (arrays that broadcast against each other).

    With ``part`` = 0, 1, 2, ... this is the SplitMix64 stream that starts at ``state``.
    """
    # At least one dimension: NumPy warns of the wanted overflow for scalars, and only for them.
    part = np.atleast_1d(np.asarray(part)).astype(np.uint64)
    return _mix(np.atleast_1d(state) + (part + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def row_key(purpose: str, seed: int, *parts: np.ndarray) -> np.ndarray:
    """Return uint64 keys that depend on the purpose, the seed and the integers in ``parts``, and on nothing else.

    This and not ``numpy.random.Generator``, because its streams may change with NumPy's version, and because 100,000
    rows need 100,000 independent streams at once.
    """
    start = hashlib.blake2b(f"{purpose}\0{int(seed)}".encode(), digest_size=8).digest()
    state = np.array([int.from_bytes(start, "little")], dtype=np.uint64)
    for part in parts:
        state = absorb(state, part)
    return state


def uniform(bits: np.ndarray) -> np.ndarray:
    """Map uint64 to float64, uniform in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
