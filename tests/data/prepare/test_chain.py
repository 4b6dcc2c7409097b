"""Generated data has the order it promises, and what is written can be read."""

import sys
from collections import Counter
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recbole.config import Config

import recbole_llm  # noqa: F401 (RecBole on current libraries)
from recbole_llm.data.atomic import read_item_attributes, read_table
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.prepare import generate_chain, write_atomic
from recbole_llm.errors import UserError

SAMPLE = Path(__file__).parents[3] / "dataset" / "toy-chain"
SAMPLE_ARGUMENTS = {"users": 300, "items": 60, "seed": 2024, "noise": 0.1}  # also in dataset/README.md


def steps(folder):
    """How often the next item was how many places further on in the chain."""
    table = read_table(folder / f"{folder.name}.inter")
    items = len(read_table(folder / f"{folder.name}.item"))
    users, places = table.columns["user_id"], [int(item) for item in table.columns["item_id"]]
    following = range(1, len(places))
    return Counter((places[row] - places[row - 1]) % items for row in following if users[row] == users[row - 1])


def test_chain_without_noise_is_the_chain(tmp_path):
    folder = generate_chain(tmp_path, "chain", users=30, items=7, seed=1, noise=0.0)
    assert folder == tmp_path / "chain" and set(steps(folder)) == {1}


def test_chain_of_noise_avoids_the_successor_and_nothing_else(tmp_path):
    found = steps(generate_chain(tmp_path, "chain", users=2000, items=5, seed=1, noise=1.0))
    assert set(found) == {0, 2, 3, 4}
    assert max(found.values()) < 1.1 * min(found.values())


def test_share_of_successors(tmp_path):
    found = steps(generate_chain(tmp_path, "chain", users=2000, items=50, seed=1, noise=0.3))
    assert abs(found[1] / found.total() - 0.7) < 0.02


def test_titles_and_times(tmp_path):
    folder = generate_chain(tmp_path, "chain", users=20, items=2000, seed=1, noise=0.1, lengths=(3, 4))
    titles = [title for title, in read_item_attributes(folder / "chain.item", "item_id", ["title"]).values()]
    assert len(set(titles)) == 2000 and any(title.endswith(", Part 2") for title in titles)
    assert titles != sorted(titles)
    table = read_table(folder / "chain.inter")
    times = table.columns["timestamp"]
    assert times.min() >= 1_577_836_800 and times.max() < 1_700_000_000
    assert {count for count in Counter(table.columns["user_id"]).values()} == {3, 4}
    for row in range(1, len(times)):
        if table.columns["user_id"][row] == table.columns["user_id"][row - 1]:
            assert times[row] - times[row - 1] >= 3600


def test_chain_depends_on_its_arguments_only(tmp_path):
    def content(seed, name):
        folder = generate_chain(tmp_path / name, "chain", users=5, items=9, seed=seed, noise=0.5)
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    assert content(1, "a") == content(1, "b") != content(2, "c")


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": 2}, {"noise": 1.5}, {"lengths": (5, 4)}])
def test_chain_refuses_what_cannot_be(tmp_path, wrong):
    with pytest.raises(UserError, match="a chain needs users >= 1"):
        generate_chain(tmp_path, "chain", **{"users": 5, "items": 9, "seed": 0, "noise": 0.1} | wrong)
    assert not list(tmp_path.iterdir())


def test_committed_sample_is_what_the_readme_says(tmp_path):
    folder = generate_chain(tmp_path, "toy-chain", **SAMPLE_ARGUMENTS)
    for path in sorted(folder.iterdir()):
        assert (SAMPLE / path.name).read_bytes() == path.read_bytes()
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 100_000
    command = ", ".join(f"{key}={value}" for key, value in SAMPLE_ARGUMENTS.items())
    assert command in (SAMPLE.parent / "README.md").read_text()


def test_sample_is_a_dataset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = {"data_path": str(SAMPLE.parent), "train_neg_sample_args": None, "train_targets": "last"}
    dataset = TextSequentialDataset(Config(model="SASRec", dataset="toy-chain", config_dict=given))
    assert dataset.has_dates and dataset.item_texts[1].startswith("The ")
    assert [len(split) for split in dataset.build()] == [300, 300, 300]


def test_written_files_can_be_read(tmp_path):
    path = tmp_path / "new" / "shop.item"
    columns = {
        "item_id:token": ["a", 2, "c d"],
        "title:token_seq": ['24" TV', "tab\there\r\nand there", float("nan")],
        "price:float": [9.0, 0.1, float("nan")],
    }
    write_atomic(path, columns)
    assert path.read_bytes().decode() == (
        'item_id:token\ttitle:token_seq\tprice:float\na\t24" TV\t9\n2\ttab here and there\t0.1\nc d\t\t\n'
    )
    table = read_table(path)
    assert table.columns["item_id"] == ["a", "2", "c d"] and table.columns["price"][:2].tolist() == [9, 0.1]
    assert [file.name for file in path.parent.iterdir()] == ["shop.item"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"item_id": ["a"]}, "column 'item_id' of .*: write name:type"),
        ({"item_id:text": ["a"]}, "column 'item_id:text'"),
        ({"item_id:token": ["a"], "title:token_seq": []}, "must have one length, not"),
        ({}, "no columns"),
        ({"item_id:token": ["a\tb"]}, r"holds 'a\\tb': an id cannot hold a separator"),
        ({"item_id:token": ["a\nb"]}, "an id cannot hold a separator or a line break"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_alone(tmp_path, columns, message):
    path = tmp_path / "shop.item"
    path.write_text("before")
    with pytest.raises(UserError, match=message):
        write_atomic(path, columns)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "moments",
    [
        ["2020-01-01", "2020-01-02T10:00:00", "2020-01-03 00:00+02:00"],
        [datetime(2020, 1, 1), datetime(2020, 1, 2, 10, tzinfo=UTC), datetime(2020, 1, 2, 22)],
        pd.to_datetime(["2020-01-01 00:00", "2020-01-02 10:00", "2020-01-02 22:00"]),
        pd.to_datetime(["2020-01-01 00:00", "2020-01-02 10:00", "2020-01-02 22:00"]).values,
        ["1577836800", 1577959200.0, np.int64(1578002400)],
    ],
    ids=["ISO", "datetime", "Timestamp", "datetime64", "numbers"],
)
def test_dates_become_unix_seconds(tmp_path, moments):
    write_atomic(tmp_path / "x.inter", {"user_id:token": "aab", "timestamp:float": moments})
    lines = (tmp_path / "x.inter").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in lines] == ["1577836800", "1577959200", "1578002400"]


def test_a_day_is_its_first_second_and_no_date_is_told(tmp_path):
    write_atomic(tmp_path / "x.inter", {"timestamp:float": [date(2020, 1, 1)]})
    assert (tmp_path / "x.inter").read_text().splitlines()[1] == "1577836800"
    with pytest.raises(UserError, match="timestamp:float.*'yesterday': give a number, a datetime, or a date such as 2024"):
        write_atomic(tmp_path / "x.inter", {"timestamp:float": ["yesterday"]})
