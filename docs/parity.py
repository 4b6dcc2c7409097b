"""Compare ours with the figures of the models' public code: python docs/parity.py writes docs/parity.md."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "tests" / "parity"
PAGE = ROOT / "docs" / "parity.md"
OPENING = """# Parity with public code

The same inputs were given to the models' public code and to ours: a Llama of two layers and 16 dimensions, 110 items, three
histories, a teacher, and weights that are a hash of their places. Theirs ran in float64, ours of whole models in float32. A
text is a whole prompt. `python docs/parity.py` writes this page; `tests/parity/README.md` says how the figures were made,
and the tests beside it hold ours to them.

LLM-STAR and RSLLM have no public code. CoLLM's own code learns by the binary cross-entropy of its answer *Yes*, a form that
CoLLM does not have here. TALLRec's own code learns the prompt's tokens as well; what is compared is the answer.
"""


def table(group: dict[str, Any], made: dict[str, Any]) -> str:
    """The rows of a group, side by side."""
    rows = [
        f"## {group['group']}",
        "",
        f"{group['repository']}, `{group['commit'][:12]}`: {group['functions']}",
        "",
        "| quantity | public code | ours | difference |",
        "|---|---|---|---|",
    ]
    for quantity, value in group["figures"].items():
        if isinstance(value, str):
            reason = group.get("differs", {}).get(quantity)
            same = "the same" if made[quantity] == value else "another"
            rows.append(f"| {quantity} | text | {same} | {reason or 'none'} |")
        else:
            rows.append(f"| {quantity} | {value:.7g} | {made[quantity]:.7g} | {abs(made[quantity] - value):.1g} |")
    return "\n".join(rows) + "\n"


def write() -> None:
    """Compute ours and write the page."""
    sys.path.insert(0, str(PARITY))
    import ours

    groups = json.loads((PARITY / "figures.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        place = ours.Place(Path(folder))
        parts = [table(group, ours.OURS[group["group"]](place, group.get("candidates"))) for group in groups]
    PAGE.write_text(OPENING + "\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    write()
