"""The rules of LLM-SRec, against a restatement that counts in plain Python."""

import random
from collections import Counter, defaultdict

import pytest
from raw_files import count, json_lines, lines, written

from recbole_llm.cli import main

pl = pytest.importorskip("polars")

RATES = {"amazon-movies": 0.05, "amazon-electronics": 0.05, "amazon-cds": 0.33, "amazon-scientific": 1.0}
CATEGORIES = {
    "amazon-movies": "Movies_and_TV",
    "amazon-electronics": "Electronics",
    "amazon-cds": "CDs_and_Vinyl",
    "amazon-scientific": "Industrial_and_Scientific",
}


def synthetic(raw, category, users, items, seed):
    """A folder as published: 5 to 14 purchases a user, popular and rare items, files that list users in orders of their own."""
    generator = random.Random(seed)
    splits = {"train": [], "valid": [], "test": []}
    for user in range(users):
        length = generator.randint(5, 14)
        bought = generator.sample(range(items), length - 1) + [int(generator.random() ** 3 * items)]
        for place, item in enumerate(bought):
            split = "test" if place == length - 1 else "valid" if place == length - 2 else "train"
            splits[split].append((f"U{user}", f"I{item}", 1_500_000_000_000 + generator.randrange(5) + 5 * place))
    generator.shuffle(splits["valid"])
    splits["test"].reverse()
    for split, rows in splits.items():
        text = [f"{user},{item},5.0,{time}" for user, item, time in rows]
        lines(raw / f"{category}.{split}.csv", "user_id,parent_asin,rating,timestamp", *text)
    records = (
        {
            "parent_asin": f"I{item}",
            "title": (f"Title {item}", "", None)[min(item % 7, 2)] if item % 7 < 3 else f"Title {item}",
            "description": [f"First of {item}", "second"] if item % 2 else [],
        }
        for item in range(items)
    )
    json_lines(raw / f"meta_{category}.jsonl", *records)
    return splits


def restated(splits, rate):
    """User -> its (split, item) pairs, as the rules say, step by step."""
    order = list(dict.fromkeys(user for split in ("train", "valid", "test") for user, _, _ in splits[split]))
    random.seed(0)
    sampled = set(random.sample(order, int(len(order) * rate)))
    everything = [(split, user, item) for split in splits for user, item, _ in splits[split] if user in sampled]
    of_user = Counter(user for _, user, _ in everything)
    of_item = Counter(item for _, _, item in everything)
    histories = defaultdict(list)
    for split, user, item in everything:
        if of_user[user] > 4 and of_item[item] > 4:
            histories[user].append((split, item))
    return {user: pairs for user, pairs in histories.items() if sum(split == "train" for split, _ in pairs) > 4}


@pytest.mark.parametrize(
    "name, users, items", [("amazon-scientific", 300, 90), ("amazon-cds", 900, 70), ("amazon-movies", 4000, 60)]
)
def test_equal_user_by_user(tmp_path, prepare, name, users, items):
    splits = synthetic(tmp_path / "raw", CATEGORIES[name], users, items, seed=len(name))
    expected = restated(splits, RATES[name])
    inter, item, printed = prepare(name)
    found = defaultdict(list)
    for user, split, bought in zip(inter["user_id"], inter["split"], inter["item_id"], strict=True):
        found[user].append((split, bought))
    assert found == expected and 20 < len(expected) < users * RATES[name]
    assert count(printed, "users") == len(expected)
    assert count(printed, "items") == len({bought for pairs in expected.values() for _, bought in pairs})
    assert count(printed, "interactions") == sum(map(len, expected.values()))
    assert "LLM-SRec, Table 10:" in printed and "LLM-STAR, Table 3:" in printed
    titles = dict(zip(item["item_id"], item["title"], strict=True))
    assert all(titles[key] == ("Empty title" if int(key[1:]) % 7 in (1, 2) else f"Title {key[1:]}") for key in titles)
    texts = dict(zip(item["item_id"], item["description"], strict=True))
    assert all(texts[key] == (f"First of {key[1:]}" if int(key[1:]) % 2 else "Empty description") for key in texts)


def test_some_users_lose_their_last_item(tmp_path, prepare):
    """Valid and test items fall out by the same count; the rules do not put others in their place."""
    splits = synthetic(tmp_path / "raw", "CDs_and_Vinyl", 900, 350, seed=3)
    expected = restated(splits, 0.33)
    assert any(all(split != "test" for split, _ in pairs) for pairs in expected.values())
    inter, _, _ = prepare("amazon-cds")
    assert Counter(inter["split"]) == Counter(split for pairs in expected.values() for split, _ in pairs)


def test_settings_of_a_preset_are_those_of_the_library(tmp_path, prepare):
    from recbole_llm.config.schema import load_yaml
    from recbole_llm.registry import properties_folder

    synthetic(tmp_path / "raw", "Industrial_and_Scientific", 200, 60, seed=1)
    prepare("amazon-scientific")
    written_settings = load_yaml(tmp_path / "dataset" / "amazon-scientific" / "amazon-scientific.yaml")
    assert written_settings == load_yaml(properties_folder() / "dataset" / "amazon-scientific.yaml")


def test_same_bytes_again(tmp_path, prepare):
    synthetic(tmp_path / "raw", "CDs_and_Vinyl", 300, 40, seed=2)
    prepare("amazon-cds")
    folder = tmp_path / "dataset" / "amazon-cds"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["prepare", "amazon-cds", f"--raw-dir={tmp_path / 'raw'}", "--overwrite=True"]) == 0
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: again[name] for name in first if name != "README.md"} == {k: v for k, v in first.items() if k != "README.md"}
    assert written(folder)[0]["user_id"]
