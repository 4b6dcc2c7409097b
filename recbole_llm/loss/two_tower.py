"""Contrastive alignment of users and items between two towers (RSLLM, equations 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contrastive_loss(queries: Tensor, keys: Tensor, items: Tensor, temperature: float = 0.5) -> Tensor:
    r"""InfoNCE over the batch: each row's query against its own key, the other rows' keys as negatives.

    .. math::
        L = - \frac{1}{N} \sum_i \log \frac{e^{\cos(q_i, k_i) / \tau}}{\sum_j e^{\cos(q_i, k_j) / \tau}}

    Equation 3 (item-level) has the target item alone as the query and the target as the user tower sees it, behind the
    history, as the key. Equation 4 (user-level) has the user's history as the query and the target item alone as the key.
    A row whose target is the same item is no negative: it would push an item away from itself.

    Args:
        queries, keys: ``[N, d]``, float32.
        items: the target item of each row, int64 ``[N]``.
        temperature: tau, 0.5 in the paper.

    Returns:
        scalar; 0 for a batch of one.
    """
    similarity = functional.normalize(queries, dim=1) @ functional.normalize(keys, dim=1).T / temperature
    same = items[:, None] == items[None]
    same.fill_diagonal_(False)
    return functional.cross_entropy(
        similarity.masked_fill(same, float("-inf")), torch.arange(len(items), device=items.device)
    )
