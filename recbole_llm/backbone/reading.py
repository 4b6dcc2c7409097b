"""Reading a causal LLM and its tokenizer from a folder of safetensors, or from a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recbole_llm.backbone.settings import BackboneSettings
from recbole_llm.errors import UserError, first_line

# What reading a damaged, foreign or incomplete model raises. Not RuntimeError, by which torch also runs out of memory.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError, struct.error),
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no report on the layers that we leave out."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def fingerprint(path: Path) -> str:
    """Sha256 over name, size and first MB of each file of a model: tells models apart without reading gigabytes."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def read_model(
    folder: Path, gguf_file: str | None, wanted: BackboneSettings, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """Read a causal LM, its first layers only where fewer are wanted, from local files alone.

    Returns:
        the model and its attention kernel.
    """
    name = wanted.backbone
    if gguf_file is None:
        _check_folder(folder, name)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
        check_gguf_package()
    try:
        config = AutoConfig.from_pretrained(folder, **source)
    except UNREADABLE as error:
        raise UserError(f"backbone: the configuration of {name} cannot be read: {first_line(error)}.") from None
    if wanted.layers is not None:
        keep_layers(config, wanted.layers, name)
    if gguf_file is None:
        source["use_safetensors"] = True
        weights = getattr(config, "transformers_weights", None)
        if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(f"backbone: {name} names {weights} as its weights; only safetensors are read.")
    elif hasattr(transformers, "GgufConfig"):
        # Else a newer transformers may keep the weights packed, for kernels that it fetches from the hub.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if wanted.quantization is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"backbone_quantization: {name} is quantised already; set backbone_quantization to None.")
        source["quantization_config"] = _quantization_config(wanted.quantization, dtype)
        source["device_map"] = {"": wanted.device}  # quantised where it will stay, layer by layer

    kernels = ("sdpa", "eager") if wanted.attn_implementation == "auto" else (wanted.attn_implementation,)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        # Gemma 2: older versions of transformers run it with sdpa, which silently leaves out the capping of its scores.
        if wanted.attn_implementation == "sdpa":
            raise UserError(f"attn_implementation: {name} caps its attention scores, which sdpa cannot; use auto.")
        kernels = tuple(kernel for kernel in kernels if kernel != "sdpa")
    for kernel in kernels:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=kernel, output_loading_info=True, **source
            )
            break
        except UNREADABLE as error:
            # A kernel that the architecture lacks is refused before any weight is read, also with a ValueError.
            if kernel != kernels[-1]:
                continue
            if wanted.attn_implementation != "auto" and _is_about_attention(error):
                raise UserError(
                    f"attn_implementation: {name} has no {kernel} ({first_line(error)}); use auto."
                ) from None
            raise UserError(f"backbone: {name} cannot be loaded: {first_line(error)}.") from None
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise UserError(f"backbone: the weights of {name} do not fit its config.json.") from None
    head = model.get_output_embeddings()
    # Representations need no output head: a checkpoint of the bare decoder is as good. Writing titles does need one.
    of_head = {key for key, module in model.named_modules() if module is head}
    missing = sorted(key for key in report["missing_keys"] if key.rpartition(".")[0] not in of_head)
    if missing:
        raise UserError(
            f"backbone: {name} lacks {len(missing)} of its weights, {missing[0]} for one; its files are incomplete."
        )
    model.lacks_output_head = bool(report["missing_keys"])
    return model, kernel


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What bitsandbytes is to make of the weights, for transformers.

    4bit: NF4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314), computing in ``dtype``; 8bit: LLM.int8 (Dettmers et
    al., 2022, https://arxiv.org/abs/2208.07339).
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_about_attention(error: BaseException) -> bool:
    return "attention" in str(error).lower() or "flash" in str(error).lower()


def _check_folder(folder: Path, name: str) -> None:
    """Say what a folder lacks, before transformers looks elsewhere for it."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = "holds an adapter only; merge it into its model first" if adapter else "has no config.json"
        raise UserError(f"backbone: the folder {name} {why}.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"backbone: the folder {name} holds an adapter beside its model; merge the adapter into the model first."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = (
            "has its weights pickled, which can run code when they are read; save them as safetensors "
            "(save_pretrained does) first"
            if pickled
            else "has no weights (*.safetensors)"
        )
        raise UserError(f"backbone: the folder {name} {why}.")


def check_gguf_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("backbone: reading a GGUF file needs the package gguf; pip install gguf.")


def read_tokenizer(folder: Path, gguf_file: str | None, name: str) -> PreTrainedTokenizerBase:
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **source)
    except UNREADABLE as error:
        raise UserError(f"backbone: {name} has no tokenizer that can be read: {first_line(error)}.") from None
    if not tokenizer.is_fast:
        raise UserError(f"backbone: {name} has no fast tokenizer (tokenizer.json), which is needed.")
    return tokenizer


def keep_layers(config: PreTrainedConfig, layers: int, name: str) -> None:
    """Let a configuration ask for its first layers only; the final norm stays."""
    config = config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    if layers > total:
        raise UserError(f"backbone_layers must be from 1 to {total} for {name}, not {layers}.")
    config.num_hidden_layers = layers
    for key, value in list(vars(config).items()):
        # layer_types and its like: one entry for each layer.
        if isinstance(value, (list, tuple)) and len(value) == total and not key.endswith("_token_id"):
            setattr(config, key, value[:layers])
