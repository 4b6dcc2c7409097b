"""An LLM as the recommenders use it: input vectors in, hidden states out, whatever its architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from recbole_llm.errors import UserError

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}

@contextmanager
def _feed_forward_only_at(read: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Within the context, the last layer's feed-forward network runs at the positions ``read`` only and is 0 elsewhere.

    Where the network is no module of its own (OPT), it runs everywhere.
    """
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    network = getattr(layers[-1], "mlp", None) if layers is not None else None
    if network is None:
        yield
        return
    plain = network.forward

    def at_positions(hidden: Tensor) -> Tensor:
        result = plain(hidden[read][None])
        if not isinstance(result, Tensor):  # a mixture of experts that also returns its routing
            return plain(hidden)
        return torch.zeros_like(hidden).index_put((read,), result[0])

    network.forward = at_positions
    try:
        yield
    finally:
        del network.forward


@dataclass(frozen=True)
class Source:
    """Where an LLM was read from.

    Attributes:
        place: what ``from_pretrained`` of transformers takes, a Hugging Face id or a folder; None where there is no such thing.
        dtype: type of its weights as they were published; None where nobody says.
        layers: how many decoder layers it has there; None where nobody says.
    """

    place: str | None = None
    dtype: torch.dtype | None = None
    layers: int | None = None


