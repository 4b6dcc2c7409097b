"""Candidates, ranks, metrics and paired tests: hand-computed values, RecBole's own code, and chance."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metrics_dict
from recbole.sampler import RepeatableSampler
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from scipy import stats
from sklearn.metrics import roc_auc_score

from recbole_llm.errors import UserError
from recbole_llm.evaluation import candidates as candidates_module
from recbole_llm.evaluation import evaluate as evaluation
from recbole_llm.evaluation import ranking, significance
from recbole_llm.evaluation.candidate_evaluation import CandidateEvaluation
from recbole_llm.evaluation.candidates import CandidateSampler, draw_candidates
from recbole_llm.evaluation.evaluate import evaluate_ranking, sample_rows
from recbole_llm.evaluation.protocols import EvaluationSettings, evaluation_mode
from recbole_llm.evaluation.ranking import (
    is_per_user,
    metrics_from_ranks,
    per_user,
    rank_in_catalogue,
    rank_of_target,
    split_metric,
)
from recbole_llm.evaluation.significance import auc_test, paired_test
from recbole_llm.evaluation.stock_scores import stock_scores
from recbole_llm.loss.softmax import target_counts

METRICS = ["ndcg", "hit", "mrr", "recall", "precision", "map"]


def make_split(histories: dict[int, list[int]], item_num: int, rows: list[tuple[int, int, float]]) -> SimpleNamespace:
    """A split with what the evaluation reads; ``rows`` are (user, target, time)."""
    users, targets, times = zip(*rows, strict=True)
    user_items = [np.unique(np.array(histories.get(user, []), dtype=np.int64)) for user in range(max(histories) + 1)]
    return SimpleNamespace(
        inter_feat=Interaction(
            {"user_id": torch.tensor(users), "item_id": torch.tensor(targets), "timestamp": torch.tensor(times)}
        ),
        uid_field="user_id",
        iid_field="item_id",
        time_field="timestamp",
        item_num=item_num,
        user_items=user_items,
        id2token=lambda field, ids: np.array([f"u{user}" for user in range(max(histories) + 1)])[ids],
        join=lambda batch: batch,
    )


def random_split(users: int, item_num: int, seed: int = 0, rows_per_user: int = 1) -> SimpleNamespace:
    generator = np.random.default_rng(seed)
    histories = {
        user: generator.choice(np.arange(1, item_num), generator.integers(2, item_num // 3), replace=False).tolist()
        for user in range(1, users + 1)
    }
    rows = [(user, items[place], float(place)) for user, items in histories.items() for place in range(rows_per_user)]
    return make_split(histories, item_num, rows)


def make_config(**changes) -> dict:
    base = {"seed": 7, "candidate_sampling": None, "metrics": METRICS, "topk": [1, 10]}
    mode = changes.pop("mode", "uni99")
    return {**base, "eval_args": {"mode": {"valid": mode, "test": mode}}, **changes}


# --- RecBole's own classes on ml-100k --------------------------------------------------------------------------------


def recbole_config(model: str, **changes) -> Config:
    """RecBole's Config reads the command line, which here is pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test"])
        return Config(
            model=model,
            dataset="ml-100k",
            config_dict={
                "MAX_ITEM_LIST_LENGTH": 10,
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "train_neg_sample_args": None,
                "loss_type": "CE",
                "hidden_size": 16,
                "inner_size": 32,
                "eval_args": {
                    "split": {"LS": "valid_and_test"},
                    "order": "TO",
                    "group_by": "user",
                    "mode": {"valid": "uni99", "test": "uni99"},
                },
                "metrics": METRICS,
                "topk": [1, 5, 10],
                "metric_decimal_place": 12,
                "eval_batch_size": 50_000,
                "use_gpu": False,
                "show_progress": False,
                "state": "ERROR",
                **changes,
            },
        )


