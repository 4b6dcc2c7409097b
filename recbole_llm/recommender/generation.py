"""Recommending by a title that the LLM writes: training on the target's title, and answers turned into scores.

Used by the models that have ``recommend_by: generation`` (LLaRA section 3, RSLLM section 3; the candidates are listed in
the prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
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
from recbole_llm.evaluation.candidates import shuffled_columns
from recbole_llm.prompt.batch import PromptBatch
from recbole_llm.prompt.generation import TitlePrompts

VectorsOf = Callable[[PromptBatch], Tensor]


class TitleGenerator:
    """Asks an LLM for one of the candidates by its title.

    Three ways to read the answer (``decode``):

    * ``greedy``: the LLM writes freely; its first line, without surrounding quotes and regardless of case, must be a
      candidate's title. An answer that is none is invalid: it ranks last and lowers ValidRatio.
    * ``constrained``: it can only write a candidate's title, so that every answer is valid.
    * ``likelihood``: nothing is written; candidates are ranked by the log-probability of their titles per token.

    Candidates that share a title share its place, however the answer is read: the tie is drawn, so that a title that
    belongs to the target and to another item counts in half of the cases. Titles that are cut alike are one title.

    Args:
        backbone: the LLM.
        prompts: builds prompts and answers.
        decode: see above.
        seed: of the order in which candidates are listed.
        settings: how prompts are batched.
        counts: prompts and tokens are added to it.

    Attributes:
        answered, valid: how many prompts were answered in words since :meth:`reset`, and how many by a candidate's title.
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
    ) -> None:
        self.backbone, self.prompts, self.decode, self.seed, self.counts = backbone, prompts, decode, seed, counts
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
        vectors_of: VectorsOf,
        rng: np.random.Generator,
    ) -> Tensor:
        """Cross-entropy per token of the targets' titles and the end token; the prompt is not learned.

        Args:
            history: item ids int64 ``[B, L]``, right padded.
            lengths: int64 ``[B]``.
            candidates: int64 ``[B, C]``, the target in column 0; they are listed in random order.
            vectors_of: what goes into a batch's slots.
            rng: draws the order and each row's template.

        Returns:
            a scalar.
        """
        batch, answers = self._lessons(history, lengths, candidates, rng)
        losses, counts = title_loss(self.backbone, batch, vectors_of(batch), answers, **self.train_cost)
        return losses.sum() / counts.sum()

    def features(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        vectors_of: VectorsOf,
        rng: np.random.Generator,
    ) -> TitleFeatures:
        """As :meth:`loss`, row by row, with the mean hidden states of each history and of the title behind it."""
        batch, answers = self._lessons(history, lengths, candidates, rng)
        return title_features(self.backbone, batch, vectors_of(batch), answers, **self.train_cost)

    def item_features(self, items: np.ndarray, vectors_of: VectorsOf) -> Tensor:
        """Mean hidden state of each item alone, float32 ``[N, hidden_size]``. ``items``: internal ids int64 ``[N]``."""
        batch = self.prompts.item_prompts(items)
        self.counts.add(batch)
        return pooled_states(self.backbone, batch, vectors_of(batch), **self.train_cost)

    def _lessons(
        self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, rng: np.random.Generator
    ) -> tuple[PromptBatch, list[list[int]]]:
        """The prompts of a training step and the answers to them, see :meth:`loss`."""
        order = rng.permuted(np.tile(np.arange(candidates.shape[1]), (len(candidates), 1)), axis=1)
        template = rng.integers(len(self.prompts.settings.templates), size=len(candidates))
        batch = self.prompts.prompts(history, lengths, np.take_along_axis(candidates, order, axis=1), template)
        answers = self.prompts.answers(candidates[:, 0])
        self.counts.add(batch, sum(map(len, answers)))
        return batch, answers

    @torch.no_grad()
    def score(self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray, vectors_of: VectorsOf) -> Tensor:
        """Score candidates, which are listed in an order that says nothing of the column they stand in.

        Returns:
            float64 ``[B, C]``: log-probability per token; or 1 for what was answered and 0 for the rest, -inf throughout
            where the answer is no candidate's title.
        """
        batch = self._questions(history, lengths, candidates)
        self.counts.add(batch)
        vectors = vectors_of(batch)
        distinct, place = np.unique(candidates, return_inverse=True)
        place = place.reshape(candidates.shape)
        answer_of = self.prompts.answers(distinct)
        titles = [[answer_of[index] for index in row] for row in place]
        if self.decode == "likelihood":
            # A title that candidates share is scored once: rounding must not decide which of them comes first.
            shared = [list(dict.fromkeys(map(tuple, row))) for row in titles]
            scores, counts = score_titles(self.backbone, batch, vectors, shared, **self.cost)
            per_token = [score / count for score, count in zip(scores, counts, strict=True)]
            score_of = [dict(zip(row, found, strict=True)) for row, found in zip(shared, per_token, strict=True)]
            rows = zip(titles, score_of, strict=True)
            return torch.tensor([[found[tuple(title)] for title in row] for row, found in rows], dtype=torch.float64)

        end = answer_of[0][-1]
        tries = None
        if self.decode == "constrained":
            tries = [TitleTrie([title[:-1] for title in row], end) for row in titles]
        longest = [max(map(len, row)) for row in titles]
        answers = greedy(self.backbone, batch, vectors, longest, [end], **self.cost, tries=tries)
        return self.scores_of([self._text(answer) for answer in answers], candidates)

    def text_prompts(self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray) -> list[str]:
        """The prompts of :meth:`score` as texts, for an LLM elsewhere."""
        batch = self._questions(history, lengths, candidates)
        return [
            self._text(batch.tokens[start:end]) for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]

    def scores_of(self, answers: Sequence[str | None], candidates: np.ndarray) -> Tensor:
        """Scores of candidates int64 ``[B, C]`` from what was answered; None where there is no answer, which ranks last.

        Returns:
            float64 ``[B, C]``, see :meth:`score`.
        """
        distinct, place = np.unique(candidates, return_inverse=True)
        place = place.reshape(candidates.shape)
        name_of = [self.read(self._text(answer)) for answer in self.prompts.answers(distinct)]
        scores = np.full(candidates.shape, -np.inf)
        for row, answer in enumerate(answers):
            said = None if answer is None else self.read(answer)
            hits = np.array([name_of[index] == said for index in place[row]])
            if hits.any():
                scores[row] = hits
        self.answered += sum(answer is not None for answer in answers)
        self.incomplete += sum(answer is None for answer in answers)
        self.valid += int(np.isfinite(scores[:, 0]).sum())
        return torch.from_numpy(scores)

    def _questions(self, history: np.ndarray, lengths: np.ndarray, candidates: np.ndarray) -> PromptBatch:
        """The prompts of an evaluation: candidates in an order that says nothing of the column they stand in."""
        listed = np.take_along_axis(candidates, shuffled_columns(candidates, self.seed), axis=1)
        return self.prompts.prompts(history, lengths, listed)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.backbone.tokenizer.decode(tokens, skip_special_tokens=True)

    @staticmethod
    def read(text: str) -> str:
        """The title that an answer names: its first line without surrounding quotes and spaces, in lower case."""
        line = text.strip().split("\n")[0]
        return line.strip().strip("\"'“”‘’").strip().casefold()

    def metrics(self) -> dict[str, float]:
        """ValidRatio over the answers since :meth:`reset`, and how many are missing where some are; empty where nothing
        was answered in words."""
        found = {"validratio": self.valid / self.answered} if self.answered else {}
        return found | ({"incomplete": float(self.incomplete)} if self.incomplete else {})
