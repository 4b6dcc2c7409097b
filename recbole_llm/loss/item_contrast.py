"""Cosine similarities as logits: a sequence and its next item, among the items of the batch or of the catalog."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cosine_logits(users: Tensor, items: Tensor, temperature: float) -> Tensor:
    r"""``cos(u, i) / temperature`` of users ``[B, d]`` and items ``[C, d]``: ``[B, C]``.

    References:
        Li et al., "Text Is All You Need: Learning Language Representations for Sequential Recommendation", KDD 2023.
    """
    return functional.normalize(users, dim=-1) @ functional.normalize(items, dim=-1).T / temperature


def item_contrast_loss(users: Tensor, items: Tensor, temperature: float) -> Tensor:
    r"""Each sequence's next item against those of the other sequences of the batch.

    .. math::
        L_{IIC} = - \frac{1}{B} \sum_b \log \frac{e^{cos(u_b, i_b) / \tau}}{\sum_{c} e^{cos(u_b, i_c) / \tau}}

    Args:
        users, items: ``[B, d]``, row b of both belonging together; the other rows are its negatives, whatever item they are.
        temperature: tau.

    Returns:
        scalar.

    References:
        Li et al., "Text Is All You Need: Learning Language Representations for Sequential Recommendation", KDD 2023.
    """
    logits = cosine_logits(users, items, temperature)
    return functional.cross_entropy(logits, logits.new_tensor(range(len(logits))).long())
