"""Bidirectional text encoders that are trained: texts to vectors, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recbole_llm.backbone.backbone import Source
from recbole_llm.backbone.encoder import EncoderCounts, EncoderSettings
from recbole_llm.backbone.sentence_encoder import TextTransformer, cut_token_ids
from recbole_llm.prompt.batch import cut_into_micro_batches


class TextModel(nn.Module):
    """A bidirectional transformer in the place of a :class:`~recbole_llm.backbone.backbone.Backbone`.

    Args:
        model: the transformer.
        tokenizer: its tokenizer.
        identity: what a checkpoint must match to fit it; plain values, for JSON.

    Attributes:
        causal_lm: the transformer, under the name that checkpoints know.
        tokenizer, identity: see above.
        tuning, frozen, causal, source: as for a ``Backbone``: all of it is trained.
        hidden_size: width of a hidden state.
    """

    tuning, frozen, causal = "full", False, False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: dict[str, Any]) -> None:
        super().__init__()
        self.causal_lm = model.requires_grad_(True)
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):  # nothing reads it
            pooler.requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity | {"architecture": type(model).__name__, "tuning": "full"}
        self.source = Source()
        self.hidden_size: int = model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.causal_lm.get_input_embeddings().weight.device


class TextEncoder(nn.Module):
    """Encodes token ids, texts of similar length together.

    Args:
        transformer: see :func:`~recbole_llm.backbone.sentence_encoder.load_text_transformer`.
        settings: of these, the size of calls.
        pooling: ``cls``, the hidden state at the first token, or ``mean`` over a text's tokens.
        max_tokens: the longest text, in tokens with the tokenizer's own; not more than the transformer can hold.
    """

    def __init__(self, transformer: TextTransformer, settings: EncoderSettings, pooling: str, max_tokens: int) -> None:
        super().__init__()
        self.backbone = TextModel(transformer.model, transformer.tokenizer, transformer.identity)
        self.settings = settings
        self.pooling = pooling
        self.max_tokens = min(max_tokens, transformer.max_tokens)
        self.lower_case = transformer.lower_case
        self.counts = EncoderCounts()

    def token_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of texts, cut; what looks like a special token is plain text."""
        # Tokenizers refuse half a surrogate pair, which is not valid Unicode.
        texts = [text.strip().encode("utf-8", "replace").decode() for text in texts]
        ids = cut_token_ids(self.backbone.tokenizer, texts, self.max_tokens, self.lower_case)
        # A tokenizer that adds nothing leaves no token of an empty text.
        pad = self.backbone.tokenizer.pad_token_id or 0
        return [np.array(row or [pad], dtype=np.int64) for row in ids]

    def forward(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Encode texts given as token ids: float32 ``[n, hidden size]``."""
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.counts.prompts += len(ids)
        self.counts.tokens += int(lengths.sum())
        parts, rows = [], []
        for batch in cut_into_micro_batches(lengths, self.settings.micro_batch_tokens, self.settings.call_cost):
            parts.append(self._encode([ids[row] for row in batch]))
            rows.append(batch)
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))
        return torch.cat(parts)[order.to(self.backbone.device)]

    def _encode(self, ids: Sequence[np.ndarray]) -> Tensor:
        width, device = max(map(len, ids)), self.backbone.device
        tokens = np.full((len(ids), width), self.backbone.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(ids), width), dtype=bool)
        for row, text in enumerate(ids):
            tokens[row, : len(text)], mask[row, : len(text)] = text, True
        self.counts.calls += 1
        self.counts.computed += tokens.size
        self.counts.padding += int((~mask).sum())
        inside = torch.from_numpy(mask).to(device)
        output = self.backbone.causal_lm(input_ids=torch.from_numpy(tokens).to(device), attention_mask=inside.long())
        hidden = output.last_hidden_state.float()
        if self.pooling == "cls":
            return hidden[:, 0]
        return (hidden * inside[:, :, None]).sum(dim=1) / inside.sum(dim=1, keepdim=True)