@pytest.fixture(scope="module")
def movies():
    """ml-100k as RecBole splits it, users with 20 to 60 interactions, and SASRec's configuration."""
    config = recbole_config("SASRec", user_inter_num_interval="[20,60]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **keywords: None)
        dataset = create_dataset(config)
        users = dataset.inter_feat[dataset.uid_field].to_numpy()
        items = dataset.inter_feat[dataset.iid_field].to_numpy()
        splits = dict(zip(("train", "valid", "test"), dataset.build(), strict=True))
    user_items = [np.unique(items[users == user]) for user in range(dataset.user_num)]
    for split in splits.values():
        split.user_items = user_items
        split.splits = splits
    return SimpleNamespace(config=config, dataset=dataset, **splits)


def stock_model(movies, name: str):
    config = movies.config if name == "SASRec" else recbole_config(name, user_inter_num_interval="[20,60]")
    init_seed(3, reproducibility=True)
    return get_model(name)(config, movies.train)


# --- candidates ------------------------------------------------------------------------------------------------------


def test_candidates_are_the_target_and_distinct_items_the_user_never_met():
    split = random_split(users=300, item_num=60)
    candidates = draw_candidates(split, 25, seed=1, phase="test")
    assert candidates.shape == (300, 26) and candidates.dtype == np.int64
    np.testing.assert_array_equal(candidates[:, 0], split.inter_feat["item_id"].numpy())
    assert candidates.min() >= 1 and candidates.max() <= 59
    for user, row in zip(split.inter_feat["user_id"].tolist(), candidates, strict=True):
        assert len(set(row.tolist())) == 26
        assert not set(row[1:].tolist()) & set(split.user_items[user].tolist())


def test_candidates_can_be_all_the_items_that_are_left():
    split = make_split({1: [2, 3, 5], 2: [1]}, item_num=8, rows=[(1, 5, 0.0)])
    candidates = draw_candidates(split, 4, seed=1, phase="test")
    assert sorted(candidates[0, 1:].tolist()) == [1, 4, 6, 7]


def test_candidates_are_uniform_over_the_free_items():
    # 4,000 users with one and the same history: each of the 12 free items is expected 4,000 * 4 / 12 times.
    histories = {user: [3, 4, 9] for user in range(1, 4001)}
    split = make_split(histories, item_num=16, rows=[(user, 9, 0.0) for user in histories])
    drawn = draw_candidates(split, 4, seed=5, phase="valid")[:, 1:]
    free = [item for item in range(1, 16) if item not in (3, 4, 9)]
    counts = np.bincount(drawn.ravel(), minlength=16)
    assert counts[free].sum() == 16_000
    assert stats.chisquare(counts[free]).pvalue > 1e-3
    # Each column alone, and neighbouring users' draws against each other: the rows are independent.
    assert stats.chisquare(np.bincount(drawn[:, 0], minlength=16)[free]).pvalue > 1e-3
    pairs = stats.contingency.crosstab(drawn[:-1, 0], drawn[1:, 0]).count
    assert stats.chi2_contingency(pairs).pvalue > 1e-3


def test_candidates_do_not_change_between_versions():
    # A published candidate set must stay what it was.
    split = make_split({1: [2, 3, 5], 2: [1, 7]}, item_num=1000, rows=[(1, 5, 0.0), (2, 7, 0.0)])
    drawn = draw_candidates(split, 5, seed=2024, phase="test")
    np.testing.assert_array_equal(drawn, [[5, 532, 79, 213, 930, 154], [7, 140, 71, 65, 257, 269]])


def test_candidates_equal_the_draw_written_out_with_plain_integers():
    """One user, one item at a time: SplitMix64 streams, rejection of repeats, and the free items in a list."""

    def absorb(state: int, part: int) -> int:
        state = (state + (part + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    split = random_split(users=30, item_num=40, rows_per_user=2)
    drawn = draw_candidates(split, 20, seed=-3, phase="valid")
    start = int.from_bytes(hashlib.blake2b(b"candidates non_interacted valid\0-3", digest_size=8).digest(), "little")
    for row, (user, time) in enumerate(
        zip(split.inter_feat["user_id"].tolist(), split.inter_feat["timestamp"].tolist(), strict=True)
    ):
        stream = absorb(absorb(absorb(start, user), int(time)), 20)
        free = [item for item in range(1, 40) if item not in split.user_items[user]]
        expected, draw = [], 0
        while len(expected) < 20:
            item = free[int((absorb(stream, draw) >> 11) / 2**53 * len(free))]
            expected += [item] if item not in expected else []
            draw += 1
        assert drawn[row, 1:].tolist() == expected


@pytest.mark.parametrize("sampling", candidates_module.CANDIDATE_SAMPLINGS)
def test_candidates_do_not_depend_on_row_order_other_users_or_random_state(sampling):
    split = random_split(users=50, item_num=80, rows_per_user=2)
    whole = draw_candidates(split, 10, seed=1, phase="test", sampling=sampling)

    np.random.seed(0)
    torch.manual_seed(0)
    np.testing.assert_array_equal(draw_candidates(split, 10, seed=1, phase="test", sampling=sampling), whole)

    order = np.random.default_rng(4).permutation(100)
    shuffled = SimpleNamespace(**{**vars(split), "inter_feat": split.inter_feat[order]})
    np.testing.assert_array_equal(draw_candidates(shuffled, 10, 1, "test", sampling=sampling), whole[order])

    some = np.array([8, 3, 77])
    np.testing.assert_array_equal(draw_candidates(split, 10, 1, "test", sampling=sampling, rows=some), whole[some])

    only_user_9 = [items if user == 9 else items[:1] for user, items in enumerate(split.user_items)]
    rows_of_9 = split.inter_feat["user_id"].numpy() == 9
    alone = SimpleNamespace(
        **{**vars(split), "inter_feat": split.inter_feat[np.flatnonzero(rows_of_9)], "user_items": only_user_9}
    )
    np.testing.assert_array_equal(draw_candidates(alone, 10, 1, "test", sampling=sampling), whole[rows_of_9])


def test_candidates_depend_on_seed_phase_and_the_row_of_the_user():
    split = make_split({1: [7, 8]}, item_num=5000, rows=[(1, 7, 0.0), (1, 8, 1.0)])
    first = draw_candidates(split, 50, seed=1, phase="test")
    assert len(set(first[0, 1:].tolist()) & set(first[1, 1:].tolist())) < 10
    for other in (
        draw_candidates(split, 50, seed=2, phase="test"),
        draw_candidates(split, 50, seed=1, phase="valid"),
    ):
        assert len(set(first[0, 1:].tolist()) & set(other[0, 1:].tolist())) < 10


def test_recbole_sampling_leaves_out_only_the_target():
    histories = {user: [1, 2, 3] for user in range(1, 3001)}
    split = make_split(histories, item_num=6, rows=[(user, 2, 0.0) for user in histories])
    drawn = draw_candidates(split, 4, seed=0, phase="test", sampling="recbole")[:, 1:]
    counts = np.bincount(drawn.ravel(), minlength=6)
    assert counts[0] == 0 and counts[2] == 0
    assert stats.chisquare(counts[[1, 3, 4, 5]]).pvalue > 1e-3
    assert any(len(set(row)) < 4 for row in drawn.tolist())


def test_popularity_draws_in_proportion_to_interactions():
    histories = {user: [1, 2, 3, 4] for user in range(1, 2001)}
    # Targets over all splits: item 1 once per user, item 2 twice, item 3 three times; item 4 never.
    split = make_split(histories, item_num=5, rows=[(user, 2, 0.0) for user in histories])
    train = make_split(histories, 5, [(user, item, 0.0) for user in histories for item in (1, 2, 3, 3, 3)])
    split.splits = {"train": train, "test": split}
    drawn = draw_candidates(split, 4, 0, "test", sampling="recbole", distribution="popularity")[:, 1:]
    counts = np.bincount(drawn.ravel(), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert stats.chisquare(counts[[1, 3]], [2000, 6000]).pvalue > 1e-3


def test_popularity_counts_what_recbole_counts(movies):
    theirs = Counter(RepeatableSampler(["test"], movies.dataset, "popularity")._get_candidates_list())
    ours = candidates_module._popularity(movies.test)
    assert {item: count for item, count in enumerate(ours.tolist()) if count} == theirs
    config = make_config(mode="pop20", candidate_sampling="recbole")
    result = evaluate_ranking(stock_scores(stock_model(movies, "SASRec")), movies.test, config, "test")
    assert 0 < result.metrics["hit@10"] < 1


def test_too_few_items_is_an_error_that_names_the_mode_that_works():
    split = make_split({1: [1, 2], 2: [1, 2, 3, 4]}, item_num=10, rows=[(1, 2, 0.0), (2, 4, 0.0)])
    with pytest.raises(UserError, match=r"eval_args: mode uni6 \(valid\).*user 'u2' has only 5 of 9.*uni5 or lower"):
        draw_candidates(split, 6, seed=0, phase="valid")
    assert draw_candidates(split, 5, seed=0, phase="valid").shape == (2, 6)
    everything = make_split({1: [1, 2, 3]}, item_num=4, rows=[(1, 2, 0.0)])
    with pytest.raises(UserError, match="set it to full"):
        draw_candidates(everything, 1, seed=0, phase="valid")


def test_a_target_missing_from_user_items_is_refused():
    split = make_split({1: [1, 2]}, item_num=10, rows=[(1, 3, 0.0)])
    with pytest.raises(ValueError, match="user_items lacks the target"):
        draw_candidates(split, 2, seed=0, phase="test")


def test_unknown_sampling_names_the_nearest():
    split = make_split({1: [1, 2]}, item_num=10, rows=[(1, 2, 0.0)])
    with pytest.raises(UserError, match="did you mean 'non_interacted'"):
        draw_candidates(split, 2, seed=0, phase="test", sampling="non_interacted_items")


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 10), st.integers(0, 2**63), st.data())
def test_candidates_property(item_num, users, seed, data):
    histories = {
        user: sorted(data.draw(st.sets(st.integers(1, item_num - 1), min_size=1, max_size=item_num - 1)))
        for user in range(1, users + 1)
    }
    split = make_split(histories, item_num, [(user, items[-1], 0.0) for user, items in histories.items()])
    number = min(item_num - 1 - len(items) for items in histories.values())
    candidates = draw_candidates(split, number, seed, "test")
    for row, items in zip(candidates[:, 1:], histories.values(), strict=True):
        assert len(np.unique(row)) == number
        assert set(row.tolist()) <= set(range(1, item_num)) - set(items)


# --- RecBole's data loader and trainer see the same candidates -------------------------------------------------------


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_recboles_loader_serves_the_drawn_candidates(movies, phase):
    split = getattr(movies, phase)
    expected = draw_candidates(split, 99, movies.config["seed"], phase)
    by_user = dict(zip(split.inter_feat["user_id"].tolist(), expected.tolist(), strict=True))
    loader = NegSampleEvalDataLoader(movies.config, split, CandidateSampler(split, movies.config, phase))
    seen = {}
    for interaction, *_ in loader:
        for user, item in zip(interaction["user_id"].tolist(), interaction["item_id"].tolist(), strict=True):
            seen.setdefault(user, []).append(item)
    assert seen == by_user


def test_sampler_follows_recboles_order_for_several_rows(movies):
    sampler = CandidateSampler(movies.test, movies.config, "valid").set_phase("test")
    users = movies.test.inter_feat["user_id"][:3]
    items = movies.test.inter_feat["item_id"][:3]
    served = sampler.sample_by_user_ids(users.numpy(), items.numpy(), 5)
    expected = draw_candidates(movies.test, 5, movies.config["seed"], "test")[:3, 1:]
    np.testing.assert_array_equal(served.view(5, 3).T.numpy(), expected)
    assert len(sampler.sample_by_user_ids(users.numpy(), items.numpy(), 7)) == 21
    assert sampler.used_ids[int(users[0])] == set(movies.test.user_items[int(users[0])].tolist())
    with pytest.raises(ValueError, match="not a row"):
        sampler.sample_by_user_ids(users.numpy(), [0, 0, 0], 5)
    with pytest.raises(UserError, match="uniN or full"):
        sampler.set_distribution("popularity")


def test_a_row_that_stands_twice_gets_two_draws():
    split = make_split({1: [4, 5], 2: [6]}, item_num=500, rows=[(1, 4, 0.0), (2, 6, 0.0), (1, 4, 3.0)])
    sampler = CandidateSampler(split, make_config(), "test")
    served = sampler.sample_by_user_ids([1, 1], [4, 4], 20).view(20, 2).T
    expected = draw_candidates(split, 20, 7, "test")[[0, 2], 1:]
    np.testing.assert_array_equal(served.numpy(), expected)
    assert set(served[0].tolist()) != set(served[1].tolist())


@pytest.mark.parametrize("sampling", candidates_module.CANDIDATE_SAMPLINGS)
def test_recboles_trainer_finds_the_same_metrics(movies, sampling, tmp_path, monkeypatch):
    """The whole of RecBole's path (loader, predict, top-k, metric classes) against ours."""
    monkeypatch.chdir(tmp_path)
    config = movies.config
    config["candidate_sampling"] = sampling
    try:
        model = stock_model(movies, "SASRec")
        loader = NegSampleEvalDataLoader(config, movies.test, CandidateSampler(movies.test, config, "test"))
        theirs = Trainer(config, model).evaluate(loader, load_best_model=False)
        ours = evaluate_ranking(stock_scores(model), movies.test, config, "test")
    finally:
        config["candidate_sampling"] = None
    assert list(ours.metrics) == list(theirs)
    assert ours.metrics == pytest.approx(dict(theirs), abs=1e-9)
    assert 0 < ours.metrics["ndcg@10"] < 1


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_rank_counts_the_better_candidates(kind):
    scores = kind([[0.5, 0.1, 0.2], [0.1, 0.5, 0.0], [-1.0, 0.0, 1.0]])
    assert rank_of_target(scores, seed=0).tolist() == [1, 2, 3]


def test_ties_are_broken_uniformly_and_alike_for_every_model():
    scores = torch.zeros(6000, 4)
    scores[:, 3] = -1.0  # the target shares ranks 1 to 3 with two others
    ranks = rank_of_target(scores, seed=11)
    assert stats.chisquare(np.bincount(ranks)[1:]).pvalue > 1e-3
    np.testing.assert_array_equal(ranks, rank_of_target(scores * 3 + 8, seed=11))
    assert (ranks != rank_of_target(scores, seed=12)).mean() > 0.5
    names = np.arange(6000)
    reordered = np.random.default_rng(0).permutation(names)
    np.testing.assert_array_equal(rank_of_target(scores, seed=11, positions=reordered), ranks[reordered])


def test_a_model_that_scores_everything_the_same_gets_the_chance_level():
    split = random_split(users=20_000, item_num=12)
    split.user_items = [items[:1] for items in split.user_items]
    split.inter_feat["item_id"] = torch.tensor([items[0] for items in split.user_items[1:]])
    config = make_config(mode="uni9", topk=[5])
    result = evaluate_ranking(lambda rows, candidates: torch.ones(candidates.shape), split, config, "test")
    # Ten candidates, ranks uniform on 1 .. 10.
    discounts = np.where(np.arange(1, 11) <= 5, 1 / np.log2(np.arange(1, 11) + 1), 0.0)
    assert result.metrics["hit@5"] == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 20_000))
    assert result.metrics["ndcg@5"] == pytest.approx(discounts.mean(), abs=4 * discounts.std() / np.sqrt(20_000))


