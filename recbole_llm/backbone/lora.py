"""LoRA matrices: adding them, saving them in PEFT's format, merging them into the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.reading import quiet_transformers
from recbole_llm.backbone.settings import BackboneSettings
from recbole_llm.errors import UserError, first_line
from recbole_llm.files import written_folder


def add_lora(causal_lm: PreTrainedModel, settings: BackboneSettings) -> dict[str, Any]:
    """Add trainable low-rank matrices (Hu et al., 2022, https://arxiv.org/abs/2106.09685) to the decoder, in place.

    Returns:
        the settings that a checkpoint must match.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    decoder = causal_lm.get_decoder()
    modules = settings.lora_target_modules or KNOWN.get(decoder.config.model_type) or "all-linear"
    identity = {
        "r": settings.lora_r,
        "alpha": settings.lora_alpha,
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
    }
    transposed = any(type(module).__name__ == "Conv1D" for module in decoder.modules())  # GPT-2's linear layers
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules,
        fan_in_fan_out=transposed,
    )
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft reads them from the module that it adapts
        setattr(decoder, flag, getattr(causal_lm, flag, False))
    try:
        inject_adapter_in_model(config, decoder)
        causal_lm.adapter_settings = config  # for adapter_config
    except ValueError as error:
        raise UserError(
            f"lora_target_modules: {modules} does not fit {settings.backbone}: {first_line(error)}."
        ) from None
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return identity


def trained_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The weights that training may have changed, by their names in the LLM without LoRA, LoRA matrices merged."""
    if backbone.identity["tuning"] == "lora":
        return {
            f"{name}.weight": module.base_layer.weight.float() + module.get_delta_weight("default")
            for name, module in backbone.causal_lm.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    return {name: parameter for name, parameter in backbone.causal_lm.named_parameters() if parameter.requires_grad}


def load_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Copy :func:`trained_weights` of an equal LLM into this one, whatever its tuning.

    Raises:
        UserError: weights that this LLM does not have.
    """
    named = {name.replace(".base_layer.", "."): weight for name, weight in backbone.causal_lm.named_parameters()}
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in named or named[name].shape != weight.shape:
                raise UserError(f"backbone: {backbone.identity['name']} has no {name} of shape {tuple(weight.shape)}.")
            named[name].copy_(weight)


def adapter_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The LoRA matrices by their names in a PEFT file; empty where there are none."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": parameter
        for name, parameter in backbone.causal_lm.named_parameters()
        if "lora_" in name
    }


def adapter_config(backbone: Backbone) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json`` for the LoRA matrices, as plain values for JSON.

    A folder with it and :func:`adapter_tensors` is read by PEFT: by ``AutoPeftModelForCausalLM.from_pretrained`` where all
    layers of the LLM were kept, by ``PeftModel.from_pretrained`` over the LLM cut to the same layers where they were not.
    """
    config = backbone.causal_lm.adapter_settings.to_dict()
    modules = config["target_modules"]
    config["target_modules"] = modules if isinstance(modules, str) else sorted(modules)
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    config["base_model_name_or_path"] = backbone.source.place or backbone.identity["name"]
    return json.loads(json.dumps(config, default=str))


@contextmanager
def merged_adapter(backbone: Backbone) -> Iterator[None]:
    """Within the context, LoRA matrices are added to the weights that they adapt, which saves multiplying by them.

    Afterwards the weights are restored bit for bit, from copies in main memory. In bfloat16 the sums are rounded, and so
    are the results. LoRA matrices must not change within the context.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in backbone.causal_lm.modules() if isinstance(module, BaseTunerLayer)]
    originals = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.unmerge()
            layer.get_base_layer().weight.data.copy_(original)  # unmerging subtracts, which leaves rounding errors


def save_merged(backbone: Backbone, folder: Path) -> None:
    """Write the LLM with its LoRA matrices merged, and its tokenizer, as a Hugging Face folder of safetensors.

    The folder may be the ``backbone`` of another run, and ``AutoModelForCausalLM.from_pretrained`` reads it. It holds only
    the layers that were kept. Matrices are added in the type that they were trained beside; the sums are stored in the type in
    which the LLM was published.
    """
    causal_lm = backbone.causal_lm
    head = causal_lm.get_output_embeddings()
    # A head that was drawn at random, since the checkpoint has none, is not saved.
    left_out = set(map(id, head.parameters())) if getattr(causal_lm, "lacks_output_head", False) else set()
    with merged_adapter(backbone), written_folder(folder) as made, quiet_transformers():
        weights = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in causal_lm.state_dict(keep_vars=True).items()
            if "lora_" not in name and id(tensor) not in left_out
        }
        computed = causal_lm.config.dtype
        if backbone.source.dtype is not None:
            weights = {name: _in_type(tensor, backbone.source.dtype) for name, tensor in weights.items()}
            causal_lm.config.dtype = backbone.source.dtype
        try:
            causal_lm.save_pretrained(made, state_dict=weights)
        finally:
            causal_lm.config.dtype = computed
        backbone.tokenizer.save_pretrained(made)


def _in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
