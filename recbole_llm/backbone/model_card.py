"""The model card (README.md) of an adapter or a merged LLM, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recbole_llm._version import __version__
from recbole_llm.backbone.backbone import Backbone

_LOAD = {
    "adapter": (
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THIS_FOLDER")'
    ),
    "merged": (
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THIS_FOLDER")'
    ),
}


def model_card(backbone: Backbone, kind: str, record: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        backbone: the LLM.
        kind: ``adapter`` or ``merged``.
        record: of the run: ``model``, ``dataset``, ``seed``, and ``best_valid_result`` where there is one.

    Returns:
        Markdown, its metadata in front. Names and figures are quoted as JSON: they are not read as Markdown or YAML.
    """
    base = backbone.source.place or backbone.identity["name"]
    what = "LoRA adapter" if kind == "adapter" else "LLM with its LoRA matrices merged"
    library = "peft" if kind == "adapter" else "transformers"
    figures = {name: round(value, 4) for name, value in (record.get("best_valid_result") or {}).items()}
    text = f"""---
base_model: {json.dumps(base)}
library_name: {library}
pipeline_tag: text-generation
tags: [recommendation, sequential-recommendation, recbole-llm, lora]
---

# {what} of `{record["model"]}`

Trained by recbole-llm {__version__} on the dataset `{json.dumps(record["dataset"])[1:-1]}`, seed {record["seed"]}. Base model:
`{base}`, {backbone.layers} layers of it.

This is the LLM alone. What makes a recommender of it (projections, heads, out tokens, item vectors) lies in `model.safetensors`
of the run's folder, which `recbole_llm.load` reads.

```python
{_LOAD[kind]}
```
"""
    whole = backbone.source.layers or backbone.layers
    if kind == "adapter" and whole != backbone.layers:
        text += f"\nThe base model has {whole} layers; cut it to the first {backbone.layers} before the adapter is put on.\n"
    if figures:
        text += f"\nBest validation: `{json.dumps(figures)}`.\n"
    return text