def test_chance_level_of_the_papers_protocol():
    ranks = rank_of_target(np.zeros((40_000, 100), dtype=np.float32), seed=3)
    metrics = metrics_from_ranks(ranks, ["ndcg", "hit"], [10])
    discounts = np.zeros(100)
    discounts[:10] = 1 / np.log2(np.arange(2, 12))  # mean .0454
    assert metrics["hit@10"] == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 40_000))
    assert metrics["ndcg@10"] == pytest.approx(discounts.mean(), abs=4 * discounts.std() / np.sqrt(40_000))


def test_nan_ranks_last_and_is_reported(caplog):
    nan = float("nan")
    scores = torch.tensor([[nan, 0.0, 1.0], [5.0, nan, 1.0], [5.0, 0.0, 1.0]])
    with caplog.at_level(logging.WARNING):
        assert rank_of_target(scores, seed=0).tolist() == [3, 3, 1]
    assert "2 of 3 rows" in caplog.text


def test_an_unanswered_row_ranks_last_without_a_warning(caplog):
    scores = torch.tensor([[float("-inf")] * 4, [1.0, 0.0, 0.0, float("-inf")]])
    assert rank_of_target(scores, seed=0).tolist() == [4, 1]
    counted = torch.tensor([[True, True, False, True], [True] * 4])
    assert rank_of_target(scores, seed=0, counted=counted).tolist() == [3, 1]
    assert not caplog.records


