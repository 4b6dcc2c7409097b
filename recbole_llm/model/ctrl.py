"""CTRL as a sequential recommender: item embeddings start from text vectors, then the recommender is fine-tuned.

Reference:
    Xiangyang Li et al., "CTRL: Connect Collaborative and Language Model for CTR Prediction", 2023 (arXiv:2306.02841).

The paper predicts clicks: it aligns a click model of features with a language model, and then fine-tunes the click model alone.
What is here is the row of LLM-SRec's Table 6 (appendix D), where the semantic knowledge enters through the item embeddings'
first values. The recommender is RecBole's SASRec.
"""

from __future__ import annotations

from recbole.model.sequential_recommender.sasrec import SASRec


class CTRL(SASRec):
    """SASRec whose item embeddings start from whitened text vectors and are trained (``item_vectors_use: initialize``)."""
