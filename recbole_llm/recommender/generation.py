"""Recommending by generation: the LLM generates the title of one of the candidates, which the prompt lists.

Used by the models that have ``recommend_by: generation`` (LLaRA section 3, RSLLM section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.backbone import Backbone
from recbole_llm.backbone.encoder import EncoderCounts, EncoderSettings
from recbole_llm.backbone.generation import (
    TitleFeatures,
    TitleTrie,
    greedy,
    pooled_states,
    score_titles,
    title_features,
    title_loss,
)
from recbole_llm.backbone.text import encode_text
from recbole_llm.config.settings import select
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import shuffled_columns
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.generation import TitlePrompts, TitlePromptSettings
from recbole_llm.recommender.form import Form

MakeVectors = Callable[[PromptBatch], Tensor]


class CandidateGenerator:
    """Has an LLM generate the title of one of the candidates.

    Three ways to get its choice (``decode``):

    * ``greedy``: the LLM generates freely; the first line, without surrounding quotes and regardless of case, must be a
      candidate's title. An answer that is none is invalid: it ranks last and lowers ValidRatio.
    * ``constrained``: it can generate a candidate's title only, so that every answer is valid.
    * ``likelihood``: nothing is generated; candidates are ranked by the log-probability of their titles per token.

    Candidates that share a title share its place, whatever ``decode`` is: the tie is drawn, so that a title that belongs to
    the target and to another item counts in half of the cases. Titles that are cut alike are one title.

    Args:
        backbone: the LLM.
        prompts: builds prompts and answers.
        decode: see above.
        seed: of the order in which candidates are listed.
        settings: how prompts are batched.
        counts: prompts and tokens are added to it.
        match: ``exact``: an answer names the candidate whose title it is. ``substring``: it names one where its first line
            holds the title of exactly one (LLaRA's code), so that "1. Toy Story" counts.

    Attributes:
        answered, valid: how many prompts got an answer since :meth:`reset`, and how many a candidate's title.
        incomplete: how many got no answer.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: TitlePrompts,
        decode: str,
        seed: int,
        settings: EncoderSettings,
        counts: EncoderCounts,
        match: str = "exact",
    ) -> None:
        self.backbone, self.prompts, self.decode, self.seed, self.counts = backbone, prompts, decode, seed, counts
        self.match = match
        self.cost = {"micro_batch_tokens": settings.micro_batch_tokens, "call_cost": settings.call_cost}
        self.train_cost = {**self.cost, "recompute": settings.recompute}
        self.reset()

    def reset(self) -> None:
        """Count answers anew."""
        self.answered = self.valid = self.incomplete = 0

    def loss(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        make_vectors: MakeVectors,
        rng: np.random.Generator,
        times: np.ndarray | None = None,
    ) -> Tensor:
        """Cross-entropy per token of the targets' titles and the end token; the prompt is not learned.

        Args:
            history: item ids int64 ``[B, L]``, right padded.
            lengths: int64 ``[B]``.
            candidates: int64 ``[B, C]``, the target in column 0; they are listed in random order.
            make_vectors: gives what goes into a batch's slots.
            rng: draws the order and each row's template.
            times: of the histories' items, float64 ``[B, L]``; None: unknown.

        Returns:
            a scalar.
        """
        batch, answers = self._training_prompts(history, lengths, candidates, rng, times)
        losses, counts = title_loss(self.backbone, batch, make_vectors(batch), answers, **self.train_cost)
        return losses.sum() / counts.sum()

    def features(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        make_vectors: MakeVectors,
        rng: np.random.Generator,
        times: np.ndarray | None = None,
    ) -> TitleFeatures:
        """As :meth:`loss`, row by row, with the mean hidden states of each history and of the title behind it."""
        batch, answers = self._training_prompts(history, lengths, candidates, rng, times)
        return title_features(self.backbone, batch, make_vectors(batch), answers, **self.train_cost)

    def item_features(self, items: np.ndarray, make_vectors: MakeVectors) -> Tensor:
        """Mean hidden state of each item alone, float32 ``[N, hidden_size]``. ``items``: internal ids int64 ``[N]``."""
        batch = self.prompts.item_prompts(items)
        self.counts.add(batch)
        return pooled_states(self.backbone, batch, make_vectors(batch), **self.train_cost)

    def _training_prompts(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        rng: np.random.Generator,
        times: np.ndarray | None = None,
    ) -> tuple[PromptBatch, list[list[int]]]:
        """The prompts of a training step and the answers that are learned, see :meth:`loss`."""
        order = rng.permuted(np.tile(np.arange(candidates.shape[1]), (len(candidates), 1)), axis=1)
        template = rng.integers(len(self.prompts.settings.templates), size=len(candidates))
        batch = self.prompts.prompts(history, lengths, np.take_along_axis(candidates, order, axis=1), template, times)
        answers = self.prompts.answers(candidates[:, 0])
        self.counts.add(batch, sum(map(len, answers)))
        return batch, answers

    def evaluation_prompts(
        self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, times: np.ndarray | None = None
    ) -> PromptBatch:
        """The prompts of an evaluation: candidates int64 ``[B, C]`` are listed in an order that does not depend on columns."""
        listed = np.take_along_axis(candidates, shuffled_columns(candidates, self.seed), axis=1)
        return self.prompts.prompts(history, lengths, listed, times=times)

    @torch.no_grad()
    def score(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        make_vectors: MakeVectors,
        times: np.ndarray | None = None,
    ) -> Tensor:
        """Score candidates int64 ``[B, C]``, whose order has no influence.

        Returns:
            float64 ``[B, C]``: log-probability per token; or 1 for the candidate that was generated and 0 for the rest, -inf
            throughout where the answer is no candidate's title.
        """
        batch = self.evaluation_prompts(history, lengths, candidates, times)
        self.counts.add(batch)
        vectors = make_vectors(batch)
        distinct, place = np.unique(candidates, return_inverse=True)
        place = place.reshape(candidates.shape)
        answers = self.prompts.answers(distinct)
        titles = [[answers[index] for index in row] for row in place]
        if self.decode == "likelihood":
            # A title that candidates share is scored once: rounding must not decide which of them comes first.
            shared = [list(dict.fromkeys(map(tuple, row))) for row in titles]
            scores, counts = score_titles(self.backbone, batch, vectors, shared, **self.cost)
            per_token = [score / count for score, count in zip(scores, counts, strict=True)]
            by_title = [dict(zip(row, found, strict=True)) for row, found in zip(shared, per_token, strict=True)]
            rows = zip(titles, by_title, strict=True)
            return torch.tensor([[found[tuple(title)] for title in row] for row, found in rows], dtype=torch.float64)

        end = answers[0][-1]
        tries = None
        if self.decode == "constrained":
            tries = [TitleTrie([title[:-1] for title in row], end) for row in titles]
        longest = [max(map(len, row)) for row in titles]
        generated = greedy(self.backbone, batch, vectors, longest, [end], **self.cost, tries=tries)
        return self.score_answers([self._decode(tokens) for tokens in generated], candidates)

    def prompt_texts(
        self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, times: np.ndarray | None = None
    ) -> list[str]:
        """The prompts of :meth:`score` as texts, for an LLM elsewhere."""
        batch = self.evaluation_prompts(history, lengths, candidates, times)
        return [
            self._decode(batch.tokens[start:end]) for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]

    def score_answers(self, answers: Sequence[str | None], candidates: np.ndarray) -> Tensor:
        """Scores of candidates int64 ``[B, C]`` from the LLM's answers; None where there is no answer, which ranks last.

        Returns:
            float64 ``[B, C]``, see :meth:`score`.
        """
        distinct, place = np.unique(candidates, return_inverse=True)
        place = place.reshape(candidates.shape)
        titles = [self.title_in(self._decode(tokens)) for tokens in self.prompts.answers(distinct)]
        scores = np.full(candidates.shape, -np.inf)
        for row, answer in enumerate(answers):
            named = None if answer is None else self.named_title(answer, [titles[index] for index in place[row]])
            hits = np.array([titles[index] == named for index in place[row]])
            if hits.any():
                scores[row] = hits
        self.answered += sum(answer is not None for answer in answers)
        self.incomplete += sum(answer is None for answer in answers)
        self.valid += int(np.isfinite(scores[:, 0]).sum())
        return torch.from_numpy(scores)

    def named_title(self, answer: str, titles: Sequence[str]) -> str | None:
        """Which of the candidates' ``titles`` an answer names, as :meth:`title_in` writes them; None where it names none."""
        line = self.title_in(answer)
        if self.match == "exact":
            return line if line in titles else None
        held = {title for title in titles if title and title in line}
        return held.pop() if len(held) == 1 else None

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.backbone.tokenizer.decode(tokens, skip_special_tokens=True)

    @staticmethod
    def title_in(answer: str) -> str:
        """The title that an answer names: its first line without surrounding quotes and spaces, in lower case."""
        line = answer.strip().split("\n")[0]
        return line.strip().strip("\"'“”‘’").strip().casefold()

    def metrics(self) -> dict[str, float]:
        """ValidRatio over the answers since :meth:`reset`, and how many are missing where some are; empty where nothing
        was generated."""
        found = {"validratio": self.valid / self.answered} if self.answered else {}
        return found | ({"incomplete": float(self.incomplete)} if self.incomplete else {})