def test_infinite_scores_are_scores():
    inf = float("inf")
    assert rank_of_target(torch.tensor([[inf, 0.0], [-inf, 0.0]]), seed=0).tolist() == [1, 2]


def test_columns_left_out_are_not_counted():
    scores = torch.tensor([[0.0, 1.0, 1.0, -1.0]])
    assert rank_of_target(scores, 0).tolist() == [3]
    assert rank_of_target(scores, 0, counted=torch.tensor([[True, True, False, True]])).tolist() == [2]


def test_rank_in_catalogue_leaves_out_the_padding_and_equals_rank_of_target(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 40)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (23, 9), generator=generator).float()  # many ties
    scores[:, 0] = 100.0
    targets = torch.randint(1, 9, (23,), generator=generator)
    ranks = rank_in_catalogue(scores, targets, seed=2)
    others = torch.tensor([[item for item in range(1, 9) if item != target] for target in targets.tolist()])
    columns = torch.cat([targets[:, None], others], dim=1)
    np.testing.assert_array_equal(ranks, rank_of_target(scores.gather(1, columns), seed=2))
    assert set(ranks.tolist()) <= set(range(1, 9)) and len(set(ranks.tolist())) > 3
    scores[4, 3] = float("nan")
    scores[5, 0] = float("nan")  # padding: nobody's business
    with_nan = rank_in_catalogue(scores.numpy(), targets.numpy(), seed=2)
    assert with_nan[4] == 8 and with_nan[5] == ranks[5]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    ranks = np.array([1, 2, 4, 11])
    values = metrics_from_ranks(ranks, ["NDCG", "Hit", "MRR", "Precision"], [2, 10])
    assert values == pytest.approx(
        {
            "ndcg@2": (1 + 0.63093) / 4,  # 1 / log2(3) = .63093
            "ndcg@10": (1 + 0.63093 + 0.43068) / 4,  # 1 / log2(5) = .43068
            "hit@2": 0.5,
            "hit@10": 0.75,
            "mrr@2": (1 + 1 / 2) / 4,
            "mrr@10": (1 + 1 / 2 + 1 / 4) / 4,
            "precision@2": 0.25,
            "precision@10": 0.075,
        },
        abs=1e-5,
    )
    assert list(values) == ["ndcg@2", "ndcg@10", "hit@2", "hit@10", "mrr@2", "mrr@10", "precision@2", "precision@10"]
    assert metrics_from_ranks(ranks, ["ndcg"], [10], decimals=2) == {"ndcg@10": 0.52}
    np.testing.assert_allclose(per_user(ranks, "NDCG", 2), [1, 0.63093, 0, 0], atol=1e-5)


