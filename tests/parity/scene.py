"""The inputs that the public code and ours are given: a tiny LLM, items, histories, weights that need no generator."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

ITEMS, TEACHER_SIZE, HIDDEN = 110, 64, 16
TITLES = ["", *(f"Film {item}" for item in range(1, ITEMS + 1))]
# Each user's items; the last but two is the target of the training, those before it are the history.
SEQUENCES = [[3, 14, 15, 92, 65, 7, 8], [27, 18, 28, 9, 10], [31, 41, 59, 26, 53, 58, 11, 12]]
DAY = 86400
BRAND = "Acme"


def histories() -> list[list[int]]:
    return [sequence[:-3] for sequence in SEQUENCES]


def targets() -> list[int]:
    return [sequence[-3] for sequence in SEQUENCES]


def time_of(user: int, place: int) -> int:
    """Seconds since 1970 at which a user (from 0) took the item at a place of the sequence."""
    return DAY * (18262 + 40 * user + 3 * place)


def rating_of(user: int, place: int) -> int:
    """1 or 5: whether the user liked the item at a place of the sequence."""
    return 5 if (user + place) % 3 else 1


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers between -1 and 1 without a pattern: a hash of their places."""
    places = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(1_000_003 * (seed + 1))
    for factor in (2654435761, 2246822519, 3266489917):
        places = (places ^ (places >> np.uint64(15))) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    places ^= places >> np.uint64(16)
    return torch.from_numpy(places / 2**31 - 1).reshape(shape)


def waves(*shape: int, seed: int = 0) -> torch.Tensor:
    """The sine of a counter."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + seed).reshape(shape)


@torch.no_grad()
def fill(parameters, seed: int) -> None:
    """Give parameters (name, tensor), in this order, their values: matrices by their width, vectors small, scales near 1."""
    for number, (name, parameter) in enumerate(parameters):
        values = weights(*parameter.shape, seed=seed + number)
        if parameter.dim() == 1:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            values = values * 1.7 / parameter.shape[-1] ** 0.5
        parameter.copy_(values)


def fill_module(module: nn.Module, seed: int) -> None:
    fill(module.named_parameters(), seed)


def fill_lora(module: nn.Module) -> None:
    fill([(name, values) for name, values in module.named_parameters() if "lora_" in name], 900)


def item_vectors() -> torch.Tensor:
    """The teacher's item vectors, row 0 of the padding."""
    return weights(ITEMS + 1, TEACHER_SIZE, seed=71)


def user_states() -> torch.Tensor:
    """The teacher's user representations."""
    return weights(len(SEQUENCES), TEACHER_SIZE, seed=72)


def out_vector(kind: str) -> torch.Tensor:
    return weights(1, HIDDEN, seed={"user": 81, "item": 82}[kind])


def make_llm():
    """A Llama of two layers, and a tokenizer of single bytes that puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = LlamaConfig(
        vocab_size=len(pieces), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    llm = LlamaForCausalLM(config)
    fill_module(llm, 100)
    return llm, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_data(folder: Path) -> None:
    """The data set ``parity`` as atomic files, a title for each item."""
    place = folder / "parity"
    place.mkdir()
    rows = ["user_id:token\titem_id:token\ttimestamp:float\trating:float"]
    for user, sequence in enumerate(SEQUENCES):
        rows += [f"{user + 1}\t{item}\t{time_of(user, at)}\t{rating_of(user, at)}" for at, item in enumerate(sequence)]
    # One more user, who has every item and is not looked at: RecBole keeps items that someone has.
    rows += [f"{len(SEQUENCES) + 1}\t{item}\t{time_of(9, item)}\t5" for item in range(1, ITEMS + 1)]
    (place / "parity.inter").write_text("\n".join(rows) + "\n")
    items = ["item_id:token\ttitle:token_seq\tbrand:token_seq"]
    items += [f"{item}\t{TITLES[item]}\t{BRAND}" for item in range(1, ITEMS + 1)]
    (place / "parity.item").write_text("\n".join(items) + "\n")


def letters() -> list[str]:
    """What each token of the tokenizer stands for, as far as it is ASCII."""
    from tokenizers import pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["", "", "", *({"Ġ": " ", "Ċ": "\n"}.get(piece, piece) for piece in pieces)]
