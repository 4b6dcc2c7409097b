"""Tables of one's own become datasets: DataFrames, mappings, files, and what has a ``to_polars`` or ``to_pandas``."""

import datetime
import gzip

import numpy as np
import pandas as pd
import pytest
from raw_files import count, written

from recbole_llm.cli import main
from recbole_llm.data.prepare import from_frame
from recbole_llm.errors import UserError

pl = pytest.importorskip("polars")

SALES = {"user_id": ["u2", "u1", "u2"], "item_id": ["7", "8", "8"], "timestamp": [1_600_000_002, 1_600_000_000, 1_600_000_001]}
GOODS = {"item_id": ["8", "7"], "title": ["HDMI\tcable", '24" TV'], "tags": [["a", "b"], []]}


class Hub:
    """Stands for a Hugging Face Dataset."""

    def __init__(self, columns):
        self.columns_ = columns

    def to_pandas(self):
        return pd.DataFrame(self.columns_)


KINDS = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "lazy": pl.LazyFrame, "mapping": dict, "hub": Hub}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_table(tmp_path, kind):
    goods = {name: values for name, values in GOODS.items() if kind != "hub" or name != "tags"}
    folder = from_frame(KINDS[kind](SALES), KINDS[kind](goods), "shop", folder=tmp_path)
    inter, item = written(folder)
    assert inter["user_id"] == ["u2", "u2", "u1"] and inter["item_id"] == ["8", "7", "8"]
    assert inter["timestamp"].tolist() == [1_600_000_001, 1_600_000_002, 1_600_000_000]
    assert item["item_id"] == ["8", "7"] and item["title"] == ["HDMI cable", '24" TV']
    assert kind in ("hub", "pandas") or item["tags"] == ["a; b", ""]
    assert "timestamp_format: unix " in (folder / "shop.yaml").read_text()
    assert {path.name for path in folder.iterdir()} == {"shop.inter", "shop.item", "shop.yaml", "README.md"}


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "parquet", "jsonl"])
def test_any_kind_of_file(tmp_path, ending):
    frame, path = pl.DataFrame(SALES), tmp_path / f"sales.{ending}"
    if ending == "parquet":
        frame.write_parquet(path)
    elif ending == "jsonl":
        frame.write_ndjson(path)
    else:
        data = frame.write_csv(separator="\t" if ending == "tsv" else ",").encode()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    inter, item = written(from_frame(path, None, "shop", folder=tmp_path))
    assert inter["item_id"] == ["8", "7", "8"] and item["title"] == ["", ""]