class Backbone(nn.Module):
    """An LLM's stack of layers, and the properties that differ between architectures.

    Args:
        causal_lm: the whole model.
        tokenizer: its tokenizer.
        tuning: ``frozen``, ``lora`` or ``full``; ``requires_grad`` must have been set accordingly.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``, as loaded.
        identity: see below.
        causal: see below.
        source: see below.

    Attributes:
        causal_lm: the whole model, with its output head.
        tokenizer: its tokenizer.
        tuning: see above.
        causal: whether a token sees only itself and those before it; else it sees all tokens of its prompt.
        frozen: no weight is trained, and dropout is off in training mode too.
        input_size: width of the input embeddings.
        hidden_size: width of the last hidden state (in OPT-350m that of its embeddings, not that of its layers).
        layers: decoder layers kept.
        context_length: number of positions that the LLM was trained for.
        is_sliding: whether some layer sees only the latest ``sliding_window`` positions.
        sliding_window: that window, None without one.
        supports_masks: whether :meth:`forward` takes an ``attention_mask`` (flash_attention_2 does not).
        prefix_ids: token ids that the tokenizer puts before a text (such as ``<s>``), often none.
        identity: what a checkpoint must match to fit this backbone; plain values, for JSON.
        source: where it was read from.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tuning: str,
        attn_implementation: str,
        identity: dict[str, Any],
        causal: bool = True,
        source: Source | None = None,
    ) -> None:
        super().__init__()
        # The only registered child: decoder and embedding are parts of it, and must not be counted twice.
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.tuning = tuning
        self.causal = causal
        self.frozen = tuning == "frozen"
        self.attn_implementation = attn_implementation
        self.identity = identity
        self.source = source or Source()
        config = causal_lm.config.get_text_config(decoder=True)
        self.layers: int = config.num_hidden_layers
        self.context_length: int = config.max_position_embeddings
        self.input_size: int = self.embedding.weight.shape[1]
        self.hidden_size: int = causal_lm.get_output_embeddings().weight.shape[1]
        types = set(layer_types(config))
        self.is_sliding = "sliding_attention" in types
        self.sliding_window: int | None = config.sliding_window if self.is_sliding else None
        self._mixes_layer_types = len(types) > 1
        self._cache_name = cache_name(self.model) or "past_key_values"
        self.supports_masks = attn_implementation != "flash_attention_2"
        self.prefix_ids = prefix_ids(tokenizer)
        self.train(False)

    @property
    def model(self) -> PreTrainedModel:
        """The stack of layers: embeddings or token ids in, last hidden state out, no vocabulary logits."""
        return self.causal_lm.get_decoder()

    @property
    def embedding(self) -> nn.Embedding:
        """Token ids to input vectors. Call it, do not index its weight: Gemma's multiplies by sqrt(width)."""
        return self.causal_lm.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the LLM's weights and of its hidden states."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    def require_output_head(self, name: str, purpose: str) -> None:
        """Announce that vocabulary logits will be read: from then on ``tuning: full`` trains the output head, too.

        Args:
            name: the user's name for the LLM.
            purpose: what the logits are for, as in "it cannot ``purpose``".

        Raises:
            UserError: the checkpoint holds the decoder only.
        """
        if getattr(self.causal_lm, "lacks_output_head", False):
            raise UserError(
                f"backbone: {name} holds no output head, so it cannot {purpose}; choose another LLM, or "
                f"recommend_by: retrieval."
            )
        self.causal_lm.get_output_embeddings().requires_grad_(self.tuning == "full")

    def require_causal(self, purpose: str) -> None:
        """Check that tokens do not see those after them.

        Args:
            purpose: what needs it, as in "it cannot ``purpose``".

        Raises:
            UserError: they do.
        """
        if not self.causal:
            raise UserError(
                f"backbone: {self.identity.get('name')} is bidirectional, its tokens see those after them, so it cannot "
                f"{purpose}; choose a causal LLM."
            )

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode; a frozen LLM stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.frozen:
            self.causal_lm.eval()
        return self

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        read: Tensor | None = None,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Run the decoder stack.

        Args:
            inputs_embeds: input vectors ``[B, Q, input_size]``; cast to the weights' type.
            position_ids: ``[B or 1, Q]``.
            attention_mask: None: each token sees the cached ones, itself and those before it, by the fused causal
                kernel where there is no cache; right padding needs no mask, since earlier tokens cannot see it. Only
                for a causal LLM. Or a boolean ``[B or 1, 1, Q, K]``, True = may attend, K = cached tokens + Q; every
                query needs a True. Sliding windows are applied on top of it, by differences of positions.
            past_key_values: keys and values of earlier tokens, at positions 0, 1, 2, ...; is extended in place. A cache
                made with gradients enabled passes them on.
            use_cache: whether to return keys and values; only for a causal LLM.
            read: boolean ``[B, Q]``, the positions whose result is used; None: all. Nothing attends to the output of the
                last layer, so its feed-forward network (the largest part of a layer) runs at these positions only.
                Elsewhere the result is meaningless.

        Returns:
            the last hidden state ``[B, Q, hidden_size]`` after the final norm, and the cache (None without
            ``use_cache``).

        Raises:
            UserError: the LLM is bidirectional and is given no mask, or a cache; or its attention kernel takes no mask.
        """
        if attention_mask is None:
            self.require_causal("be run without an attention mask")
        if use_cache or past_key_values is not None:
            self.require_causal("share keys and values between prompts")
        if use_cache and past_key_values is None:
            # Not DynamicCache(config=...): it drops what left the sliding window, and masks would differ by layer.
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None and self.supports_masks and not _is_consecutive(position_ids):
            # transformers reads a jump in the positions as the start of another sequence, and hides the tokens before it.
            queries, keys = inputs_embeds.shape[1], seen + inputs_embeds.shape[1]
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=inputs_embeds.device).tril(seen)[
                None, None
            ]
        with nullcontext() if read is None else _feed_forward_only_at(read, self.model):
            output = self.model(
                inputs_embeds=inputs_embeds.to(self.dtype),
                position_ids=position_ids,
                attention_mask=None if attention_mask is None else self._native(attention_mask, position_ids, seen),
                use_cache=use_cache,
                **{self._cache_name: past_key_values},
            )
        return output.last_hidden_state, past_key_values if use_cache else None

    def _native(self, attention_mask: Tensor, position_ids: Tensor, seen: int) -> Tensor | dict[str, Tensor]:
        """Turn "may attend" into the form that the attention kernel and the types of layers take.

        transformers passes a 4-D mask on unchanged, so sliding windows are applied here: to the mask itself for a model
        with one type of layers, in a dictionary by type for a mixed one (Gemma 2 and 3, some Qwen).
        """
        if not self.supports_masks:
            raise UserError(
                "attn_implementation: flash_attention_2 takes no attention mask, as shared prompt headers and prefixes "
                "need; use sdpa, or set share_header and share_prefix to False."
            )
        if attention_mask.dtype != torch.bool or attention_mask.dim() != 4:
            raise ValueError(
                f"attention_mask must be boolean [B, 1, Q, K], not {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        if not self.is_sliding:
            return self._additive(attention_mask)
        before = torch.arange(seen, device=position_ids.device).expand(len(position_ids), -1)
        keys = torch.cat([before, position_ids], dim=1)
        near = keys[:, None, None, :] > position_ids[:, None, :, None] - self.sliding_window
        sliding = self._additive(attention_mask & near)
        if not self._mixes_layer_types:
            return sliding
        return {"full_attention": self._additive(attention_mask), "sliding_attention": sliding}

    def _additive(self, attention_mask: Tensor) -> Tensor:
        """sdpa takes the boolean itself; eager attention adds the mask to its scores."""
        if self.attn_implementation != "eager":
            return attention_mask
        zero = torch.zeros((), dtype=self.dtype, device=attention_mask.device)
        return torch.where(attention_mask, zero, torch.finfo(self.dtype).min)


def _is_consecutive(position_ids: Tensor) -> bool:
    return bool((position_ids[:, 1:] - position_ids[:, :-1] == 1).all())


def cache_name(decoder: PreTrainedModel) -> str | None:
    """What the decoder's ``forward`` calls keys and values of earlier tokens; ``cache`` since transformers 5.24."""
    accepted = inspect.signature(decoder.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in accepted), None)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of each layer; a model that names none (Mistral, Phi-3) has its window in all layers."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return list(types)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    special = encoding["special_tokens_mask"]
    return encoding["input_ids"][: special.index(0)] if 0 in special else []
