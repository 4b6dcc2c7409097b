"""The shared dataset: texts, dates, order of time, rows, splits, and one sentence for each mistake in the files.

The order of time is tested with timestamps one second apart: RecBole rounds them to float32, and then orders them wrongly.
"""

import copy
import math
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import get_model

import recbole_llm  # noqa: F401 (RecBole on current libraries)
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.data.prepare import generate_chain
from recbole_llm.data.sequences import copy_windows, gather_windows, windows_of
from recbole_llm.errors import UserError

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
MIDNIGHT = 1_405_296_000  # 2014-07-14, beyond 2**30: float32 values are 128 s apart
DATA = os.environ.get("RECBOLE_LLM_DATA")


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])  # RecBole's Config reads pytest's arguments otherwise
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # and sets this one


def settings(dataset, data_path="dataset", **changes):
    given = {"data_path": str(data_path), "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 10, "use_gpu": False}
    if dataset == "ml-100k":
        given |= {"item_text": ["movie_title"], "normalize_all": False}
    return Config(model="SASRec", dataset=dataset, config_dict=given | changes)


@pytest.fixture
def shop(tmp_path):
    """Write a dataset `shop` and return a function that loads it: shop(inter=..., item=..., **settings)."""

    def load(inter=None, item=None, kind=TextSequentialDataset, **changes):
        folder = tmp_path / "shop"
        folder.mkdir(exist_ok=True)
        for suffix, content in (("inter", inter), ("item", item)):
            content = DEFAULT[suffix] if content is None else content
            (folder / f"shop.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
        return kind(settings("shop", tmp_path, **changes))

    return load


def inter(rows):
    """rows: (user, item, time) each."""
    return HEADER + "".join(f"{user}\t{item}\t{time!r}\n" for user, item, time in rows)


def items(**titles):
    return "item_id:token\ttitle:token_seq\tbrand:token_seq\n" + "".join(f"{i}\t{t}\tAcme\n" for i, t in titles.items())


ROWS = [(user, f"i{(user_number + step) % 7}", MIDNIGHT + 1000 * user_number + step)
        for user_number, user in enumerate("abcd") for step in range(5)]  # fmt: skip
DEFAULT = {"inter": inter(ROWS), "item": items(**{f"i{n}": f"Title {n}" for n in range(7)})}


@pytest.fixture(scope="module")
def movielens():
    """ml-100k, with the rows of RecBole's own augmentation and of ours. (Loaded once: 100,000 interactions.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        dataset = TextSequentialDataset(settings("ml-100k"))
    return dataset


# ---- Mistakes


def refusal(shop, **given):
    with pytest.raises(UserError) as error:
        shop(**given)
    message = str(error.value)
    assert "\n" not in message and not message.endswith("."), "one sentence, that the command line may go on from"
    return message


@pytest.mark.parametrize(
    "given, message",
    [
        ({"inter": HEADER + "a\ti1\n"}, "shop.inter:2 has 2 columns where the header names 3"),
        ({"inter": HEADER + "a\ti1\t1\n\na\ti2\t2\t\n"}, "shop.inter:4 has 4 columns where the header names 3"),
        ({"inter": HEADER + "a\ti1\t1\na\ti2\tyesterday\n"}, "shop.inter:3 has 'yesterday' as timestamp, which is no number"),
        ({"inter": HEADER + "a\ti1\t2020_01_01\n"}, "shop.inter:2 has '2020_01_01' as timestamp, which is no number"),
        ({"inter": HEADER + "a\ti1\t1\na\ti2\t\n"}, "shop.inter:3 has no number as timestamp (it reads nothing)"),
        ({"inter": HEADER + "a\ti1\tinf\n"}, "shop.inter:2 has no number as timestamp (it reads inf)"),
        ({"inter": HEADER + "a\ti1\t1\n\ti2\t2\n"}, "shop.inter:3 has no user_id (it reads '')"),
        ({"inter": HEADER + "a\ti1\t1\na\tnan\t2\n"}, "shop.inter:3 has no item_id (it reads 'nan')"),
        ({"inter": HEADER}, "shop.inter holds no interactions, only a header"),
        ({"inter": ""}, "shop.inter is empty"),
        ({"inter": HEADER.replace("user_id:token", "user_id")}, "shop.inter:1 has 'user_id' as column 1 of its header"),
        ({"inter": HEADER.replace("user_id:token", "user_id:float")}, "shop.inter:1 declares user_id as 'float'"),
        ({"inter": HEADER.replace("timestamp:float", "timestamp:token")}, "shop.inter:1 declares timestamp as 'token'"),
        (
            {"inter": HEADER.replace("timestamp", "time")},
            "shop.inter has no field 'timestamp', only user_id, item_id, time: add a column timestamp:float, or name the "
            "column that holds it with the key TIME_FIELD",
        ),
        ({"inter": HEADER.encode() + b"a\ti1\t1\nb\xff\ti1\t2\n"}, r"shop.inter:3 holds bytes that are not utf-8 (b'\xff')"),
        ({"item": DEFAULT["item"].encode() + b"x\tCaf\xe9\tAcme\n"}, "shop.item:9 holds bytes that are not utf-8"),
        ({"item": DEFAULT["item"] + "x\tA\n"}, "shop.item:9 has 2 columns where the header names 3"),
        ({"item": DEFAULT["item"] + "i3\tA\tB\n"}, "shop.item:9 describes item 'i3' again, after line 5: keep one line"),
        ({"item": "item_id\ttitle:token_seq\n"}, "shop.item:1 has 'item_id' as column 1 of its header: write name:type"),
        (
            {"item_text": ["title", "colour"]},
            "shop.item has no field 'colour' to take the items' text from, only title, brand: set the key item_text",
        ),
        ({"item_text": []}, "the key item_text names no field"),
        ({"timestamp_format": "seconds"}, "the key timestamp_format is 'seconds': set it to one of auto, unix, unix_ms, none"),
        ({"benchmark_filename": ["train", "valid", "test"]}, "the key benchmark_filename"),
        (
            {"inter": inter([*ROWS, ("e", "i1", 5), ("f", "i1", 6), ("f", "i2", 7)])},
            "2 of 6 users in {folder}/shop.inter have fewer than 3 interactions after filtering (user 'f' has 2), too few to "
            'leave the last ones out for validation and test: set user_inter_num_interval: "[3,inf)" to leave these users out',
        ),
        (
            {"val_interval": {"timestamp": "[0,1]"}, "user_inter_num_interval": "[3,inf)"},
            "no interaction of {folder}/shop.inter is left after filtering (val_interval: {{'timestamp': '[0,1]'}}; "
            "user_inter_num_interval: [3,inf)): loosen these keys",
        ),
        ({"item_inter_num_interval": "[100,inf)"}, "is left after filtering (item_inter_num_interval: [100,inf)): loosen"),
        (  # among dates, which auto takes them all for
            {"inter": inter(ROWS * 9 + [("a", "i1", 4e17)])},
            "shop.inter:182 has 4e+17 as timestamp, which is beyond the calendar (years 1 to 9999) as timestamp_format: "
            "unix reads",
        ),
        (
            {"inter": inter((u, i, t * 1000) for u, i, t in ROWS * 9) + "a\ti1\t-9e15\n", "timestamp_format": "unix_ms"},
            "shop.inter:182 has -9e+15 as timestamp, which is beyond the calendar (years 1 to 9999) as timestamp_format: "
            "unix_ms reads",
        ),
        (
            {"inter": inter((u, i, t * 1e9) for u, i, t in ROWS), "timestamp_format": "unix"},
            "shop.inter:2 has 1.405296e+18 as timestamp, which is beyond the calendar (years 1 to 9999) as timestamp_format: "
            "unix reads",
        ),
    ],
)
def test_each_mistake_is_told_in_one_sentence(shop, tmp_path, given, message):
    assert message.format(folder=tmp_path / "shop") in refusal(shop, **given)


def test_missing_folder_lists_the_datasets(shop, tmp_path):
    shop()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        TextSequentialDataset(settings("shopp", tmp_path))
    assert str(error.value) == (
        f"dataset folder {tmp_path}/shopp does not exist (did you mean shop?); {tmp_path} holds shop, and ml-100k comes with "
        "RecBole: set the key dataset to one of these, or set the key data_path to the folder that holds your dataset's folder"
    )
    with pytest.raises(UserError, match="holds no dataset, and ml-100k comes with RecBole"):
        TextSequentialDataset(settings("shop", tmp_path / "empty"))
    with pytest.raises(UserError, match=f"the folder {tmp_path}/none of dataset 'shop' does not exist"):
        TextSequentialDataset(settings("shop", tmp_path / "none"))


@pytest.mark.parametrize("suffix, needs", [("inter", "timestamp:float"), ("item", "item_id:token and title:token_seq")])
def test_missing_file(shop, tmp_path, suffix, needs):
    config = shop().config
    (tmp_path / "shop" / f"shop.{suffix}").unlink()
    with pytest.raises(UserError, match=f"shop/shop.{suffix} is missing: .*{needs}"):
        TextSequentialDataset(config)


def test_nothing_of_the_interactions_is_read_before_the_texts_are_in_order(shop):
    assert "shop.item" in refusal(shop, inter="broken", item="broken")


def test_short_histories_matter_for_leave_last_out_only(shop):
    rows = [*ROWS, ("e", "i1", 5)]
    assert len(shop(inter=inter(rows), user_inter_num_interval="[3,inf)").field2id_token["user_id"]) == 5
    ratio = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"}
    assert shop(inter=inter(rows), eval_args=ratio).user_num == 6


def test_a_split_without_validation_rows(shop):
    dataset = shop(inter=inter((u, i, t) for u, i, t in ROWS if t % 10 < 3))  # three interactions each
    with pytest.raises(UserError, match=r"has enough interactions for a valid row .* \(one needs 4"):
        dataset.build()


def test_unknown_train_targets(shop):
    with pytest.raises(UserError, match="the key train_targets is 'first': set it to one of last, window, all"):
        shop(train_targets="first").build()


def test_warnings_of_chained_assignment_do_not_occur(shop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shop(rm_dup_inter="first").build()


# ---- Item texts


def test_texts_are_whole_and_by_internal_id(shop):
    titles = {
        "i0": '24&quot; "TV" &amp;amp; arm',
        "i1": "<|im_end|></s>[UserOut]",
        "i2": "x" * 10_000,
        "i3": "",
        "i5": "two\x07lines\x00",
        "i6": "  spaces   inside  ",
    }
    dataset = shop(item=items(**titles))
    text = dict(zip(dataset.field2id_token["item_id"].tolist(), dataset.item_texts, strict=True))
    assert text == {
        "[PAD]": "",
        "i0": '24" "TV" & arm',
        "i1": "<|im_end|></s>[UserOut]",
        "i2": "x" * 10_000,
        "i3": "i3",  # empty in the file
        "i4": "i4",  # not in the file
        "i5": "two lines",
        "i6": "spaces   inside",
    }


def test_items_without_text_are_counted_in_one_warning(shop, caplog):
    shop(item=items(i0="A", i1="B", i2="", i9="never bought"))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("5 of 7 items of shop have no text in ") and "for example item 'i2'" in warning
    caplog.clear()
    shop()
    assert not caplog.records


def test_several_attributes(shop):
    dataset = shop(item=items(i0="Hat", i1=""), item_text=["brand", "title"], item_text_separator=" / ")
    assert {"Acme / Hat", "Acme", "i2"} <= set(dataset.item_texts)
    assert set(shop(item_text="brand").item_texts) == {"", "Acme"}


def test_ids_may_stand_in_place_of_the_texts(shop, caplog):
    dataset = shop(item=items(i0="Hat", i1=""), item_representation="id")
    assert dataset.item_texts == ["", *dataset.field2id_token["item_id"][1:]] and "i0" in dataset.item_texts
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_item_text_stands_whatever_recbole_loads_of_the_items(shop):
    extra = "item_id:token\ttitle:token_seq\tyear:token\n" + "".join(f'i{n}\t"Title {n}\t{n or ""}\n' for n in range(9))
    plain, loaded = shop(item=extra), shop(item=extra, load_col=None)
    assert plain.item_feat is None and len(loaded.item_feat) == 10  # i7 and i8 are nobody's, but RecBole knows them
    by_token = dict(zip(loaded.field2id_token["item_id"].tolist(), loaded.item_texts, strict=True))
    assert by_token == {"[PAD]": ""} | {f"i{n}": f'"Title {n}' for n in range(9)}
    year = loaded.field2id_token["year"][loaded.item_feat["year"].to_numpy(int)]
    assert dict(zip(loaded.field2id_token["item_id"], year, strict=True))["i0"] == "[PAD]"  # nothing in the file
    assert loaded.build()[0].inter_num == plain.build()[0].inter_num


def test_ids_are_what_the_file_says(shop):
    users = {"a": "NA", "b": "null", "c": '"', "d": "007"}
    dataset = shop(inter=inter((users[u], i, t) for u, i, t in ROWS))
    assert dataset.field2id_token["user_id"].tolist() == ["[PAD]", "NA", "null", '"', "007"]


def test_windows_files_and_other_encodings(shop):
    plain = shop()
    windows = shop(inter="\ufeff" + DEFAULT["inter"].replace("\n", "\r\n"), item=DEFAULT["item"].replace("\n", "\r\n"))
    assert windows.fingerprint == plain.fingerprint and windows.item_texts == plain.item_texts
    latin = shop(inter=DEFAULT["inter"].encode(), item=items(i0="Caf\xe9").encode("latin-1"), encoding="latin-1")
    assert "Café" in latin.item_texts


# ---- Time


def sequences(dataset):
    """user token -> item tokens in the order of the rows."""
    found = {}
    for user, item in zip(dataset.inter_feat["user_id"], dataset.inter_feat["item_id"], strict=True):
        found.setdefault(dataset.id2token("user_id", int(user)), []).append(dataset.id2token("item_id", int(item)))
    return found


def test_order_of_time_to_the_second_and_ties_by_the_file(shop):
    generator = np.random.default_rng(0)
    rows, truth = [], {}
    for user in "abcdefgh":
        bought = [f"i{item}" for item in generator.integers(0, 7, size=40)]
        times = MIDNIGHT + np.arange(40) // 2  # pairs of equal timestamps, one second apart
        rows += [(user, item, int(time)) for item, time in zip(bought, times, strict=True)]
        truth[user] = bought
    order = generator.permutation(len(rows))
    # Shuffle the file, but leave the two of a pair in their order.
    place = {}
    for position in order:
        place.setdefault((rows[position][0], rows[position][2]), []).append(position)
    pairs = {key: iter(sorted(positions)) for key, positions in place.items()}
    shuffled = [rows[next(pairs[rows[position][0], rows[position][2]])] for position in order]

    dataset = shop(inter=inter(shuffled))
    assert sequences(dataset) == truth
    *_, test = splits = dataset.build()
    for split in splits:
        for row in range(len(split)):
            history = split.inter_feat["item_id_list"][row, : split.inter_feat["item_length"][row]]
            tokens = [
                *split.id2token("item_id", history.numpy()),
                split.id2token("item_id", int(split.inter_feat["item_id"][row])),
            ]
            full = truth[split.id2token("user_id", int(split.inter_feat["user_id"][row]))]
            assert any(full[end - len(tokens) : end] == tokens for end in range(len(tokens), 41))
    assert {u: s[-1] for u, s in sequences(test).items()} == {u: s[-1] for u, s in truth.items()}

    stock = shop(inter=inter(shuffled), kind=SequentialDataset, load_col={"inter": ["user_id", "item_id", "timestamp"]})
    *_, stock_test = stock.build()
    assert sequences(stock_test) != sequences(test), "if RecBole orders these, this test shows nothing"


def test_repeated_interactions_keep_the_earliest_or_the_latest(shop):
    rows = [("a", "i1", 30), ("a", "i2", 10), ("a", "i1", 10), ("a", "i3", 20), ("a", "i4", 40), ("a", "i2", 50)]
    assert sequences(shop(inter=inter(rows), rm_dup_inter="first")) == {"a": ["i2", "i1", "i3", "i4"]}
    assert sequences(shop(inter=inter(rows), rm_dup_inter="last")) == {"a": ["i3", "i1", "i4", "i2"]}


@pytest.mark.parametrize(
    "times, has_dates",
    [
        (range(20), False),  # ranks
        (np.linspace(0, 1, 20), False),  # scaled
        (20_180_100 + np.arange(20), False),  # the number 20180131 is no count of seconds
        (MIDNIGHT + np.arange(20), True),
        (1000 * MIDNIGHT + np.arange(20), True),
        (880_000_000 + np.arange(20), True),  # 1997
    ],
)
def test_dates_are_recognised(shop, times, has_dates):
    rows = [(user, item, float(time)) for (user, item, _), time in zip(ROWS, times, strict=True)]
    dataset = shop(inter=inter(rows))
    assert dataset.has_dates is has_dates
    assert shop(inter=inter(rows), timestamp_format="none").has_dates is False
    assert shop(inter=inter(rows), timestamp_format="unix_ms").has_dates is True
    if not has_dates:
        with pytest.raises(ValueError, match="ranks, not dates"):
            dataset.item_dates(np.zeros(1))


def test_a_few_broken_timestamps_do_not_hide_the_dates(shop):
    rows = [(user, item, time) for number in range(10) for user, item, time in ROWS]
    assert shop(inter=inter([*rows, ("a", "i1", 0)])).has_dates
    assert not shop(inter=inter([*rows, *[("a", "i1", 0)] * 20])).has_dates


@pytest.mark.parametrize("unit", [1, 1000], ids=["seconds", "milliseconds"])
@pytest.mark.parametrize("normalize_all", [False, True])
def test_dates_are_right_to_the_second_in_what_models_see(shop, unit, normalize_all):
    moments = [MIDNIGHT - 1, MIDNIGHT, MIDNIGHT + 86_399, MIDNIGHT + 86_400, MIDNIGHT + 10 * 86_400]
    days = ["2014-07-13", "2014-07-14", "2014-07-14", "2014-07-15", "2014-07-24"]
    rows = [(user, f"i{step}", time * unit) for user in "abcd" for step, time in enumerate(moments)]
    train, valid, test = shop(inter=inter(rows), normalize_all=normalize_all).build()
    histories = test.inter_feat["timestamp_list"][:, :4].numpy()
    assert test.item_dates(histories) == days[:4] * 4
    assert test.item_dates(test.inter_feat["timestamp"].numpy()) == days[4:] * 4
    assert bool(histories.max() <= 1) is normalize_all


def test_a_rescaled_midnight_stays_in_its_day(shop):
    days = np.arange(0, 20_000, 7)  # from 1970 on
    rows = [("a", f"i{day % 7}", 86_400 * int(day)) for day in days] + [("a", "i0", 2_000_000_003)]
    dataset = shop(inter=inter(rows), normalize_all=True, timestamp_format="unix")
    times = dataset.inter_feat["timestamp"].to_numpy()
    assert times.max() == 1
    assert dataset.item_dates(times[:-1]) == np.datetime_as_string(days.astype("datetime64[D]")).tolist()


def test_dates_before_1970_and_of_nothing(shop):
    with_dates = shop(timestamp_format="unix")
    assert with_dates.item_dates(np.array([0.0, -1.0, 951_782_400.0])) == ["1970-01-01", "1969-12-31", "2000-02-29"]
    assert with_dates.item_dates(np.zeros(0)) == []


# ---- Rows


def augmented_both_ways(dataset):
    """The rows of our augmentation and of RecBole's, from the same interactions."""
    Dataset._change_feat_format(dataset)
    theirs = dataset.copy(copy.deepcopy(dataset.inter_feat))
    ours = dataset.copy(copy.deepcopy(dataset.inter_feat))
    SequentialDataset.data_augmentation(theirs)
    ours.data_augmentation()
    return ours.inter_feat, theirs.inter_feat


def assert_same(ours, theirs):
    assert set(ours.columns) == set(theirs.columns) and len(ours) == len(theirs) > 0
    for field in theirs.columns:
        assert ours[field].dtype == theirs[field].dtype, field
        assert torch.equal(ours[field], theirs[field]), field


def test_augmentation_equals_recboles_on_movielens(movielens):
    assert_same(*augmented_both_ways(copy.copy(movielens)))


def test_augmentation_equals_recboles_with_sequence_and_numerical_fields(shop):
    header = "user_id:token\titem_id:token\tnote:token_seq\tvector:float_seq\trating:float\ttimestamp:float\n"
    rows = "".join(f"{u}\t{i}\tw{t % 3} w{t % 5} w\t{t % 7} 0.5\t{t % 5}\t{t}\n" for u, i, t in ROWS)
    for most in (2, 10):
        given = {"load_col": None, "numerical_features": ["rating"], "MAX_ITEM_LIST_LENGTH": most}
        ours, theirs = augmented_both_ways(shop(inter=header + rows, **given))
        assert_same(ours, theirs)
        assert ours["note_list"].shape == (16, most, 3) and ours["rating_list"].shape == (16, most, 2)


def test_windows_do_not_depend_on_the_part_size():
    values = torch.arange(1, 60).reshape(-1, 1).repeat(1, 2)
    starts, lengths = torch.tensor([0, 57, 58, 3, 10]), torch.tensor([4, 2, 1, 0, 3])
    whole = gather_windows(values, starts, lengths, 4)
    assert torch.equal(whole, copy_windows(windows_of(values, 4), starts, lengths, rows_at_once=2))
    assert whole[1, :, 0].tolist() == [58, 59, 0, 0] and whole[3].sum() == 0


def test_splits_equal_recboles_where_float32_is_enough(tmp_path):
    generate_chain(tmp_path, "chain", users=40, items=20, seed=0, noise=0.3, lengths=(4, 15))
    load_col = {"inter": ["user_id", "item_id", "timestamp"]}
    config = settings("chain", tmp_path, load_col=load_col)
    ours, theirs = TextSequentialDataset(config), SequentialDataset(config)
    assert ours.field2token_id == theirs.field2token_id
    for our, their in zip(ours.build(), theirs.build(), strict=True):
        assert set(our.inter_feat.columns) == set(their.inter_feat.columns)
        for field in their.inter_feat.columns:
            # the timestamp is float64 here
            assert torch.equal(our.inter_feat[field].to(their.inter_feat[field].dtype), their.inter_feat[field]), field


def test_rows_of_one_user(shop):
    train, valid, test = shop(inter=inter([("a", f"i{n}", n) for n in (3, 1, 2, 0, 4)]), MAX_ITEM_LIST_LENGTH=3).build()

    def rows(split):
        tokens = split.field2id_token["item_id"]
        feat = split.inter_feat
        return [
            ([str(tokens[i]) for i in h if i], str(tokens[t]))
            for h, t in zip(feat["item_id_list"], feat["item_id"], strict=True)
        ]

    assert rows(train) == [(["i0"], "i1"), (["i0", "i1"], "i2")]
    assert rows(valid) == [(["i0", "i1", "i2"], "i3")]
    assert rows(test) == [(["i1", "i2", "i3"], "i4")]
    assert test.inter_feat["timestamp_list"].tolist() == [[1, 2, 3]] and test.inter_feat["timestamp"].dtype == torch.float64
    assert test.inter_feat["item_length"].tolist() == [3]


# ---- Splits


@pytest.mark.parametrize("targets", ["last", "all", None])
@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}])
@pytest.mark.parametrize("group_by", ["user", "none"])
def test_train_targets(shop, targets, split, group_by):
    arguments = {"split": split, "order": "TO", "group_by": group_by, "mode": "full"}
    train, valid, test = shop(eval_args=arguments, train_targets=targets).build()
    everything = train.all_rows
    assert train.splits is valid.splits is test.splits is everything.splits
    assert train.splits == {"train": everything, "valid": valid, "test": test}
    assert all(type(split) is TextSequentialDataset for split in (train, everything, valid, test))
    assert len(everything) == {"LS": 8, "RS": 16 - 2 * len(valid)}[next(iter(split))] and len(valid) == len(test) > 0
    if targets != "last":
        assert train is everything
        return
    users, times = (everything.inter_feat[field].numpy() for field in ("user_id", "timestamp"))
    latest = {(user, times[users == user].max()) for user in np.unique(users)}
    kept = list(zip(train.inter_feat["user_id"].tolist(), train.inter_feat["timestamp"].tolist(), strict=True))
    assert set(kept) == latest and len(kept) == len(latest) < len(everything)
    assert set(train.inter_feat.columns) == set(everything.inter_feat.columns)


