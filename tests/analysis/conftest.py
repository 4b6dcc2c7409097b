"""Models trained once on generated chains, for all tests of the analyses."""

from __future__ import annotations

import os

import pytest

from recbole_llm.analysis.job import Job
from recbole_llm.data.prepare import generate_chain

ITEMS = 30
SETTINGS = {
    "protocol": "full",
    "metrics": ["NDCG", "Recall"],
    "topk": [5, 10],
    "epochs": 12,
    "stopping_step": 4,
    "hidden_size": 32,
    "inner_size": 64,
    "n_layers": 1,
    "hidden_dropout_prob": 0.1,
    "attn_dropout_prob": 0.1,
    "train_batch_size": 128,
    "learning_rate": 0.01,
    "show_progress": False,
    "use_gpu": False,
}


@pytest.fixture(scope="session")
def analysis_folder(tmp_path_factory):
    """A folder with the datasets ``ordered`` (item k + 1 follows item k) and ``random`` (every item follows every item)."""
    folder = tmp_path_factory.mktemp("analysis")
    generate_chain(folder / "data", "ordered", users=250, items=ITEMS, seed=1, noise=0.1)
    generate_chain(folder / "data", "random", users=250, items=ITEMS, seed=2, noise=1 - 1 / ITEMS)
    return folder


@pytest.fixture(scope="session")
def make_job(analysis_folder):
    """A function (dataset, models, **settings) -> Job; checkpoints and results of all tests lie in one folder."""

    def make(dataset="ordered", models=("SASRec",), **settings):
        given = {
            **SETTINGS,
            "data_path": str(analysis_folder / "data"),
            "checkpoint_dir": str(analysis_folder / "saved"),
            **settings,
        }
        return Job(dataset, models, settings=given, output=str(analysis_folder / "analyses"))

    return make


@pytest.fixture(scope="session")
def in_folder(analysis_folder):
    """A function that calls another with the folder as the working folder: RecBole writes logs where it runs."""

    def call(function, *arguments):
        before = os.getcwd()
        os.chdir(analysis_folder)
        try:
            return function(*arguments)
        finally:
            os.chdir(before)

    return call
