"""CoLLM: the user's and the items' collaborative representations inside the prompt, learned in two steps.

Reference:
    Yang Zhang et al., "CoLLM: Integrating Collaborative Embeddings into Large Language Models for Recommendation",
    IEEE TKDE 2025. The sequential forms compared here are those of the LLM-SRec paper.

Reference code:
    https://github.com/zyang1580/CoLLM
"""

from __future__ import annotations

from recbole_llm.recommender.llm_recommender import LLMRecommender


class CoLLM(LLMRecommender):
    """CoLLM: step 1 tunes the LLM by LoRA on prompts of text alone; step 2 maps the teacher's representations into it.

    The steps are the key ``stages``; in the second LoRA matrices stay as they are, and the mapping f_I, the user's mapping
    and, in the retrieval form, the heads are trained.
    """

    has_user_vector = True