def test_metrics_equal_recboles_classes(movies):  # the fixture's Config restores np.float, which they use
    ranks = np.random.default_rng(1).integers(1, 60, size=500)
    topk = [1, 3, 10, 20]
    hits = (ranks[:, None] == np.arange(1, max(topk) + 1)).astype(np.int64)
    data = DataStruct()
    data.set("rec.topk", torch.from_numpy(np.c_[hits, np.ones(500, dtype=np.int64)]))
    theirs = {}
    for metric in METRICS:
        theirs.update(metrics_dict[metric]({"topk": topk, "metric_decimal_place": 4}).calculate_metric(data))
    ours = metrics_from_ranks(ranks, METRICS, topk, decimals=4)
    assert list(ours) == list(theirs)
    assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ItemCoverage", "'ItemCoverage' needs more than the rank.*ndcg, hit, mrr, recall, precision, map"),
        ("giniindex", "needs more than the rank"),
        ("ndgc", "did you mean 'ndcg'"),
    ],
)
def test_other_metrics_are_refused_by_name(metric, message):
    with pytest.raises(UserError, match=message):
        metrics_from_ranks(np.array([1]), ["ndcg", metric], [10])


def test_metric_names():
    assert split_metric("NDCG@10") == ("ndcg", 10)
    with pytest.raises(UserError, match="ndcg@10"):
        split_metric("NDCG")


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_by_hand():
    """Scores are item ids; the target's rank is one more than the number of larger candidates."""
    split = make_split({1: [2, 9], 2: [4, 5], 3: [1]}, item_num=10, rows=[(2, 5, 0.0), (1, 9, 0.0), (3, 1, 0.0)])
    batches = []

    def score_rows(rows, candidates):
        batches.append(rows)
        assert "item_id" not in rows.columns
        return candidates.float()

    result = evaluate_ranking(
        score_rows, split, make_config(mode="uni7", topk=[1]), "test", rows=[1, 0], eval_batch_rows=1
    )
    assert [rows["user_id"].tolist() for rows in batches] == [[1], [2]]
    assert result.user_ids.tolist() == ["u1", "u2"]
    assert result.rows.tolist() == [1, 0]
    assert result.ranks.tolist() == [1, 5]  # of user 2's seven free items 6, 7, 8 and 9 are larger than 5
    assert result.metrics["hit@1"] == 0.5
    assert result.seconds > 0

    full = evaluate_ranking(
        lambda rows, candidates: torch.arange(10.0).expand(len(rows), -1), split, make_config(mode="full"), "test"
    )
    assert full.ranks.tolist() == [5, 1, 9]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_and_subsets_change_nothing(batch):
    split = random_split(users=40, item_num=300, rows_per_user=2)
    config = make_config(mode="uni20")

    def coarse(rows, candidates):
        return ((rows["user_id"][:, None] + candidates) % 3).float()  # ties in every row

    whole = evaluate_ranking(coarse, split, config, "valid", eval_batch_rows=64)
    np.testing.assert_array_equal(
        evaluate_ranking(coarse, split, config, "valid", eval_batch_rows=batch).ranks, whole.ranks
    )
    some = np.array([5, 79, 0])
    part = evaluate_ranking(coarse, split, config, "valid", rows=some, eval_batch_rows=batch)
    np.testing.assert_array_equal(part.ranks, whole.ranks[some])
    order = np.random.default_rng(0).permutation(80)
    shuffled = SimpleNamespace(**{**vars(split), "inter_feat": split.inter_feat[order]})
    moved = evaluate_ranking(coarse, shuffled, config, "valid", eval_batch_rows=batch)
    np.testing.assert_array_equal(moved.ranks, whole.ranks[order])


