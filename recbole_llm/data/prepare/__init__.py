"""Making datasets: public sources, your own tables, and generated data whose order is known.

``write_atomic`` and ``generate_chain`` need nothing beyond the library; the rest reads large files with polars, which
``pip install 'recbole-llm[prepare]'`` brings.
"""

from __future__ import annotations

from typing import Any

from recbole_llm.data.prepare.chain import generate_chain, write_atomic
from recbole_llm.data.prepare.needs import require_polars

__all__ = ["from_frame", "generate_chain", "write_atomic"]


def __getattr__(name: str) -> Any:
    if name == "from_frame":
        require_polars()
        from recbole_llm.data.prepare.frame import from_frame

        return from_frame
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