def test_splits_share_what_is_large(shop):
    dataset = shop(train_targets="last")
    train, valid, test = dataset.build()
    for split in (train, train.all_rows, valid, test):
        assert split.item_texts is dataset.item_texts and split.user_items is dataset.user_items
        assert split.fingerprint == dataset.fingerprint and split.has_dates


def test_items_of_users_are_all_they_ever_had(movielens):
    path = Path(movielens.dataset_path) / "ml-100k.inter"
    truth = {}
    for line in path.read_text().splitlines()[1:]:
        user, item, *_ = line.split("\t")
        truth.setdefault(movielens.token2id("user_id", user), set()).add(movielens.token2id("item_id", item))
    assert len(movielens.user_items) == movielens.user_num == 944
    assert len(movielens.user_items[0]) == 0
    for user, found in enumerate(movielens.user_items[1:], start=1):
        assert found.tolist() == sorted(truth[user])


def test_fingerprint_tells_data_and_splits_apart_and_nothing_else(shop):
    original = shop().fingerprint
    assert len(original) == 64 and int(original, 16)
    same = [
        {},
        {"normalize_all": True},
        {"train_batch_size": 7, "train_targets": "last", "MAX_ITEM_LIST_LENGTH": 3},
        {"item": items(), "item_text": "brand"},
        {"timestamp_format": "none"},
        {"item_representation": "id"},
    ]
    assert {shop(**given).fingerprint for given in same} == {original}
    swapped = [*ROWS[:3], ROWS[4][:2] + ROWS[3][2:], ROWS[3][:2] + ROWS[4][2:], *ROWS[5:]]
    renamed = [({"a": "A"}.get(u, u), i, t) for u, i, t in ROWS]
    later = [(u, i, t + 1) for u, i, t in ROWS]
    ratio = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"}
    other = [{"inter": inter(rows)} for rows in (ROWS[:-1], swapped, renamed, later)] + [{"eval_args": ratio}]
    assert len({shop(**given).fingerprint for given in other} | {original}) == len(other) + 1