def test_subsets_of_a_full_ranking():
    split = random_split(users=40, item_num=30)
    config = make_config(mode="full")

    def coarse(rows, candidates):
        return (rows["user_id"][:, None] + torch.arange(30)) % 5

    whole = evaluate_ranking(coarse, split, config, "test")
    assert len(set(whole.ranks.tolist())) > 10
    some = np.array([31, 2])
    np.testing.assert_array_equal(evaluate_ranking(coarse, split, config, "test", rows=some).ranks, whole.ranks[some])


def test_evaluation_refuses_what_it_cannot_do():
    split = random_split(users=3, item_num=300)
    for mode in ("labeled", "uni0", "uni", "uni9.5"):
        with pytest.raises(UserError, match=rf"eval_args: mode '{mode}' \(test\) is not supported"):
            evaluate_ranking(lambda rows, candidates: None, split, make_config(mode=mode), "test")
    with pytest.raises(UserError, match="giniindex"):
        evaluate_ranking(lambda rows, candidates: None, split, make_config(metrics=["giniindex"]), "test")
    with pytest.raises(UserError, match="no rows"):
        evaluate_ranking(lambda rows, candidates: None, split, make_config(), "test", rows=[])
    with pytest.raises(ValueError, match=r"\(3, 5\) scores for \(3, 100\)"):
        evaluate_ranking(lambda rows, candidates: torch.zeros(3, 5), split, make_config(), "test")
    assert evaluation_mode(EvaluationSettings.of_config({"eval_args": {"mode": "full"}}), "test") is None
    assert evaluation_mode(EvaluationSettings.of_config(make_config(mode="uni19")), "valid") == ("uniform", 19)
    assert evaluation_mode(EvaluationSettings.of_config(make_config(mode="pop5")), "valid") == ("popularity", 5)
    with pytest.raises(UserError, match="mode pop99 .*use uni99, or candidate_sampling: recbole"):
        evaluate_ranking(lambda rows, candidates: None, split, make_config(mode="pop99"), "test")


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "Caser", "BERT4Rec"])
def test_stock_models_score_alike_with_and_without_full_sort(movies, name, monkeypatch):
    model = stock_model(movies, name)
    model.train()  # dropout must be off during scoring, and on again after it
    rows = evaluation._rows_without_targets(movies.test, np.arange(40))
    candidates = torch.from_numpy(draw_candidates(movies.test, 9, 1, "test", rows=np.arange(40)))
    fast = stock_scores(model, max_scores=model.n_items * 7)(rows, candidates)
    catalogue = stock_scores(model)(rows, None)
    assert model.training
    assert fast.std() > 0

    def absent(self, interaction):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "full_sort_predict", absent)
    slow = stock_scores(model, max_rows=33)
    torch.testing.assert_close(slow(rows, candidates), fast, atol=1e-5, rtol=0)
    few = rows[np.arange(2)]
    torch.testing.assert_close(slow(few, None)[:, 1:], catalogue[:2, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(catalogue.gather(1, candidates), fast, atol=1e-5, rtol=0)


def test_scores_of_a_models_special_tokens_are_left_out():
    model = SimpleNamespace(
        device="cpu",
        n_items=4,
        training=False,
        eval=lambda: None,
        train=lambda mode: None,
        full_sort_predict=lambda rows: torch.arange(5.0).repeat(len(rows)),  # flat, and with a mask token at the end
    )
    rows = Interaction({"user_id": torch.tensor([1, 2])})
    assert stock_scores(model)(rows, None).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2


def test_full_ranking_equals_recboles(movies, tmp_path, monkeypatch):
    """RecBole's full-sort trainer path against mode full."""
    from recbole.data.dataloader import FullSortEvalDataLoader

    monkeypatch.chdir(tmp_path)
    config = recbole_config(
        "SASRec",
        user_inter_num_interval="[20,60]",
        eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    )
    model = stock_model(movies, "SASRec")
    theirs = Trainer(config, model).evaluate(FullSortEvalDataLoader(config, movies.test, None), load_best_model=False)
    ours = evaluate_ranking(stock_scores(model), movies.test, config, "test")
    assert ours.metrics == pytest.approx(dict(theirs), abs=1e-9)
    assert ours.metrics["ndcg@10"] > 0

    def rank_targets(rows, targets):
        users = model.forward(rows["item_id_list"], rows["item_length"])
        return target_counts(users, model.item_embedding.weight[1:], targets - 1, chunk_items=100)

    counted = evaluate_ranking(None, movies.test, config, "test", rank_targets=rank_targets)
    assert counted.metrics == pytest.approx(dict(theirs), abs=1e-9)


class ItemHead:
    """Scores a user by the rows of an item head; small integers, so that many scores are equal."""

    def __init__(self, users: int, item_num: int):
        generator = torch.Generator().manual_seed(4)
        self.hidden = torch.randint(-2, 3, (users + 1, 3), generator=generator).float()
        self.weight = torch.randint(-2, 3, (item_num - 1, 3), generator=generator).float()

    def eval(self):
        pass

    def score(self, rows, candidates):
        scores = self.hidden[rows["user_id"]] @ self.weight.T
        return torch.cat([torch.full((len(rows), 1), 100.0), scores], dim=1)  # the padding's score is nobody's business

    def rank_targets(self, rows, targets):
        assert "item_id" not in rows.columns
        return target_counts(self.hidden[rows["user_id"]], self.weight, targets - 1, chunk_items=7)


def test_counting_gives_the_ranks_of_the_whole_table(caplog):
    split, model, config = random_split(users=60, item_num=50), ItemHead(60, 50), make_config(mode="full")
    model.hidden[9] = float("nan")
    some = np.array([31, 2, 8, 50])
    for rows in (None, some):
        with caplog.at_level(logging.WARNING):
            table = evaluate_ranking(model.score, split, config, "test", rows=rows)
            counted = evaluate_ranking(None, split, config, "test", rows=rows, rank_targets=model.rank_targets)
        np.testing.assert_array_equal(counted.ranks, table.ranks)
        assert counted.metrics == table.metrics
    assert counted.ranks[2] == 49 and caplog.text.count("they rank last") == 4  # row 8 is user 9
    other = evaluate_ranking(None, split, {**config, "seed": 8}, "test", rows=some, rank_targets=model.rank_targets)
    assert (other.ranks != counted.ranks).any()  # there are ties, and they are drawn


def test_sampled_candidates_are_scored_and_not_counted():
    split = random_split(users=60, item_num=50)

    def rank_targets(rows, targets):
        raise AssertionError("counts are of the whole catalogue")

    evaluate_ranking(lambda rows, drawn: drawn.float(), split, make_config(mode="uni9"), "test", rank_targets=rank_targets)


def test_trainers_count_where_the_model_can():
    split = random_split(users=60, item_num=50)
    split.splits = {"valid": None, "test": split}
    trainer = CandidateEvaluation()
    trainer.model = ItemHead(60, 50)
    trainer.config = make_config(mode="full", eval_batch_rows=16)
    trainer.wandblogger = SimpleNamespace(log_eval_metrics=lambda metrics, head: None)
    expected = evaluate_ranking(trainer.model.score, split, trainer.config, "test")
    trainer._scores = lambda: (None, None)
    assert trainer.evaluate(SimpleNamespace(_dataset=split), load_best_model=False) == expected.metrics


def test_a_pool_bounds_the_items_that_are_drawn():
    split = random_split(users=50, item_num=2000)
    drawn = draw_candidates(split, 20, seed=1, phase="valid", pool=60)
    targets = split.inter_feat["item_id"].numpy()
    assert (drawn[:, 0] == targets).all()
    others = drawn[:, 1:]
    assert len(np.unique(others)) > 30, "the pool is used, not its first items alone"
    assert len(np.unique(others)) <= 60
    for user, row in zip(split.inter_feat["user_id"].tolist(), others, strict=True):
        assert len(set(row.tolist())) == 20 and not set(row.tolist()) & set(split.user_items[user].tolist())
    assert (draw_candidates(split, 20, seed=1, phase="valid", pool=60, rows=np.arange(3)) == drawn[:3]).all()
    assert (draw_candidates(split, 20, seed=2, phase="valid", pool=60) != drawn).any()


def test_a_pool_holds_all_draws_of_users_who_have_little():
    split = make_split({user: [user, user + 100] for user in range(1, 41)}, 2000, [(u, u, 0.0) for u in range(1, 41)])
    others = draw_candidates(split, 20, seed=1, phase="valid", pool=30)[:, 1:]
    assert len(np.unique(others)) == 30
    counts = np.bincount(others.ravel())
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3, "uniform within the pool"


def test_a_pool_smaller_than_the_draw_is_filled_up_from_the_catalogue():
    split = make_split({1: list(range(1, 90))}, item_num=101, rows=[(1, 5, 0.0)])
    drawn = draw_candidates(split, 11, seed=1, phase="valid", pool=5)
    assert sorted(drawn[0, 1:]) == list(range(90, 101))


def test_validation_sample_is_whole_users_and_independent_of_row_order():
    split = random_split(users=30, item_num=50, rows_per_user=2)
    rows = sample_rows(split, 7, seed=1)
    users = split.inter_feat["user_id"].numpy()
    chosen = set(users[rows].tolist())
    assert len(rows) == 14 and len(chosen) == 7
    order = np.random.default_rng(0).permutation(60)
    shuffled = SimpleNamespace(**{**vars(split), "inter_feat": split.inter_feat[order]})
    assert set(users[order][sample_rows(shuffled, 7, seed=1)].tolist()) == chosen
    assert set(users[sample_rows(split, 7, seed=2)].tolist()) != chosen
    for everyone in (None, 0, 30, 1000):
        assert sample_rows(split, everyone, seed=1).tolist() == list(range(60))


# --- paired tests ----------------------------------------------------------------------------------------------------


def delong(labels, a, b):
    """The paper's formulas, pair by pair: the areas, and the standard error of their difference."""
    liked, others = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    pairs = [
        np.array([[float(values[i] > values[j]) + 0.5 * float(values[i] == values[j]) for j in others] for i in liked])
        for values in (a, b)
    ]
    covariance = np.cov([pair.mean(axis=1) for pair in pairs]) / len(liked)
    covariance += np.cov([pair.mean(axis=0) for pair in pairs]) / len(others)
    contrast = np.array([1, -1])
    return [pair.mean() for pair in pairs], np.sqrt(contrast @ covariance @ contrast)


def test_auc_test_equals_the_papers_formulas():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    a, b = (np.round(rng.normal(size=60) + strength * labels, 1) for strength in (1.0, 0.3))  # rounded: with ties
    (area_a, area_b), error = delong(labels, a, b)
    assert [area_a, area_b] == pytest.approx([roc_auc_score(labels, a), roc_auc_score(labels, b)])
    found = auc_test(labels, a[None], b[None])
    assert found["difference"] == pytest.approx(area_a - area_b) and found["users"] == 60
    assert found["p_value"] == pytest.approx(2 * stats.norm.sf(abs(area_a - area_b) / error))
    assert [found["low"], found["high"]] == pytest.approx(area_a - area_b + 1.959964 * error * np.array([-1, 1]))
    assert auc_test(labels, a[None], a[None])["p_value"] == 1.0
    assert auc_test(labels, labels[None], 1 - labels[None])["p_value"] == 0.0
    seeds = auc_test(labels, np.stack([a, b]), np.stack([b, b]))
    assert seeds["difference"] == pytest.approx((area_a - area_b) / 2) and seeds["p_value"] == pytest.approx(found["p_value"])


def test_auc_test_claims_a_difference_as_often_as_it_says():
    rng = np.random.default_rng(1)
    labels = np.repeat([1, 0], [60, 40])
    common = rng.normal(size=(1000, 100))  # equally good models that share most of what they see
    p_values = [
        auc_test(labels, *(0.7 * labels + seen + 0.6 * rng.normal(size=(1, 100)) for _ in "ab"))["p_value"]
        for seen in common
    ]
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.075


def test_paired_test_by_hand():
    # Five of 1,000 users differ, all in favour of a: 2 of the 32 sign patterns are as extreme.
    a = np.r_[np.ones(5), np.zeros(995)]
    result = paired_test(a, np.zeros(1000))
    assert result["p_value"] == pytest.approx(2 / 32)
    assert result["difference"] == pytest.approx(0.005)
    assert (result["low"], result["high"]) == pytest.approx((0.0, 0.01))
    assert stats.ttest_rel(a, np.zeros(1000)).pvalue < 0.03  # the claim that a t-test would make
    # A sixth makes it 2 of 64.
    six = paired_test(np.r_[np.ones(6), np.zeros(994)], np.zeros(1000))
    assert six["p_value"] == pytest.approx(2 / 64) and six["low"] > 0
    # Differences .1, .2, -.4: the sums +-.1 +-.2 +-.4 are all but two at least .1 in size.
    three = paired_test(np.array([0.1, 0.2, 0.0]), np.array([0.0, 0.0, 0.4]))
    assert three["difference"] == pytest.approx(-0.1 / 3)
    assert three["p_value"] == pytest.approx(1.0)


def test_paired_test_of_equal_models():
    same = paired_test(np.ones(10), np.ones(10))
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "users": 10}


def test_paired_test_agrees_with_the_t_test_where_many_users_differ():
    generator = np.random.default_rng(2)
    a = generator.random(800)
    b = a + generator.normal(0.012, 0.2, 800)
    ours, theirs = paired_test(b, a), stats.ttest_rel(b, a)
    interval = theirs.confidence_interval(0.95)
    assert ours["p_value"] == pytest.approx(theirs.pvalue, abs=0.015)
    assert (ours["low"], ours["high"]) == pytest.approx((interval.low, interval.high), abs=1e-3)
    assert paired_test(b, a) == ours
    reverse = paired_test(a, b)
    assert reverse["difference"] == -ours["difference"] and reverse["p_value"] == pytest.approx(
        ours["p_value"], abs=0.01
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.37, 0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=40))
def test_interval_and_p_value_never_disagree(differences):
    result = paired_test(np.array(differences), np.zeros(len(differences)))
    assert 0 < result["p_value"] <= 1
    assert (result["low"] > 0 or result["high"] < 0) == (result["p_value"] <= 0.05)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=11))
