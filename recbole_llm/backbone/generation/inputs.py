"""Inputs of the LLM for generation: checks, input vectors, and the keys and values of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.errors import UserError
from recbole_llm.prompt.batch import PromptBatch


def prefill(
    backbone: Backbone, batch: PromptBatch, group: np.ndarray, vectors: Tensor
) -> tuple[Tensor, DynamicCache, np.ndarray]:
    """Run prompts through the LLM.

    Returns:
        the last hidden state of each, ``[B, hidden_size]``; their keys and values, right padded; their lengths.
    """
    embeddings, lengths = embed(backbone, batch, group, vectors)
    read = to_device(backbone, np.arange(embeddings.shape[1]) == lengths[:, None] - 1)
    positions = torch.arange(embeddings.shape[1], device=backbone.device)[None]
    hidden, cache = backbone(embeddings, positions, use_cache=True, read=read)
    return hidden[read], cache, lengths


def embed(
    backbone: Backbone,
    batch: PromptBatch,
    group: np.ndarray,
    vectors: Tensor,
    tails: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Input vectors of prompts, each followed by its tail, right padded ``[B, longest, input_size]``; their lengths."""
    tails = [()] * len(group) if tails is None else tails
    lengths = batch.lengths[group] + np.array([len(tail) for tail in tails], dtype=np.int64)
    tokens = np.zeros((len(group), int(lengths.max())), dtype=np.int64)
    which = np.full(tokens.shape, -1, dtype=np.int64)
    for row, (prompt, tail) in enumerate(zip(group, tails, strict=True)):
        here = slice(batch.offsets[prompt], batch.offsets[prompt + 1])
        end = here.stop - here.start
        tokens[row, :end], which[row, :end] = batch.tokens[here], batch.vector_index[here]
        tokens[row, end : lengths[row]] = tail
    embeddings = backbone.embedding(to_device(backbone, tokens.clip(min=0))).to(backbone.dtype)
    slots = np.nonzero(which >= 0)
    if len(slots[0]):
        places = tuple(to_device(backbone, index) for index in slots)
        embeddings = embeddings.index_put(places, vectors[to_device(backbone, which[slots])])
    return embeddings, lengths


def check_inputs(backbone: Backbone, batch: PromptBatch, vectors: Tensor, answer_tokens: np.ndarray) -> Tensor:
    """Check prompts and vectors, and return the vectors in the LLM's type.

    Args:
        answer_tokens: how many tokens follow each prompt, int64 ``[N]``.
    """
    backbone.require_causal("generate titles")
    if (batch.lengths < 1).any():
        raise ValueError("a prompt has no token.")
    needed = int(batch.vector_index.max(initial=-1)) + 1
    if vectors.dim() != 2 or len(vectors) < needed or vectors.shape[1] != backbone.input_size:
        raise ValueError(f"vectors must be [{needed}, {backbone.input_size}], not {list(vectors.shape)}.")
    longest = int((batch.lengths + answer_tokens).max(initial=0))
    if longest > backbone.context_length:
        raise ValueError(
            f"a prompt with its answer has {longest} tokens, and the LLM {backbone.context_length} positions; "
            "shorten the prompts."
        )
    return vectors.to(backbone.device, backbone.dtype)


def check_tokens(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse tokens without an embedding: a tokenizer may have more tokens than its model."""
    rows = backbone.embedding.weight.shape[0]
    for sequence in sequences:
        if len(sequence) and not (0 <= min(sequence) and max(sequence) < rows):
            raise ValueError(f"a title holds a token outside the LLM's vocabulary of {rows}: {list(sequence)}.")


def check_masks(backbone: Backbone) -> None:
    """Refuse an attention kernel that takes no mask."""
    if not backbone.supports_masks:
        raise UserError(
            f"attn_implementation: {backbone.attn_implementation} takes no attention mask, which decoding and scoring "
            "titles in batches needs; use sdpa."
        )


def to_device(backbone: Backbone, values: np.ndarray) -> Tensor:
    """An array as a tensor on the LLM's device."""
    return torch.from_numpy(values).to(backbone.device)
