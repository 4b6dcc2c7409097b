"""polars is an extra: training and evaluation do without it."""

from __future__ import annotations

import importlib.util

from recbole_llm.errors import UserError


def require_polars() -> None:
    """Raise UserError where polars is not installed."""
    if importlib.util.find_spec("polars") is None:
        raise UserError("making datasets needs polars: pip install 'recbole-llm[prepare]'.")
