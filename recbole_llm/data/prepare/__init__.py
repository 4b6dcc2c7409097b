"""Making datasets: public sources, your own tables, and generated data whose order is known.

What reads large files does so with polars, which is imported when it is needed.
"""

from __future__ import annotations

from typing import Any

from recbole_llm.data.prepare.chain import generate_chain, write_atomic

__all__ = ["from_frame", "generate_chain", "write_atomic"]


def __getattr__(name: str) -> Any:
    if name == "from_frame":
        from recbole_llm.data.prepare.frame import from_frame

        return from_frame
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
