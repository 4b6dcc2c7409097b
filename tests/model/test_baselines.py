"""The baselines of the papers' tables stand in one table, stock ones and ours."""

import pytest

from recbole_llm import cli
from recbole_llm.data.prepare import generate_chain
from recbole_llm.results.run import read_run

STOCK = ["SASRec", "NextItNet", "FDSA", "S3Rec"]
OURS = ["LLMRec", "MoRec", "Recformer"]
SETTINGS = {
    "SASRec": {"hidden_size": 8, "inner_size": 8},
    "NextItNet": {"embedding_size": 8, "block_num": 1, "dilations": "[1,2]"},
    "FDSA": {"hidden_size": 8, "inner_size": 8, "selected_features": "[brand]"},
    "S3Rec": {"hidden_size": 8, "inner_size": 8, "item_attribute": "brand", "pretrain_epochs": 1},
    "LLMRec": {"backbone": "tiny", "train_targets": "last", "train_negatives": 3},
    "MoRec": {"hidden_size": 8, "n_layers": 1},
    "Recformer": {"hidden_size": 8, "n_layers": 1, "n_heads": 2},
}


@pytest.fixture(scope="module")
def branded(tmp_path_factory):
    """A small chain whose items have a brand as well, an attribute for FDSA and S3Rec."""
    folder = tmp_path_factory.mktemp("branded")
    file = generate_chain(folder, "chain", users=16, items=20, seed=1, noise=0.1, lengths=(5, 8)) / "chain.item"
    header, *lines = file.read_text().splitlines()
    branded = [f"{line}\t{'Acme' if number % 2 else 'Globex'}" for number, line in enumerate(lines)]
    file.write_text("\n".join([header + "\tbrand:token_seq", *branded]) + "\n")
    return folder


@pytest.mark.parametrize("models", [["SASRec", "MoRec"], pytest.param([*STOCK, *OURS], marks=pytest.mark.slow)])
def test_baselines_are_compared_on_the_same_candidates(branded, text_encoder, tmp_path, capsys, models):
    """One row for each, of the same users in the same order, under the same test set."""
    settings = {
        **{"model": ",".join(models), "dataset": "chain", "data_path": branded, "checkpoint_dir": tmp_path / "saved"},
        **{"eval_args": "{mode: uni4}", "topk": "[1,3]", "valid_metric": "NDCG@3", "use_gpu": False, "show_progress": False},
        **{"item_text": "[title,brand]", "load_col": "{inter: [user_id, item_id, timestamp], item: [item_id, brand]}"},
        **{f"{name}.{key}": value for name in models for key, value in {**SETTINGS[name], "epochs": 1, "eval_step": 1}.items()},
        "MoRec.sentence_encoder": text_encoder,
    }
    assert cli.main(["run", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    runs = {run.model: run for run in map(read_run, (tmp_path / "saved").glob("[!.]*")) if run.model in models}
    assert set(runs) == set(models)
    expected = runs["SASRec"].row()
    for name, run in runs.items():
        row = run.row()
        assert row["test_set"] == expected["test_set"] and len(row["ranks"]) == 16, name
        assert row["user_ids"].tolist() == expected["user_ids"].tolist(), name
        assert 1 <= row["ranks"].min() and row["ranks"].max() <= 5, name
    shown = capsys.readouterr().out
    assert all(name in shown for name in models) and "FAILED" not in shown and "(p=" in shown
