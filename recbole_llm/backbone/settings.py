"""Settings of the LLM: which one, how much of it, in which type, and what of it is trained."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.errors import UserError, closest

logger = logging.getLogger(__name__)

# Built-in name -> Hugging Face id; None: we know where to get it (SmolLM2) or how to make it (tiny).
BUILT_IN: dict[str, str | None] = {
    "smollm2-135m": None,
    "tiny": None,
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- Settings


@dataclass(frozen=True)
class BackboneSettings:
    backbone: str
    revision: str | None
    layers: int | None
    dtype: str
    quantization: str | None
    tuning: str
    attn_implementation: str
    device: torch.device
    seed: int
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: list[str] | str | None
    merge_adapter: bool


def read_settings(settings: Any) -> BackboneSettings:
    """Read the keys of a mapping, or of a RecBole Config, in which a missing key is None."""

    def get(key: str, default: Any) -> Any:
        try:
            value = settings[key]
        except KeyError:
            value = None
        return default if value is None else value

    def choice(key: str, *choices: str) -> str:
        value = get(key, choices[0])
        if value not in choices:
            near = closest(value, choices)
            raise UserError(
                f"{key} must be one of {', '.join(choices)}, not {value!r}{f'; did you mean {near}' if near else ''}."
            )
        return value

    def number(key: str, default: float, fits: Callable[[Any], bool], what: str) -> Any:
        value = get(key, default)
        kinds = int if isinstance(default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
            raise UserError(f"{key} must be {what}, not {value!r}.")
        return value

    backbone = get("backbone", None)
    if not isinstance(backbone, (str, os.PathLike)) or not str(backbone):
        raise UserError(f"backbone must name an LLM ({what_backbone_may_be()}), not {backbone!r}.")
    layers = get("backbone_layers", None)
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
        raise UserError(
            f"backbone_layers must be a whole number from 1 to the LLM's number of layers, or None, not {layers!r}."
        )
    modules = get("lora_target_modules", None)
    if modules is not None and (not modules or not isinstance(modules, (str, list, tuple))):
        raise UserError(f"lora_target_modules must be a list of module names, all-linear or None, not {modules!r}.")
    if isinstance(modules, str) and modules != "all-linear":
        modules = [modules]  # a name, which peft would take for a regular expression
    quantization = get("backbone_quantization", None)
    wanted = BackboneSettings(
        backbone=str(backbone),
        revision=get("backbone_revision", None),
        layers=layers,
        dtype=choice("backbone_dtype", "auto", *_DTYPES),
        quantization=None if quantization is None else choice("backbone_quantization", "4bit", "8bit"),
        # ST2SI's ilp trains its item head: to the LLM it is frozen.
        tuning="frozen" if get("tuning", None) == "ilp" else choice("tuning", "frozen", "lora", "full"),
        attn_implementation=choice("attn_implementation", "auto", "eager", "sdpa", "flash_attention_2"),
        device=torch.device(get("device", "cuda" if torch.cuda.is_available() else "cpu")),
        seed=get("seed", 0),
        lora_r=number("lora_r", 8, lambda value: value > 0, "a whole number above 0"),
        lora_alpha=number("lora_alpha", 16.0, lambda value: value > 0, "a number above 0"),
        lora_dropout=number("lora_dropout", 0.05, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
        lora_target_modules=list(modules) if isinstance(modules, tuple) else modules,
        merge_adapter=bool(get("merge_adapter", False)),
    )
    _check_quantization(wanted)
    if wanted.merge_adapter and wanted.tuning != "lora":
        raise UserError(f"merge_adapter: there are no LoRA matrices under tuning: {wanted.tuning}; set merge_adapter to False.")
    if wanted.merge_adapter and wanted.quantization is not None:
        raise UserError(
            f"merge_adapter: LoRA matrices would be rounded away in the weights of backbone_quantization: "
            f"{wanted.quantization}; set merge_adapter to False."
        )
    return wanted


def _check_quantization(wanted: BackboneSettings) -> None:
    """Say before any weight is read what quantisation lacks."""
    if wanted.quantization is None:
        return
    key = f"backbone_quantization: {wanted.quantization}"
    if wanted.tuning == "full":
        raise UserError(f"{key} leaves weights that cannot be trained, as tuning: full would; use tuning: lora.")
    if wanted.backbone == "tiny" or wanted.backbone.lower().endswith(".gguf"):
        raise UserError(
            f"{key} cannot be made of {wanted.backbone}; give a Hugging Face id or a folder of safetensors, or leave "
            f"backbone_quantization None."
        )
    if wanted.device.type != "cuda":
        raise UserError(f"{key} needs a CUDA GPU, and this run is on {wanted.device.type}; set backbone_quantization to None.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs the bitsandbytes package: pip install recbole-llm[quantization]")


def what_backbone_may_be() -> str:
    return f"{', '.join(BUILT_IN)}, a Hugging Face id such as meta-llama/Llama-3.2-1B, a local folder or a .gguf file"


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; where it has none, torch emulates them slowly."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    # SVE's and NEON's bf16 are left out: whether they are faster has not been measured.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolved_dtype(wanted: BackboneSettings) -> torch.dtype:
    if wanted.dtype != "auto":
        if wanted.dtype == "float16" and wanted.device.type == "cpu":
            logger.warning("backbone_dtype: float16 is many times slower than float32 on a CPU; auto chooses better.")
        return _DTYPES[wanted.dtype]
    # Small steps of full training are lost in bfloat16's 8 bits; the random test model is for exact comparisons.
    exact = wanted.tuning == "full" or wanted.backbone == "tiny"
    return torch.bfloat16 if not exact and _computes_in_bfloat16(wanted.device) else torch.float32
