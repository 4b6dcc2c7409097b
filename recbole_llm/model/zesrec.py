"""ZESRec: an item is its text's vector through one linear layer, with a sequential model on top; nothing of an item's number.

Reference:
    Hao Ding et al., "Zero-Shot Recommender Systems", 2021 (arXiv:2105.08318).

The item's offset from its text, and the user's from the history, of the paper's probabilistic model are taken at their mean, 0,
as the paper does for items and users that it has not seen. The sequential model is RecBole's SASRec.
"""

from __future__ import annotations

from recbole.model.sequential_recommender.sasrec import SASRec


class ZESRec(SASRec):
    """SASRec whose item embeddings are a trained linear projection of frozen text vectors (``item_vectors_use: project``)."""
