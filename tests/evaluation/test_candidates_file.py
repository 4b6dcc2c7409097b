"""Candidate sets are written for other programs, and read as others wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recbole_llm.config.settings import make_config
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError
from recbole_llm.evaluation.candidates import draw_candidates
from recbole_llm.evaluation.evaluate import evaluate_ranking, identify_test_set
from recbole_llm.quick_start import compare


def build(chain_data, **settings):
    given = {"data_path": str(chain_data), "protocol": "retrieval", "eval_args": {"mode": "uni9"}, **settings}
    config = make_config("SASRec", "chain", config_dict=given)
    return config, TextSequentialDataset(config).build()[2]


def by_id(interaction, candidates):
    """A score that another program computes as easily: the number of the item's id."""
    return candidates.double()


def test_sets_are_neither_read_from_nor_written_to_a_pipe(chain_data):
    os.mkfifo("pipe")  # opened, it would wait for the other end
    config, split = build(chain_data, candidates_file="pipe")
    with pytest.raises(UserError, match="pipe is no regular file"):
        identify_test_set(split, config)


def test_sets_are_written_with_all_that_another_program_needs(chain_data):
    drawn_config, split = build(chain_data)
    config, _ = build(chain_data, candidates_file="sets.parquet")
    expected = identify_test_set(split, drawn_config)
    assert identify_test_set(split, config) == expected and Path("sets.parquet").is_file()
    assert identify_test_set(split, config) == expected, "now they are read"
    result = evaluate_ranking(by_id, split, config, "test")
    table = pl.read_parquet("sets.parquet")
    assert table.schema == {
        "user": pl.String, "target": pl.String, "candidates": pl.List(pl.String), "history": pl.List(pl.String),
    }  # fmt: skip
    # another program: the rank is one more than the candidates with a higher score
    score = split.field2token_id["item_id"]
    ranks = {
        row["user"]: 1 + sum(score[item] > score[row["target"]] for item in row["candidates"]) for row in table.to_dicts()
    }
    assert [ranks[user] for user in result.user_ids] == result.ranks.tolist()
    assert result.metrics["ndcg@10"] == pytest.approx(np.mean([1 / np.log2(1 + rank) for rank in ranks.values()]))
    kinds = [pl.String, pl.String, pl.Float64]
    inter = pl.read_csv(chain_data / "chain" / "chain.inter", separator="\t", schema_overrides=kinds)
    for row in table.to_dicts()[:5]:
        own = inter.filter(pl.col("user_id:token") == row["user"]).sort("timestamp:float", maintain_order=True)
        assert own["item_id:token"].to_list() == [*row["history"], row["target"]]
        assert len(row["candidates"]) == 9 and not set(row["candidates"]) & {*row["history"], row["target"]}


def test_another_programs_sets_are_used_exactly(chain_data):
    config, split = build(chain_data, candidates_file="other.parquet")
    identify_test_set(split, config)
    own = pl.read_parquet("other.parquet").sample(fraction=1.0, shuffle=True, seed=0)
    # two candidates for each, one of them twice; no history
    own.select("user", "target", candidates=pl.col("candidates").list.gather([0, 0, 1])).write_parquet("other.parquet")
    seen = []
    result = evaluate_ranking(lambda rows, sets: seen.append(sets) or by_id(rows, sets), split, config, "test")
    chosen = {row["user"]: row["candidates"] for row in own.to_dicts()}
    for user, row in zip(result.user_ids, torch.cat(seen).tolist(), strict=True):
        others = split.id2token("item_id", np.array(row[1:])).tolist()
        assert others == [chosen[user][0], chosen[user][0], chosen[user][1]]
    assert result.ranks.max() == 3, "an item that stands twice counts once"
    drawn = torch.from_numpy(draw_candidates(split, 3, config["seed"], "test"))
    assert result.test_set != identify_test_set(split, build(chain_data)[0]) and drawn.shape == torch.cat(seen).shape


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.with_columns(user=pl.lit("nobody")), "the user 'nobody' in .* is not in the data set"),
        (lambda t: t.with_columns(candidates=pl.Series([["1", "ghost"]] * len(t))), "the item .ghost. in .* not in the data"),
        (lambda t: t.head(len(t) - 1), "has no row of user '.*' with the target '.*'"),
        (lambda t: pl.concat([t, t.head(1)]), "has 1 rows that the test has not"),
        (lambda t: t.with_columns(candidates=pl.Series([["1"], *[["1", "2"]] * (len(t) - 1)])), "as many in all"),
        (lambda t: t.select("user", "target"), "no parquet file with user, target and candidates"),
    ],
)
def test_files_that_do_not_fit(chain_data, change, said):
    config, split = build(chain_data, candidates_file="sets.parquet")
    identify_test_set(split, config)
    change(pl.read_parquet("sets.parquet")).write_parquet("sets.parquet")
    with pytest.raises(UserError, match=said):
        identify_test_set(split, config)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"protocol": "full", "eval_args": {}, "candidates_file": "sets.parquet"}, "mode full samples no candidates"),
        ({"candidates_file": "nowhere/sets.parquet"}, "cannot be written"),
        ({"candidates_file": "text"}, "no parquet file"),
    ],
)
def test_it_is_said_before_anything_is_trained(chain_data, settings, said):
    Path("text").write_text("a,b")
    given = {"data_path": str(chain_data), "eval_args": {"mode": "uni9"}, "use_gpu": False, "checkpoint_dir": "saved"}
    given |= settings
    with pytest.raises(UserError, match=said):
        compare(["SASRec"], "chain", settings=given)
    assert not Path("saved").exists()
