"""The runner's table, against tables and numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from recbole_llm.errors import UserError
from recbole_llm.evaluation.intervals import effect_size
from recbole_llm.evaluation.ranking import metrics_from_ranks
from recbole_llm.evaluation.significance import auc_test
from recbole_llm.results import table as report
from recbole_llm.results.comparison import Line, compare_rows
from recbole_llm.results.table import format_table


def make_row(model, ranks, seed=1, users=None, metrics=("ndcg", "hit"), topk=(2,), **changes):
    ranks = np.array(ranks)
    return {
        "model": model,
        "dataset": "ml-100k",
        "seed": seed,
        "role": "model",
        "metrics": metrics_from_ranks(ranks, metrics, topk),
        "users": len(ranks),
        "trained_parameters": 123_456,
        "train_seconds": 90.0,
        "eval_seconds": 12.0,
        "ranks": ranks,
        "user_ids": np.array([f"u{user}" for user in range(len(ranks))] if users is None else users),
        "valid_metric": "NDCG@2",
        **changes,
    }


def judged_row(model, values, labels=(1, 1, 1, 0, 0, 0), **changes):
    judged = {"labels": np.array(labels), "values": np.array(values), "metrics": {"auc": roc_auc_score(labels, values)}}
    row = {**make_row(model, [1] * len(labels)), "valid_metric": "AUC", **judged, **changes}
    del row["ranks"]
    return row


def failed_row(model, seed=1, error="no such file: bring one."):
    return {"model": model, "dataset": "ml-100k", "seed": seed, "error": error}


def line_of(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(name))


# --- the table -------------------------------------------------------------------------------------------------------


def test_table_by_hand():
    """Ranks 1, 2, 3, 3 give NDCG@2 = (1 + .63093) / 4; all first gives 1; three differences of one sign: p = 2/8.

    Of the 256 ways to draw four users from differences 0, .36907, 1, 1, one has the mean 0, four .0923, six .1845 (so that
    2.5 % end there) and sixteen 1. Effect: .59227, divided by their standard deviation .49432.
    """
    rows = [
        make_row("SASRec", [1, 2, 3, 3], trained_parameters=950),
        make_row("LLMSTAR", [1, 1, 1, 1], trained_parameters=5_250_000, train_seconds=660.0, eval_seconds=30.0),
    ]
    assert (
        format_table(rows)
        == """\
ml-100k · 4 users · seed 1

model    ndcg@2   hit@2   ndcg@2 vs SASRec      95 % interval  effect  params  minutes
--------------------------------------------------------------------------------------
SASRec    .4077   .5000                  -                  -       -     950      1.7
LLMSTAR  1.0000  1.0000  +.5923 (p=.250)    [+.1845, +1.0000]   +1.20   5.25M     11.5

* p < .05. Differences in ndcg@2 to SASRec are paired by user; p is from a two-sided sign-flip test. It speaks of other
    users, not of other training seeds.
95 % interval: of the difference, bootstrap over users (10,000 draws), not corrected. effect: the mean difference
    divided by the standard deviation of the users' differences.
