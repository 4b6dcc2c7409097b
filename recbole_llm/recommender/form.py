"""How a model is asked, as an object: the prompts, the loss and the scores of one form of recommending."""

from __future__ import annotations

from typing import Any

from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import get_model
from torch import Tensor

from recbole_llm.data.dataset import TextSequentialDataset


def form_of(config: Config) -> tuple[str | None, type[Form] | None]:
    """The form in which a configuration's model is asked: its name and class; none for a model that has no forms."""
    forms = getattr(get_model(config["model"]), "forms", {})
    name = config["recommend_by"] or next(iter(forms), None)
    return name, forms.get(name)


class Form:
    """Base of the forms. A model holds one as ``form``, chosen by the key ``recommend_by`` from its table ``forms``.

    Args:
        model: the ``LLMRecommender``, which has its LLM, its teacher and its projections; learned parts are added to it.
        config: RecBole configuration; each form reads its settings from it here.
        dataset: the training split.

    Attributes:
        loss_names: names of the parts of :meth:`loss`, in order.
        protocol: the preset of split, candidates and metrics that the form needs; None: any that ranks.
        ranks_catalogue: whether the form can rank all items, not candidates that are listed alone.
        prompts: builds the form's prompts.
    """

    loss_names: tuple[str, ...] = ()
    protocol: str | None = None
    ranks_catalogue: bool = True

    def __init__(self, model: Any, config: Config, dataset: TextSequentialDataset) -> None:
        self.model, self.dataset = model, dataset

    def prepare(self) -> None:
        """Build the prompts, and add to the model what this form learns.

        Raises:
            UserError: the LLM, its tokenizer or the settings do not serve this form.
        """
        raise NotImplementedError

    def build_prompts(self) -> None:
        """Build the prompts anew: the model now shows vectors in them, or no longer does."""
        raise NotImplementedError

    def forget_items(self) -> None:
        """Forget what is kept of items from one evaluation to the next: what stands in their prompts changed."""

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """The parts of the loss of B rows, scalars, named by ``loss_names``."""
        raise NotImplementedError

    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates int64 ``[B, C]``: ``[B, C]``; with None the whole catalog: ``[B, n_items]``.

        Raises:
            UserError: the form cannot rank what is asked for.
        """
        raise NotImplementedError

    def predict(self, interaction: Interaction) -> Tensor:
        """Score the item of each row: ``[B]``.

        Raises:
            UserError: the form needs a row's candidates together.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Begin to count anew what :meth:`metrics` reports."""

    def metrics(self) -> dict[str, float]:
        """Figures of the answers since :meth:`reset`, by name; often none."""
        return {}
