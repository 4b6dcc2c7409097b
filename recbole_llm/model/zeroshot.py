"""ZeroShot: the LLM as it is, asked for one of the candidates by its title (the un-tuned row of the papers' tables)."""

from __future__ import annotations

from recbole.config import Config

from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.model.abstract_recommender import LLMRecommender


class ZeroShot(LLMRecommender):
    """Nothing is trained. Only ``recommend_by: generation`` means anything: heads that nobody trained say nothing."""

    has_item_vectors = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        if config["recommend_by"] != "generation" or config["tuning"] != "frozen":
            raise UserError("ZeroShot answers by titles with the LLM as it is: set recommend_by: generation, tuning: frozen.")
        super().__init__(config, dataset)
