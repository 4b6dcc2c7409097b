"""ZeroShot: an LLM as it is, asked for one of the candidates by its title (the papers' rows of an un-tuned LLM)."""

from __future__ import annotations

from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.endpoint import EndpointSettings, ask_endpoint
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.recommender.llm_recommender import LLMRecommender


class ZeroShot(LLMRecommender):
    """Nothing is trained, so that only ``recommend_by: generation`` means anything: heads that nobody trained say nothing.

    With ``endpoint_url`` the questions go to an LLM behind an OpenAI-compatible endpoint; the backbone then only counts
    and cuts tokens.
    """

    has_item_vectors = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        if config["recommend_by"] != "generation" or config["tuning"] != "frozen":
            raise UserError("ZeroShot answers by titles with the LLM as it is: set recommend_by: generation, tuning: frozen.")
        super().__init__(config, dataset)
        self.endpoint = None
        if config["endpoint_url"]:
            if config["decode"] != "greedy" or not config["endpoint_model"]:
                raise UserError("endpoint_url answers in words: set decode: greedy, and endpoint_model to the model's name.")
            self.endpoint = EndpointSettings(
                base_url=config["endpoint_url"],
                model=config["endpoint_model"],
                api_key_variable=config["endpoint_key_variable"],
                timeout=config["endpoint_timeout"],
                retries=config["endpoint_retries"],
                parallel_requests=config["endpoint_parallel"],
                answers_file=config["endpoint_answers"],
            )

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        if self.endpoint is None or candidates is None:
            return super().score(interaction, candidates)
        listed = candidates.cpu().numpy()
        prompts = self.titles.text_prompts(*self.history_items(interaction), listed)
        return self.titles.scores_of([answer.text for answer in ask_endpoint(prompts, self.endpoint)], listed)
