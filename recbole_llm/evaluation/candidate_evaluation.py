"""Trainer mix-in that evaluates on shared candidates, for RecBole's trainers and ours."""

from __future__ import annotations

from typing import Any

import torch

from recbole_llm.evaluation.evaluate import LabelResult, PredictRows, RankingResult, ScoreRows, evaluate, rows_of_phase
from recbole_llm.evaluation.protocols import EvaluationSettings
from recbole_llm.evaluation.stock_scores import stock_predictions, stock_scores


class CandidateEvaluation:
    """``evaluate`` ranks each user's candidates, which are the same for every model of a run, or compares predicted labels.

    RecBole's own loop scores one row per user and candidate, redraws the candidates at each evaluation, and gives ties
    to the lower item id. A model with a method ``rank_targets`` ranks the whole catalogue by it
    (:func:`~recbole_llm.evaluation.evaluate.evaluate_ranking`).

    Attributes:
        last_ranking: the result of the last evaluation, with the rank (or the label) of every user's target.
        predicts_probabilities: whether what the model predicts of an item is a probability.
        test_config: of a test under a further protocol; None: the training's own.
    """

    # RecBole's Trainer has these.
    config: Any
    device: torch.device
    model: Any
    saved_model_file: str
    wandblogger: Any

    last_ranking: RankingResult | LabelResult | None = None
    predicts_probabilities = False
    test_config: Any = None

    def _load_best(self, file: str) -> None:
        # Trusted: RecBole's own pickle, written by this very run.
        weights = torch.load(file, map_location=self.device, weights_only=False)
        self.model.load_state_dict(weights["state_dict"])
        self.model.load_other_parameter(weights.get("other_parameter"))

    def _scores(self) -> tuple[ScoreRows, PredictRows]:
        return stock_scores(self.model), stock_predictions(self.model)

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate on ``eval_data``; arguments and result as RecBole's ``Trainer.evaluate``."""
        if not eval_data:
            return None
        if load_best_model:
            self._load_best(model_file or self.saved_model_file)
        self.model.eval()
        split = eval_data._dataset
        config = self.test_config or self.config
        settings = EvaluationSettings.of_config(config)
        phase = "valid" if split is split.splits["valid"] else "test"
        rows, pool = rows_of_phase(split, settings, phase)
        self.last_ranking = evaluate(
            *self._scores(),
            split,
            config,
            phase,
            rows=rows,
            pool=pool,
            probabilities=self.predicts_probabilities,
            progress=show_progress,
            eval_batch_rows=settings.eval_batch_rows or 512,
            rank_targets=getattr(self.model, "rank_targets", None),
        )
        if phase == "test":  # those of a validation are logged by the training
            head = "test" if self.test_config is None else f"test_{config['protocol']}"
            self.wandblogger.log_eval_metrics(self.last_ranking.metrics, head=head)
        return self.last_ranking.metrics
