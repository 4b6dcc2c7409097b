"""ZeroShot: an LLM as it is, which generates the title of one of the candidates (the papers' rows of an un-tuned LLM)."""

from __future__ import annotations

from dataclasses import dataclass

from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.endpoint import EndpointSettings, ask_endpoint
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.recommender.generation import GenerationForm
from recbole_llm.recommender.llm_recommender import LLMRecommender


@dataclass(frozen=True)
class ZeroShotSettings:
    """The model's settings; each field is the key of the same name."""

    tuning: str
    decode: str
    endpoint_url: str | None
    endpoint_model: str | None
    endpoint_key_variable: str | None
    endpoint_timeout: float
    endpoint_retries: int
    endpoint_parallel: int
    endpoint_answers: str | None


class ZeroShot(LLMRecommender):
    """Nothing is trained, so that it has one form: heads that nobody trained say nothing.

    With ``endpoint_url`` the prompts go to an LLM behind an OpenAI-compatible endpoint; the backbone then only counts
    and cuts tokens.
    """

    forms = {"generation": GenerationForm}
    has_item_vectors = False

    def __init__(self, config: Config, dataset: TextSequentialDataset) -> None:
        self.settings = settings = select(ZeroShotSettings, config)
        if settings.tuning != "frozen":
            raise UserError("ZeroShot takes the LLM as it is: set tuning: frozen.")
        super().__init__(config, dataset)
        self.endpoint = None
        if settings.endpoint_url:
            if settings.decode != "greedy" or not settings.endpoint_model:
                raise UserError("endpoint_url answers in words: set decode: greedy, and endpoint_model to the model's name.")
            self.endpoint = EndpointSettings(
                base_url=settings.endpoint_url,
                model=settings.endpoint_model,
                api_key_variable=settings.endpoint_key_variable,
                timeout=settings.endpoint_timeout,
                retries=settings.endpoint_retries,
                parallel_requests=settings.endpoint_parallel,
                answers_file=settings.endpoint_answers,
            )

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        if self.endpoint is None or candidates is None:
            return super().score(interaction, candidates)
        listed, generator = candidates.cpu().numpy(), self.form.generator
        prompts = generator.prompt_texts(*self.history_items(interaction), listed, self.form.history_times(interaction))
        return generator.score_answers([answer.text for answer in ask_endpoint(prompts, self.endpoint)], listed)
