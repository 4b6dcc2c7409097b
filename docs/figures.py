"""Draw the results' picture from the raw figures: python docs/figures.py writes docs/img/retrieval.svg."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "retrieval.json"
PICTURE = ROOT / "docs" / "img" / "retrieval.svg"

METRIC, CHANCE = "hit@10", 0.10  # ten of 100 candidates
LABELS, BAR, SCALE_TO, BAR_HEIGHT, ROW = 250, 420, 0.8, 18, 26  # pixels, but for SCALE_TO
COLORS = {"SASRec": "#9e9e9e", "LLM-SRec": "#7986cb", "LLM-STAR": "#303f9f"}


def draw() -> str:
    """The picture as SVG: a bar for each model on each dataset, and the level of chance."""
    parts, y = [], 34.0
    for table in json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]:
        layers = f"{table['settings']['backbone_layers']} of 30 layers, {table['settings']['epochs']} epochs"
        parts.append(f'<text class="title" x="12" y="{y:.0f}">{table["dataset"]}, HR@10 ({layers})</text>')
        y += 14
        top = y
        for row in table["rows"]:
            value = row["metrics"][METRIC]
            length = value / SCALE_TO * BAR
            color = COLORS[row["model"].split(",")[0]]
            opacity = 0.55 if "," in row["model"] else 1
            label = row["model"] + (" (the teacher)" if row["model"] == "SASRec" else "")
            parts += [
                f'<text class="label" x="{LABELS - 8}" y="{y + 14:.0f}">{label}</text>',
                f'<rect x="{LABELS}" y="{y:.0f}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{color}" '
                f'fill-opacity="{opacity}"/>',
                f'<text x="{LABELS + length + 6:.1f}" y="{y + 14:.0f}">{f"{value:.4f}"[1:]}</text>',
            ]
            y += ROW
        chance = LABELS + CHANCE / SCALE_TO * BAR
        parts += [
            f'<path d="M{chance:.1f},{top - 3:.0f} V{y - 4:.0f}"/>',
            f'<text class="small" x="{chance + 4:.1f}" y="{y + 8:.0f}">chance: .10</text>',
        ]
        y += 46
    width, height = LABELS + BAR + 80, y - 24
    style = (
        "text{font:13px sans-serif;fill:#1a1a1a}.title{font-weight:bold}.label{text-anchor:end}.small{font-size:11px}"
        "path{stroke:#c62828;stroke-dasharray:4 3}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" '
            f'aria-label="HR@10 of SASRec, LLM-SRec and LLM-STAR on two datasets">',
            f"<style>{style}</style>",
            f'<rect width="{width}" height="{height:.0f}" fill="#fff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)
