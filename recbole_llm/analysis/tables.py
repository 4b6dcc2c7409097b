"""Plain-text tables of analyses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def format_columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out cells in columns; the first ``left`` columns are aligned on the left, the others on the right."""
    widths = [max(len(str(line[column])) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            str(cell).ljust(width) if place < left else str(cell).rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "-" * len(line(header)), *map(line, rows)])


def decimal(value: float | None, places: int = 4) -> str:
    """A number without its leading zero, ``.3123``; ``-`` where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value + 0.0:.{places}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{places}f}"


def percent(value: float | None, signed: bool = True) -> str:
    """A share as a percentage with one decimal; ``-`` where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    shown = round(100 * value, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{shown:+.1f} %" if signed else f"{shown:.1f} %"


def p_value(value: float | None) -> str:
    """A p value with three decimals."""
    return "-" if value is None else "<.001" if value < 0.001 else decimal(value, 3)


def plain(value: Any) -> Any:
    """A value for JSON: NumPy's numbers as Python's, and None for what is no finite number."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