params: trained parameters. minutes: training and test."""
    )


def described(row, role="model", **settings):
    """A row whose run is described, with its settings."""
    return {**row, "role": role, "record": {"settings": {"device": "cpu", **settings}}}


def test_runs_of_one_model_are_told_apart_by_the_settings_in_which_they_differ():
    rows = [
        described(make_row("LLMSTAR", [1, 2], seed=1), beta=0, alpha=1),
        described(make_row("LLMSTAR", [1, 3], seed=1), beta=0.5, alpha=1),
        described(make_row("LLMSTAR", [1, 1], seed=2), beta=0, alpha=1, device="cuda"),  # where it ran tells nothing
        described(make_row("SASRec", [1, 2], seed=1), hidden_size=64),
    ]
    names = [line.label for line in compare_rows(rows)[0].lines]
    assert names == ["LLMSTAR beta=0", "LLMSTAR beta=0.5", "SASRec"]
    many = [described(make_row("A", [1, place]), a=place, b=place, c=place, d=place, e="x" * 99) for place in (1, 2)]
    assert [line.label for line in compare_rows(many)[0].lines] == [f"A a={n} b={n} c={n} and 1 more" for n in (1, 2)]


def test_a_teacher_that_is_a_model_too_counts_once():
    """p = 2/64 = .031 alone; beside its own copy as a teacher it would be doubled by the correction."""
    base, better = make_row("SASRec", [2] * 12), make_row("LLMSTAR", [1] * 6 + [2] * 6)
    teacher = {**make_row("SASRec", [2] * 12, role="teacher"), "record": {"settings": {"teacher_training": "prefix"}}}
    for rows in ([base, better, teacher], [teacher, better, base]):
        table = format_table(rows, against="SASRec")
        assert "(p=.031) *" in line_of(table, "LLMSTAR") and "Holm" not in table and "(teacher)" not in table
    other = make_row("SASRec", [1] + [2] * 11, role="teacher")
    assert "(p=.062)" in line_of(format_table([base, better, other]), "LLMSTAR")


def test_a_run_that_two_files_report_is_one_run():
    row, other = make_row("A", [1, 2, 2]), make_row("B", [2, 2, 2])
    bare = {name: value for name, value in row.items() if name not in ("ranks", "user_ids")}
    assert format_table([bare, other, dict(row), dict(other)]) == format_table([row, other])
    nan = {**row, "metrics": {"ndcg@2": float("nan")}}
    assert len(compare_rows([nan, {**nan, "metrics": {"ndcg@2": float("nan")}}])[0].lines) == 1


def two_seeds_of_two_models():
    return [
        make_row(name, ranks, seed=seed)
        for seed in (1, 2)
        for name, ranks in (("SASRec", [1, 2, 3, 3]), ("LLM|STAR_b", [1, 1, 1, 1]))
    ]


def test_markdown_and_latex_keep_names_as_text():
    rows = [*two_seeds_of_two_models(), {**failed_row("<script>*x*"), "seed": 1}]
    markdown = format_table(rows, format="md")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and "LLM\\|STAR\\_b" in lines[3]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"\|", lines[0]))}
    assert "\\<script\\>\\*x\\*" in markdown and "<script>" not in markdown
    latex = format_table(rows, format="latex")
    assert "LLM|STAR\\_b" in latex and "1.0000 $\\pm$ .0000" in latex and "±" not in latex.partition("\\begin")[2]
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == latex.count("\\toprule") == 1
    assert all(line.startswith("% ") for line in latex.partition("\\begin")[0].splitlines())


def test_csv_has_the_numbers_in_full():
    rows = [*two_seeds_of_two_models(), failed_row("=1+1", seed=1)]
    first, other, failed = csv.DictReader(io.StringIO(format_table(rows, format="csv")))
    assert (first["model"], first["seeds"], first["users"], first["difference"]) == ("SASRec", "1 2", "4", "")
    mean = float(first["ndcg@2"])
    assert mean == pytest.approx((1 + 1 / np.log2(3)) / 4) and float(first["ndcg@2 sd"]) == 0
    assert float(other["difference"]) == pytest.approx(1 - mean) and float(other["p"]) == 0.25
    assert float(other["low"]) < float(other["difference"]) < float(other["high"]) and other["comparisons"] == "1"
    differences = 1 - np.array([1, 1 / np.log2(3), 0, 0])
    assert float(other["effect"]) == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert other["minutes"] == "1.7" and other["trained_parameters"] == "123456"
    assert (failed["model"], failed["ndcg@2"], failed["error"]) == ("'=1+1", "", "no such file: bring one.")


def test_an_unknown_form_or_model_is_refused():
    with pytest.raises(UserError, match="format: 'latx' is unknown; did you mean 'latex'"):
        format_table([make_row("A", [1])], format="latx")
    with pytest.raises(UserError, match="against: there is no 'C' among A, B"):
        format_table([make_row("A", [1]), make_row("B", [1])], against="C")


def test_effect_size_by_hand():
    assert effect_size(np.array([0.0, 0.0])) == 0
    assert effect_size(np.array([1.0, 1.0, 1.0])) is None and effect_size(np.array([1.0])) is None
    assert effect_size(np.array([1.0, 0.0, -1.0, 2.0])) == pytest.approx(0.5 / np.sqrt(5 / 3))


def test_significance_is_marked_after_the_correction():
    six, five = [1] * 6 + [2] * 6, [2] * 6 + [1, 2, 2, 2, 2, 2]
    base = [2] * 12
    # Six users improve: p = 2/64 = .031. Alone it is significant, among two comparisons it is .0625.
    alone = format_table([make_row("A", base), make_row("B", six)])
    assert "(p=.031) *" in line_of(alone, "B") and "Holm" not in alone
    among_two = format_table([make_row("A", base), make_row("B", six), make_row("C", five)])
    assert "(p=.062)  " in line_of(among_two, "B") and "corrected for 2" in among_two
    assert "(p=1.000)" in line_of(among_two, "C")
    worse = format_table([make_row("A", six), make_row("B", base)])
    assert "-.1845 (p=.031) *" in line_of(worse, "B")  # 6/12 * (1 - .63093)


def test_very_small_p_values():
    table = format_table([make_row("A", [2] * 100), make_row("B", [1] * 100)])
    assert "+.3691 (p<.001) *" in line_of(table, "B")


def test_users_are_paired_by_id_and_not_by_place():
    first = make_row("A", [1, 2, 3, 3, 1, 1, 2, 3])
    other = make_row("B", [1, 1, 3, 1, 1, 1, 1, 1])
    order = [5, 2, 0, 7, 1, 3, 4, 6]
    moved = {**other, "ranks": other["ranks"][order], "user_ids": other["user_ids"][order]}
    assert format_table([first, moved]) == format_table([first, other])
    assert "p=.125" in format_table([first, other])  # four improve: 2/16


def test_seeds_are_averaged_by_user_before_the_test():
    rows = [
        make_row("A", [2, 2, 2, 2, 2, 2], seed=1),
        make_row("B", [1, 1, 1, 2, 2, 2], seed=1),
        make_row("A", [2, 2, 2, 2, 2, 2], seed=2),
        # the same users in another order; u0, u1 and u2 lose what they gained, u3 gains
        make_row("B", [1, 2, 2, 3, 3, 3], seed=2, users=["u3", "u5", "u4", "u2", "u1", "u0"]),
    ]
    table = format_table(rows)
    # Per user, over the seeds: u0 to u2 (.36907 - .63093) / 2 = -.13093 each; u3 .36907 / 2 = .18454; the others 0.
    # Mean (-.39279 + .18454) / 6 = -.03471. Patterns at least .20825 in size of (+-.13093 three times, +-.18454):
    # the three equal ones alike: 2 * 2 of 16; two against one: +-.13093 +-.18454 = +-.31547 or +-.05361, 6 of 16.
    assert "-.0347 (p=.625)" in line_of(table, "B")
    assert "seeds 1, 2 (mean ± standard deviation)" in table
    assert "averaged over the seeds" in table
    # B: NDCG@2 of the seeds (3 + 3 * .63093) / 6 = .81546 and (1 + 2 * .63093) / 6 = .37698
    assert ".5962 ± .3101" in line_of(table, "B")
    assert ".6309 ± .0000" in line_of(table, "A")


def test_a_user_with_several_rows_counts_once():
    # u0 improves in three rows, u1 in one: two users, p = 2/4; were they four, it would be 2/16.
    users = ["u0", "u0", "u0", "u1"]
    table = format_table([make_row("A", [2, 2, 2, 2], users=users), make_row("B", [1, 1, 1, 1], users=users)])
    assert "+.3691 (p=.500)" in line_of(table, "B")


def test_failures_keep_their_place_and_reason():
    rows = [
        make_row("SASRec", [1, 2, 3], seed=1),
        failed_row("LLMSRec", seed=1, error="out of memory:\n  lower   train_batch_tokens."),
        make_row("LLMSTAR", [1, 1, 1], seed=1),
        make_row("SASRec", [1, 2, 2], seed=2),
        failed_row("LLMSRec", seed=2),
        failed_row("LLMSTAR", seed=2, error="word " * 40),
    ]
    table = format_table(rows)
    assert (
        "\nLLMSRec (seed 1)  FAILED: out of memory: lower train_batch_tokens.\nLLMSRec (seed 2)  FAILED: no such"
        in table
    )
    assert line_of(table, "LLMSTAR (1 of 2 seeds)").split()[5:7] == ["1.0000", "1.0000"]
    assert "over the seeds that both models finished" in table
    # over seed 1 alone: (0 + .36907 + 1) / 3, two users differ: 2/4
    assert "+.4564 (p=.500)" in line_of(table, "LLMSTAR")
    assert max(map(len, table.splitlines())) <= 120


def test_only_seeds_that_both_models_finished_are_compared():
    rows = [
        make_row("A", [2, 2], seed=1),
        make_row("B", [1, 1], seed=1),
        failed_row("A", seed=2),
        make_row("B", [3, 3], seed=2),
        make_row("C", [3, 3], seed=2),
    ]
    table = format_table(rows)
    assert "+.3691 (p=.500)" in line_of(table, "B")
    assert line_of(table, "C (1 of 2 seeds)").split()[7] == "-"  # no seed in common with A


def test_a_failed_first_model_is_said():
    table = format_table([failed_row("SASRec"), make_row("A", [2, 2]), make_row("B", [1, 1])])
    assert "SASRec  FAILED: no such file: bring one." in table
    assert "SASRec failed; the differences are to A." in table
    assert "ndcg@2 vs A" in table


def test_only_failures():
    assert format_table([failed_row("LLMSTAR")]) == "ml-100k · seed 1\n\nLLMSTAR  FAILED: no such file: bring one."


def test_one_model_has_no_difference_column():
    assert " vs " not in format_table([make_row("SASRec", [1, 2])])


def test_teachers_are_labelled_and_a_shared_one_stands_once():
    teacher = make_row("SASRec", [2, 2, 2], role="teacher")
    rows = [make_row("LLMSRec", [1, 2, 3]), make_row("LLMSTAR", [1, 1, 3]), teacher, dict(teacher)]
    table = format_table(rows)
    assert table.count("SASRec (teacher)") == 1
    assert "ndcg@2 vs LLMSRec" in table
    # A teacher that stands first is not what the others are compared with.
    assert "ndcg@2 vs LLMSRec" in format_table([teacher, *rows[:2]])
    # Two teachers of one name with different results are two lines.
    other = make_row("SASRec", [1, 2, 2], role="teacher")
    assert "SASRec (teacher) #2" in format_table([*rows, other])


def test_models_evaluated_on_other_users_get_no_p_value():
    table = format_table([make_row("A", [2, 2]), make_row("B", [1, 1], users=["u7", "u8"])])
    assert "+.3691 (no test)" in line_of(table, "B") and "no test: the two models" in table
    others = [make_row("A", [2, 2], test_set="1f"), make_row("B", [1, 1], test_set="2e")]  # other candidates
    assert "+.3691 (no test)" in line_of(format_table(others), "B")
    without_ranks = {**make_row("B", [1, 1]), "ranks": None}
    assert "(no test)" in line_of(format_table([make_row("A", [2, 2]), without_ranks]), "B")


def test_different_numbers_of_users_get_a_column():
    table = format_table([make_row("A", [2, 2]), make_row("B", [1, 1, 1])])
    assert table.startswith("ml-100k · seed 1\n")
    assert line_of(table, "model").split()[:2] == ["model", "users"]
    assert line_of(table, "A").split()[:2] == ["A", "2"] and line_of(table, "B").split()[:2] == ["B", "3"]


def test_the_compared_metric_can_be_chosen():
    rows = [make_row("A", [2, 2], topk=(1, 2)), make_row("B", [1, 1], topk=(1, 2))]
    assert "hit@1 vs A" in format_table(rows, valid_metric="Hit@1")
    assert "+1.0000 (p=.500)" in format_table(rows, valid_metric="Hit@1")
    rows[0].pop("valid_metric")
    assert "ndcg@1 vs A" in format_table(rows)


def test_several_datasets_give_several_tables():
    rows = [make_row("A", [1, 2]), {**make_row("A", [1, 1]), "dataset": "scientific"}]
    tables = format_table(rows).split("\n\nscientific")
    assert len(tables) == 2 and tables[0].startswith("ml-100k") and " · 2 users" in tables[1]


def test_areas_are_compared_by_delongs_test_on_the_same_labels():
    good, poor = [0.9, 0.8, 0.4, 0.5, 0.2, 0.1], [5, -1, 2, 3, 1, 4]
    rows = [judged_row("SASRec", poor), judged_row("TALLRec", good)]
    rows[1]["metrics"]["logloss"] = 0.5
    table = format_table(rows)
    difference = rows[1]["metrics"]["auc"] - rows[0]["metrics"]["auc"]
    p = auc_test(rows[0]["labels"], [good], [poor])["p_value"]
    assert f"+{difference:.4f} (p={p:.3f})".replace("0.", ".") in line_of(table, "TALLRec")
    assert "Differences in auc to SASRec are paired by user; p is from DeLong's test." in " ".join(table.split())
    other = judged_row("TALLRec", good, labels=(1, 0, 1, 0, 1, 0))
    assert "(no test)" in line_of(format_table([rows[0], other]), "TALLRec")
    alone = [judged_row(name, values, labels=(1, 0, 0, 0, 0, 0)) for name, values in (("A", poor), ("B", good))]
    assert "(no test)" in line_of(format_table(alone), "B")


def test_a_metric_that_one_model_lacks_is_not_compared():
    rows = [judged_row("TALLRec", [6, 5, 4, 3, 2, 1], valid_metric="LogLoss"), judged_row("SASRec", [6, 5, 1, 4, 2, 3])]
    rows[0]["metrics"]["logloss"] = 0.5
    assert "auc vs TALLRec" in format_table(rows)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("metrics", [1, 4, 6])
@pytest.mark.parametrize("name", ["LLMSTAR", "AVeryLongNameOfAModelIndeed"])
def test_the_table_fits_the_page_and_loses_no_column(seeds, metrics, name):
    generator = np.random.default_rng(0)
    metrics = ("ndcg", "hit", "mrr", "recall", "precision", "map")[:metrics]
    rows = [
        make_row(model, generator.integers(1, 30, 50), seed, metrics=metrics, topk=(5, 10, 20), valid_metric="ndcg@10")
        for seed in range(seeds)
        for model in ("SASRec", name)
    ]
    table = format_table(rows)
    assert max(map(len, table.splitlines())) <= 120
    headers = [line for line in table.splitlines() if line.startswith("model ")]
    columns = " ".join(headers).split()
    for wanted in [f"{metric}@{k}" for metric in metrics for k in (5, 10, 20)] + ["params", "minutes"]:
        assert wanted in columns
    for header, rule in zip(table.splitlines(), table.splitlines()[1:], strict=False):
        if header.startswith("model "):
            assert rule == "-" * len(header)


def test_models_without_a_common_metric_are_not_compared():
    by_title = make_row("B", [1, 2], metrics=("hit",), topk=(1,))
    by_title["metrics"]["validratio"] = 1.0
    page = format_table([make_row("A", [1, 2]), by_title])
    assert " vs " not in page and "no metric in common" in page and "validratio" in page


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (99_960, "100k"), (123_456, "123k"),
        (999_499, "999k"), (999_500, "1.00M"), (1_234_567, "1.23M"), (134_515_008, "135M"), (3_212_749_824, "3.21G"),
        (None, "-"),
    ],
)  # fmt: skip
def test_parameters_in_human_units(count, text):
    assert report.parameters(count) == text


@pytest.mark.parametrize(
    ("train", "evaluate", "text"), [(0, 0, "0.0"), (1, 1, "<0.1"), (60, 30, "1.5"), (6000, 60, "101.0"), (None, 5, "-")]
)
def test_minutes(train, evaluate, text):
    run = {"train_seconds": train, "eval_seconds": evaluate}
    for runs in ([run], [run, run]):
        assert report.minutes(Line("A", False, runs).minutes) == text


def test_numbers():
    assert [report.decimal(value) for value in (0.0, 0.12345, 1.0, 12.5)] == [".0000", ".1235", "1.0000", "12.5000"]
    assert [report.signed(value) for value in (-0.5, -0.00001, 1.25)] == ["-.5000", "+.0000", "+1.2500"]
    assert line_of(format_table([{**make_row("A", [1]), "metrics": {"ndcg@2": float("nan")}}]), "A").split()[1] == "-"