def test_texts_and_further_columns_have_fingerprints_of_their_own(shop):
    """What an LLM recommender reads, and what a stock model of item attributes reads."""
    given = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "brand"]}}
    original = shop(**given)
    retitled = shop(item=items(**{f"i{n}": f"Title {n + (n == 6)}" for n in range(7)}), **given)
    rebranded = shop(item=DEFAULT["item"].replace("Title 6\tAcme", "Title 6\tBest"), **given)
    assert original.fingerprint == retitled.fingerprint == rebranded.fingerprint
    assert original.text_fingerprint == rebranded.text_fingerprint != retitled.text_fingerprint
    assert original.column_fingerprint == retitled.column_fingerprint != rebranded.column_fingerprint


def test_a_saved_dataset_is_the_same(shop):
    dataset = shop()
    loaded = pickle.loads(pickle.dumps(dataset))
    assert loaded.item_texts == dataset.item_texts and loaded.fingerprint == dataset.fingerprint
    assert_same(loaded.build()[2].inter_feat, dataset.build()[2].inter_feat)


# ---- Inside RecBole


def test_movielens_from_recboles_own_copy(movielens):
    assert movielens.item_texts[movielens.token2id("item_id", "1")] == "Toy Story"
    assert movielens.has_dates and movielens.item_dates(movielens.inter_feat["timestamp"].to_numpy()[:1]) == ["1997-09-20"]
    years = TextSequentialDataset(settings("ml-100k", item_text=["movie_title", "release_year"]))
    assert years.item_texts[years.token2id("item_id", "1")] == "Toy Story, 1995"
    assert years.fingerprint == movielens.fingerprint