def test_equal_sums_count_as_equal_whatever_their_last_bits(differences):
    whole = np.array(differences, dtype=np.float64)
    assert paired_test(whole * 0.1, 0 * whole)["p_value"] == paired_test(whole, 0 * whole)["p_value"]


def test_paired_test_keeps_its_level():
    """Two equally good models: a difference is claimed in about 5% of the trials, and not more."""
    generator = np.random.default_rng(0)
    claims = [
        paired_test(generator.integers(0, 2, 12).astype(float), generator.integers(0, 2, 12).astype(float))["p_value"]
        <= 0.05
        for _ in range(1000)
    ]
    assert np.mean(claims) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert np.mean(claims) > 0


def test_values_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        paired_test(np.ones(3), np.ones(4))


def test_holm():
    # Sorted: .01 * 3, max(.03, .02 * 2) = .04, max(.04, .04 * 1) = .04
    assert significance.holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    assert significance.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_mrr_without_a_cut_off_counts_every_rank():
    ranks = np.array([1, 4, 50])
    values = metrics_from_ranks(ranks, ["MRR", "MRR@all"], [10])
    assert values == {"mrr@10": pytest.approx((1 + 1 / 4) / 3), "mrr@all": pytest.approx((1 + 1 / 4 + 1 / 50) / 3)}
    assert split_metric("MRR@all") == split_metric("mrr@all") and is_per_user("mrr@all")
    assert per_user(ranks, *split_metric("mrr@all")).tolist() == [1, 1 / 4, 1 / 50]
