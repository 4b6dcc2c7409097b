"""Vocabulary logits, and log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_llm.backbone.backbone import Backbone

_LOGITS_AT_ONCE = 2**25  # 128 MiB in float32


class _Decoded(tuple):
    """A decoder's output: the hidden states, and None for everything else that a causal LM reads from it."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_returns(hidden: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Within the context, the decoder computes nothing and returns ``hidden``."""
    decoder.forward = lambda *arguments, **options: _Decoded([hidden])
    try:
        yield
    finally:
        del decoder.forward


def logits(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Vocabulary logits of final hidden states, as the architecture's own causal LM computes them.

    What follows the output head differs between architectures, and configurations do not describe it: Gemma 2 caps its
    logits; ``logits_scaling`` divides in Granite, multiplies in HyperCLOVA X and scales the hidden state in MiniCPM 3;
    ``logit_scale`` multiplies in Cohere and is ignored in MPT.

    Args:
        backbone: the LLM.
        hidden: last hidden states ``[..., hidden_size]``, as :class:`Backbone` returns them (after the final norm);
            cast to the weights' type. Pass the positions where a token is predicted, not whole sequences.

    Returns:
        float32 ``[..., vocabulary]``, differentiable in ``hidden`` and in the head's weights where they are trained.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1]).to(backbone.dtype)
    with _decoder_returns(flat, backbone.model):
        output = backbone.causal_lm(inputs_embeds=flat, use_cache=False)
    return output.logits.float().reshape(*hidden.shape[:-1], -1)


def log_probabilities(backbone: Backbone, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of ``tokens`` ``[P, C]`` where the last hidden state is ``hidden`` ``[P, hidden_size]``.

    At most ``_LOGITS_AT_ONCE`` logits exist at a time; for the backward pass they are computed again.
    """

    def compute(hidden: Tensor, tokens: Tensor) -> Tensor:
        scores = logits(backbone, hidden)
        return scores.gather(1, tokens) - scores.logsumexp(dim=1, keepdim=True)

    positions = max(1, _LOGITS_AT_ONCE // backbone.embedding.weight.shape[0])
    parts = []
    for some_hidden, some_tokens in zip(hidden.split(positions), tokens.split(positions), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(compute, some_hidden, some_tokens, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(compute(some_hidden, some_tokens))
    return torch.cat(parts)