@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_stock_model_and_dataloaders(shop, mode):
    arguments = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    dataset = shop(eval_args=arguments, hidden_size=8, inner_size=8, train_batch_size=4)
    config = dataset.config
    train, valid, test = data_preparation(config, dataset)
    model = get_model("SASRec")(config, train.dataset)
    losses = [float(model.calculate_loss(batch).detach()) for batch in train]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    rows = sum(len(batch[0]) for batch in test)
    assert rows == (4 if mode == "full" else 4 * 6)


def test_recbole_creates_it_for_our_models(shop):
    config = shop().config
    config["model"] = "LLMSRec"  # no more than the name: the backbone is not this test's matter
    assert type(create_dataset(config)) is TextSequentialDataset


# ---- Public datasets, where they are at hand

PUBLIC = {  # users, items, interactions, dates
    "amazon-scientific-2018": (3_285, 3_541, 22_743, False),
    "amazon-beauty": (22_332, 12_086, 198_215, True),
    "amazon-electronics-sample": (28_566, 15_743, 241_198, True),
    "steam-100k": (10_369, 3_593, 126_824, True),
    "ml-1m-titles": (6_040, 3_416, 999_611, True),
    "amazon-cds-200": (200, 902, 1_600, False),
}


@pytest.mark.skipif(not DATA, reason="RECBOLE_LLM_DATA names no folder with public datasets")
@pytest.mark.parametrize("name", PUBLIC)
def test_public_datasets(name, caplog):
    users, item_count, interactions, has_dates = PUBLIC[name]
    dataset = TextSequentialDataset(settings(name, DATA))
    assert (dataset.user_num - 1, dataset.item_num - 1, dataset.inter_num) == (users, item_count, interactions)
    assert dataset.has_dates is has_dates
    assert not [record for record in caplog.records if "have no text" in record.getMessage()]
    assert not any("&quot;" in text or "&amp;" in text or "\n" in text for text in dataset.item_texts)
    times = dataset.inter_feat["timestamp"].to_numpy()
    assert (np.diff(times) >= 0).all()
    if interactions < 500_000:
        train, valid, test = dataset.build()
        assert len(test) == users and len(train) + len(valid) + len(test) == interactions - users
