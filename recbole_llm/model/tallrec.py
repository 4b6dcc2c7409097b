"""TALLRec: an LLM tuned by LoRA on prompts of text alone.

Reference:
    Keqin Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
    Recommendation", RecSys 2023. ``recommend_by: yes_no`` is the form of that paper; the others are those in which the
    LLM-SRec and RSLLM papers compare it.

Reference code:
    https://github.com/SAI990323/TALLRec
"""

from __future__ import annotations

from recbole_llm.recommender.llm_recommender import LLMRecommender
from recbole_llm.recommender.yes_no import YesNoForm


class TALLRec(LLMRecommender):
    """TALLRec: titles in, no item vectors and no teacher; LoRA matrices and the heads are trained.

    The form of the paper is :class:`~recbole_llm.recommender.yes_no.YesNoForm`.
    """

    forms = {**LLMRecommender.forms, "yes_no": YesNoForm}
    has_item_vectors = False
