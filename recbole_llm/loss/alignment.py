"""Alignment of collaborative and textual item vectors (A-LLMRec stage 1, Kim et al., KDD 2024).

Two auto-encoders, one of the item's collaborative vector E and one of its text vector Q, meet in a latent space::

    E [d] --enc_I--> e [128] --dec_I--> E'      matching: e against q
    Q [t] --enc_T--> q [128] --dec_T--> Q'      reconstruction: E' against E, Q' against Q
    x [d] the user                              recommendation: x . E' of the next item against x . E' of a negative

Items come in columns: the user's next item in column 0, negatives behind (the paper and its public code have one). Each
loss is the mean over users, summed over the columns, as in the public code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def _squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows and dimensions, summed over the columns, of two ``[B, C, d]`` tensors."""
    return (first - second).square().mean(dim=(0, 2)).sum()


def matching_loss(item_latent: Tensor, text_latent: Tensor) -> Tensor:
    r"""Distance between the latents of the same items' collaborative and text vectors.

    .. math::
        L_{matching} = \sum_c \frac{1}{B} \sum_u \frac{1}{d'} \| e_{uc} - q_{uc} \|^2

    Alone it is smallest where all latents are equal; the reconstruction losses keep them apart. Both sides move.

    Args:
        item_latent: e = enc_I(E), ``[B, C, d']``.
        text_latent: q = enc_T(Q), ``[B, C, d']``.

    Returns:
        scalar.
    """
    return _squared_error(item_latent, text_latent)


def reconstruction_loss(reconstructed: Tensor, original: Tensor) -> Tensor:
    r"""Distance between vectors and what an auto-encoder makes of them.

    .. math::
        L_{recon} = \sum_c \frac{1}{B} \sum_u \frac{1}{d} \| dec(enc(E_{uc})) - E_{uc} \|^2

    Args:
        reconstructed: ``[B, C, d]``.
        original: ``[B, C, d]``; a target, through which no gradient flows.

    Returns:
        scalar.
    """
    return _squared_error(reconstructed, original.detach())


def recommendation_loss(user: Tensor, reconstructed: Tensor, score: str = "mean") -> Tensor:
    r"""Binary cross-entropy of the next item against negatives, by the reconstructed collaborative vectors.

    .. math::
        L_{rec} = - \frac{1}{B} \sum_u \Big[ \log \sigma(s(x_u, E'_{u0}))
            + \sum_{c > 0} \log (1 - \sigma(s(x_u, E'_{uc}))) \Big]

    Args:
        user: the teacher's user representation x, ``[B, d]``.
        reconstructed: E' = dec_I(enc_I(E)), the next item in column 0, ``[B, C, d]``.
        score: s: ``dot`` is the dot product, by which the teacher itself ranks; ``mean`` divides it by d (public code),
            which makes the loss flatter.

    Returns:
        scalar.
    """
    if score not in ("mean", "dot"):
        raise ValueError(f"score must be mean or dot, not {score!r}")
    products = user[:, None] * reconstructed
    logits = products.mean(dim=2) if score == "mean" else products.sum(dim=2)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1.0
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=0).sum()


class AlignmentLosses(NamedTuple):
    """The four parts, each with its weight; ``sum(losses)`` is the loss. Scalars."""

    matching: Tensor
    item_reconstruction: Tensor
    text_reconstruction: Tensor
    recommendation: Tensor


def alignment_loss(
    user: Tensor,
    item: Tensor,
    item_latent: Tensor,
    item_reconstructed: Tensor,
    text: Tensor,
    text_latent: Tensor,
    text_reconstructed: Tensor,
    matching_weight: float = 1.0,
    item_reconstruction_weight: float = 0.5,
    text_reconstruction_weight: float = 0.2,
    recommendation_weight: float = 1.0,
    score: str = "mean",
) -> AlignmentLosses:
    r"""The loss of A-LLMRec's stage 1, by parts.

    .. math::
        L = L_{matching} + 0.5 L_{item-recon} + 0.2 L_{text-recon} + L_{rec}

    Args:
        user: x, ``[B, d]``.
        item, item_latent, item_reconstructed: E, e and E', ``[B, C, d]``, ``[B, C, d']``, ``[B, C, d]``.
        text, text_latent, text_reconstructed: Q, q and Q', ``[B, C, t]``, ``[B, C, d']``, ``[B, C, t]``.
        matching_weight, item_reconstruction_weight, text_reconstruction_weight, recommendation_weight: of the parts;
            0.5 and 0.2 are alpha and beta of the paper.
        score: see :func:`recommendation_loss`.

    References:
        Kim et al., "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based Recommender
        System", KDD 2024, stage 1.
    """
    return AlignmentLosses(
        matching_weight * matching_loss(item_latent, text_latent),
        item_reconstruction_weight * reconstruction_loss(item_reconstructed, item),
        text_reconstruction_weight * reconstruction_loss(text_reconstructed, text),
        recommendation_weight * recommendation_loss(user, item_reconstructed, score),
    )
