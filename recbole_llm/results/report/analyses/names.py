"""What the sections of analyses share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.results.report.parts import Cell, number


def name_of(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """A model's name, with dataset and seed where the results differ in these."""
    extra = [str(result[key]) for key in ("dataset",) if len({str(other.get(key)) for other in results}) > 1]
    extra += [f"seed {result['seed']}"] if len({other.get("seed") for other in results}) > 1 else []
    return " · ".join([str(result["model"]), *extra])


def share(value: float | None, signed: bool = False) -> Cell:
    """A share as a percentage with one decimal."""
    if value is None or not math.isfinite(value):
        return Cell("-", None)
    shown = round(100 * value, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return number(value, f"{shown:+.1f} %" if signed else f"{shown:.1f} %")


def bounds_of(interval: Sequence[float] | None) -> Cell:
    """An interval of shares, sorted by its lower end."""
    if not interval:
        return Cell("-", None)
    return number(interval[0], f"[{share(interval[0], signed=True).text}, {share(interval[1], signed=True).text}]")


def amount(value: float | None, places: int = 1) -> Cell:
    """A number with separators of thousands and a few decimals; whole ones without."""
    if value is None or not math.isfinite(value):
        return Cell("-", None)
    return number(value, f"{value:,.{places}f}" if value % 1 else f"{value:,.0f}")
