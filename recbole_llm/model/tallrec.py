"""TALLRec: an LLM tuned by LoRA on prompts of text alone.

Reference:
    Keqin Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
    Recommendation", RecSys 2023. The forms compared here are those of the LLM-SRec and RSLLM papers.

Reference code:
    https://github.com/SAI990323/TALLRec
"""

from __future__ import annotations

from recbole_llm.model.abstract_recommender import LLMRecommender


class TALLRec(LLMRecommender):
    """TALLRec: titles in, no item vectors and no teacher; LoRA matrices and the heads are trained."""

    has_item_vectors = False