@pytest.mark.parametrize(
    "times, expected, form",
    [
        ([1e9, 2e9, 1.5e9], [1e9, 2e9, 1.5e9], "unix"),
        ([1_600_000_000_001, 1_700_000_000_000, 1_650_000_000_000], None, "unix_ms"),
        ([3, 1, 2], None, "none"),
        (["2024-01-31", "2024-01-31 12:00", "2024-01-31T00:00:01Z"], [1706659200, 1706702400, 1706659201], "unix"),
        (
            [datetime.date(2024, 1, 31), datetime.date(2024, 2, 1), datetime.date(2024, 1, 1)],
            [1706659200, 1706745600, 1704067200],
            "unix",
        ),
        (np.array(["2024-01-31", "2024-02-01", "2024-01-01"], "datetime64[ns]"), [1706659200, 1706745600, 1704067200], "unix"),
    ],
)
def test_times(tmp_path, times, expected, form):
    table = {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": times}
    for kind in (dict, pd.DataFrame):
        folder = from_frame(kind(table), None, f"shop-{kind.__name__}", folder=tmp_path)
        inter, _ = written(folder)
        assert inter["timestamp"].tolist() == sorted(times if expected is None else expected)
        assert f"timestamp_format: {form} " in (folder / f"{folder.name}.yaml").read_text()


def test_order_of_the_rows(tmp_path):
    inter, _ = written(from_frame(SALES, None, "shop", folder=tmp_path, time=None))
    assert inter["item_id"] == ["7", "8", "8"] and inter["timestamp"].tolist() == [0, 1, 0]


def test_ids_that_pandas_made_floats(tmp_path):
    table = pd.DataFrame({"user_id": [1.0, None, 1.0], "item_id": [7, 8, 9], "timestamp": [1, 2, 3]})
    inter, _ = written(from_frame(table, None, "shop", folder=tmp_path))
    assert inter["user_id"] == ["1", "1"] and inter["item_id"] == ["7", "9"]


def test_equal_records_are_dropped(tmp_path):
    twice = {name: [*values, values[0]] for name, values in SALES.items()}
    assert len(written(from_frame(twice, None, "shop", folder=tmp_path))[0]["user_id"]) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"user": "usr_id"}, "the interactions have no column 'usr_id'; did you mean user=user_id?"),
        ({"title": "name"}, "the items have no column 'name'"),
        ({"interactions": 3}, "the interactions are a int: give a DataFrame"),
        ({"interactions": "absent.csv"}, "there is no file absent.csv"),
        ({"interactions": SALES | {"timestamp": ["now", "1", "2"]}}, "the column 'timestamp' holds 'now'"),
        ({"interactions": SALES | {"user_id": [0.5, 1, 2]}}, "numbers with fractions, which are no ids"),
        ({"interactions": SALES | {"item_id": ["a\tb", "8", "8"]}}, r"the item_id 'a\\tb' holds a tab"),
        ({"items": {"item_id": ["7", "7"], "title": ["a", "b"]}}, "'7' is described on two lines"),
        ({"name": "../shop"}, "'../shop' cannot be the name of a dataset"),
        ({"core": 5}, "shop: of 3 interactions none is left"),
    ],
)
def test_mistakes(tmp_path, change, message):
    given = {"interactions": SALES, "items": GOODS, "name": "shop", "folder": tmp_path / "data"} | change
    with pytest.raises(UserError, match=message):
        from_frame(**given)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_the_same_as_a_command(tmp_path, capsys):
    sales = pl.DataFrame(SALES).rename({"user_id": "customer", "item_id": "sku", "timestamp": "day"})
    sales.write_csv("sales.csv")
    pl.DataFrame({"sku": ["8", "7"], "product": ["cable", "TV"]}).write_parquet("products.parquet")
    words = "--interactions=sales.csv --items=products.parquet --user=customer --item=sku --time=day --title=product".split()
    assert main(["prepare", "my-shop", *words]) == 0
    printed = capsys.readouterr().out
    assert count(printed, "interactions") == 3 and "--dataset=my-shop" in printed
    assert written(tmp_path / "dataset" / "my-shop")[1]["title"] == ["cable", "TV"]
    assert "--interactions=sales.csv" in (tmp_path / "dataset" / "my-shop" / "README.md").read_text()
    assert main(["prepare", "my-shop", *words]) == 2
    assert "is there already: remove it, or add --overwrite=True" in capsys.readouterr().err


def test_prepared_data_are_a_dataset_with_their_own_wording(tmp_path):
    from recbole_llm.config.settings import make_config
    from recbole_llm.data.dataset import TextSequentialDataset
    from recbole_llm.data.prepare.source import Wording

    rows = [(f"u{user}", f"i{item}", 1_600_000_000 + item) for user in range(6) for item in range(user, user + 5)]
    table = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    goods = {"item_id": [f"i{item}" for item in range(10)], "title": [f"Film {item}" for item in range(10)]}
    from_frame(table, goods, "films", folder=tmp_path, wording=Wording("seen a series of films", "films"))
    config = make_config("LLMSTAR", "films", config_dict={"data_path": str(tmp_path), "backbone": "tiny"})
    assert config["prompt_sentence"] == "This user has seen a series of films in the following order:"
    dataset = TextSequentialDataset(config)
    assert dataset.user_num == 7 and dataset.item_texts[1].startswith("Film ") and dataset.has_dates