@dataclass(frozen=True)
class GenerationSettings:
    """What the form reads; each field is the key of the same name."""

    backbone: str
    title_prompts: list[str] | None
    title_words: list[str]
    train_candidates: int
    decode: str
    history_length: int
    max_prompt_tokens: int | None
    max_item_tokens: int
    answer_match: str
    title_quotes: bool
    title_details: bool
    show_titles: bool


class GenerationForm(Form):
    """The prompt lists a history and candidates; the LLM generates a title, and is trained on the target's.

    Attributes:
        generator: asks the LLM.
    """

    loss_names = ("title",)
    protocol = "generation"
    ranks_catalogue = False

    def __init__(self, model: Any, config: Config, dataset: TextSequentialDataset) -> None:
        super().__init__(model, config, dataset)
        self.settings = select(GenerationSettings, config)

    def prepare(self) -> None:
        settings, backbone = self.settings, self.model.backbone
        backbone.require_output_head(settings.backbone, "write titles")
        templates = settings.title_prompts or []
        if not templates or len(settings.title_words) != 3:
            raise UserError("title_prompts needs a template, and title_words three words: item, to buy, bought.")
        for place, word in zip(("{item}", "{verb}", "{past}"), settings.title_words, strict=True):
            templates = [template.replace(place, word) for template in templates]
        self._templates, self._end = templates, backbone.tokenizer.eos_token_id
        if self._end is None:
            raise UserError("backbone: its tokenizer has no end-of-text token, which ends a title; choose another LLM.")
        self.generator = CandidateGenerator(
            backbone,
            self._prompts(),
            settings.decode,
            self.model.seed,
            self.model.encoder.settings,
            self.model.encoder.counts,
            settings.answer_match,
        )

    def _prompts(self) -> TitlePrompts:
        settings, backbone = self.settings, self.model.backbone
        if not settings.show_titles and not self.model.has_item_vectors:
            raise UserError("show_titles: False leaves nothing of an item in a prompt without item vectors; set it to True.")
        return TitlePrompts(
            lambda texts: encode_text(backbone.tokenizer, texts),
            self.dataset.item_texts,
            TitlePromptSettings(
                templates=self._templates,
                history_length=settings.history_length,
                max_prompt_tokens=settings.max_prompt_tokens or backbone.context_length,
                max_item_tokens=settings.max_item_tokens,
                item_vectors=self.model.has_item_vectors,
                user_vector=self.model.has_user_vector,
                context_length=backbone.context_length,
                marker=self.model.has_marker,
                quotes=settings.title_quotes,
                titles=settings.show_titles,
                details=settings.title_details,
            ),
            prefix_ids=backbone.prefix_ids,
            end_id=self._end,
            format_dates=self.dataset.item_dates if self.dataset.has_dates else None,
        )

    @property
    def prompts(self) -> TitlePrompts:
        """Builds prompts and the answers to them."""
        return self.generator.prompts

    def build_prompts(self) -> None:
        self.generator.prompts = self._prompts()

    def training_inputs(self, interaction: Interaction) -> tuple[np.ndarray, np.ndarray, np.ndarray, MakeVectors]:
        """Of B rows the histories int64 ``[B, L]``, their lengths ``[B]``, ``train_candidates`` candidates each, the target in
        column 0, and what goes into the prompts' slots."""
        candidates = self.model.training_candidates(interaction, self.settings.train_candidates - 1)
        return *self.model.history_items(interaction), candidates, self._make_vectors(interaction)

    def history_times(self, interaction: Interaction) -> np.ndarray | None:
        """When the items of the histories were taken, float64 ``[B, L]``, where prompts say it."""
        field = self.model.time_list_field
        return interaction[field].cpu().numpy() if self.settings.title_details and field in interaction else None

    def _make_vectors(self, interaction: Interaction) -> MakeVectors:
        users = self.model.user_inputs(interaction)
        return lambda batch: self.model.vectors(batch, None, users)

    def loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """Cross-entropy of the target's title, the candidates listed in the prompt."""
        inputs, times = self.training_inputs(interaction), self.history_times(interaction)
        return (self.generator.loss(*inputs, self.model.rng, times),)

    @torch.no_grad()
    def score(self, interaction: Interaction, candidates: Tensor | None) -> Tensor:
        """Score each row's candidates by the LLM's answer: float64 ``[B, C]``, see :meth:`CandidateGenerator.score`.

        Raises:
            UserError: no candidates.
        """
        if candidates is None:
            raise UserError("recommend_by: generation chooses among listed candidates: full ranking needs retrieval.")
        make_vectors = self._make_vectors(interaction)
        times = self.history_times(interaction)
        return self.generator.score(*self.model.history_items(interaction), candidates.cpu().numpy(), make_vectors, times)

    def predict(self, interaction: Interaction) -> Tensor:
        raise UserError("recommend_by: generation needs each user's candidates together: compare by run_recbole_llm.py.")

    def reset(self) -> None:
        self.generator.reset()

    def metrics(self) -> dict[str, float]:
        """ValidRatio of the answers since :meth:`reset`."""
        return self.generator.metrics()
