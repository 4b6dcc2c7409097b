"""Reading a causal LLM and its tokenizer from a folder of safetensors, or from a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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

# What reading a damaged, foreign or incomplete model raises. Not RuntimeError: torch raises it when out of memory, too.
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError, struct.error),
)
# Files of a model that are read: weights, configurations, tokenizer.
MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars, and reports on the layers that are left out."""
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


def model_digest(path: Path, subfolders: bool = False) -> str:
    """Sha256 over all bytes of a model: of each file in its folder that can be read as a part of it, or of its one file.

    Args:
        path: a folder, or a file.
        subfolders: whether files in subfolders are parts of the model.
    """
    if path.is_file():
        files = [path]
    else:
        found = path.rglob("*") if subfolders else path.glob("*")
        files = sorted(file for file in found if file.suffix in MODEL_FILES and file.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else file.name
        status = file.stat()
        digest.update(f"{name} {_file_digest(file, status.st_size, status.st_mtime_ns, status.st_ino)}\n".encode())
    return digest.hexdigest()


@cache  # gigabytes are read once per process
def _file_digest(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_weight_files(folder: Path, key: str, name: str) -> None:
    """Refuse a model whose weights are not all safetensors in its folder, before anything is loaded.

    Args:
        folder: of the model.
        key, name: the setting that names it, and its value; for messages.

    Raises:
        UserError: no safetensors, or an index that names anything else.
    """
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = (
            "has its weights pickled, which can run code when they are read; save them as safetensors "
            "(save_pretrained does) first"
            if pickled
            else "has no weights (*.safetensors)"
        )
        raise UserError(f"{key}: the folder {name} {why}.")
    check_weight_indexes(folder, key, name)


def check_weight_indexes(folder: Path, key: str, name: str) -> None:
    """Refuse an index of weights that names anything but safetensors in its folder; see :func:`check_weight_files`."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{key}: {index.name} of {name} cannot be read: {first_line(error)}.") from None
        for file in sorted(files, key=str):
            _check_weight_file(file, (".safetensors",), f"{key}: {index.name} of {name}")


def check_named_weights(config: PreTrainedConfig, key: str, name: str) -> None:
    """Refuse a configuration that names other weights than safetensors in its folder; see :func:`check_weight_files`."""
    weights = getattr(config, "transformers_weights", None)
    if weights is not None:
        _check_weight_file(weights, (".safetensors", ".safetensors.index.json"), f"{key}: config.json of {name}")


def _check_weight_file(file: Any, endings: tuple[str, ...], place: str) -> None:
    if not isinstance(file, str) or not file.endswith(endings):
        raise UserError(f"{place} names {file} as its weights; only safetensors are read.")
    if Path(file).name != file or "\\" in file:
        raise UserError(f"{place} names {file} as its weights, which is not in the folder; only files in it are read.")


def read_config(folder: Path, gguf_file: str | None, name: str) -> PreTrainedConfig:
    """Read the configuration of a causal LM, from local files only.

    Raises:
        UserError: it cannot be read.
    """
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is None:
        _check_folder(folder, name)
    else:
        source["gguf_file"] = gguf_file
        check_gguf_package()
    try:
        return AutoConfig.from_pretrained(folder, **source)
    except UNREADABLE as error:
        raise UserError(f"backbone: the configuration of {name} cannot be read: {first_line(error)}.") from None


def read_model(
    folder: Path, gguf_file: str | None, settings: BackboneSettings, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """Read a causal LM, or its first layers, from local files only.

    Returns:
        the model and its attention kernel.
    """
    name = settings.backbone
    config = read_config(folder, gguf_file, name)
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
    if settings.layers is not None:
        keep_layers(config, settings.layers, name)
    if gguf_file is None:
        source["use_safetensors"] = True
        check_named_weights(config, "backbone", name)
    elif hasattr(transformers, "GgufConfig"):
        # Else a newer transformers may keep the weights packed, for kernels that it fetches from the hub.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if settings.quantization is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"backbone_quantization: {name} is quantized already; set backbone_quantization to None.")
        source["quantization_config"] = _quantization_config(settings.quantization, dtype)
        source["device_map"] = {"": settings.device}  # quantized on its own device, layer by layer

    kernels = ("sdpa", "eager") if settings.attn_implementation == "auto" else (settings.attn_implementation,)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        # Gemma 2: older versions of transformers run it with sdpa, which silently omits the capping of its scores.
        if settings.attn_implementation == "sdpa":
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
            if settings.attn_implementation != "auto" and _is_about_attention(error):
                raise UserError(
                    f"attn_implementation: {name} has no {kernel} ({first_line(error)}); use auto."
                ) from None
            raise UserError(f"backbone: {name} cannot be loaded: {first_line(error)}.") from None
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise UserError(f"backbone: the weights of {name} do not fit its config.json.") from None
    head = model.get_output_embeddings()
    # Representations need no output head: a checkpoint of the decoder alone is enough. Generation needs one.
    of_head = {key for key, module in model.named_modules() if module is head}
    missing = sorted(key for key in report["missing_keys"] if key.rpartition(".")[0] not in of_head)
    if missing:
        raise UserError(
            f"backbone: {name} lacks {len(missing)} of its weights, {missing[0]} for one; its files are incomplete."
        )
    model.lacks_output_head = bool(report["missing_keys"])
    return model, kernel


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How bitsandbytes quantizes the weights, for transformers.

    4bit: NF4 (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314), computing in ``dtype``; 8bit: LLM.int8 (Dettmers et
    al., 2022, https://arxiv.org/abs/2208.07339).
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_about_attention(error: BaseException) -> bool:
    return "attention" in str(error).lower() or "flash" in str(error).lower()


def _check_folder(folder: Path, name: str) -> None:
    """Report what a folder lacks, before transformers looks elsewhere for it."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = "holds an adapter only; merge it into its model first" if adapter else "has no config.json"
        raise UserError(f"backbone: the folder {name} {why}.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"backbone: the folder {name} holds an adapter beside its model; merge the adapter into the model first."
        )
    check_weight_files(folder, "backbone", name)


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
    """Reduce a configuration to its first layers; the final norm stays."""
    config = config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    if layers > total:
        raise UserError(f"backbone_layers must be from 1 to {total} for {name}, not {layers}.")
    config.num_hidden_layers = layers
    for key, value in list(vars(config).items()):
        # Lists with an entry for each layer, such as layer_types.
        if isinstance(value, (list, tuple)) and len(value) == total and not key.endswith("_token_id"):
            setattr(config, key, value[:layers])
