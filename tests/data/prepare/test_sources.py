"""Each source's format, with the quirks that its real files have."""

import json

import pytest
from raw_files import count, json_lines, lines

from recbole_llm.cli import main

pl = pytest.importorskip("polars")

HEAD = "user_id,parent_asin,rating,timestamp"


def review(user, item, time, **fields):
    return {"user_id": user, "parent_asin": item, "asin": "variant", "rating": 5.0, "timestamp": time, "text": "x\ny"} | fields


def meta(item, title, **fields):
    empty = {"price": None, "categories": [], "description": [], "store": None, "details": {}, "bought_together": None}
    return {"parent_asin": item, "title": title} | empty | fields


def test_amazon_2023_benchmark(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(
        raw / "Toys.train.csv",
        HEAD + ",history",
        "u1,A,5.0,1547589356557,",
        "u1,B,4.0,1547589356557,A",
        "u2,A,1.0,1600000000000,",
    )
    lines(raw / "Toys.valid.csv.gz", "u1,C,5.0,1600000000001,A B", "u2,B,5.0,1600000000001,A")  # an early issue: no header
    lines(raw / "Toys.test.csv", HEAD, "u2,C,3.0,1600000000002", "u1,D,3.0,1600000000002")
    description = ["First part.", "Second\tpart\nin lines."]
    json_lines(
        raw / "meta_Toys.jsonl.gz",
        meta(
            "A",
            'Zo\u00eb\u2019s "24&quot;" \t TV &amp;amp; more',
            store="Acme",
            categories=["Toys", "Arts, Crafts"],
            description=description,
        ),
        meta("B", None, price=69.0, details={"Brand": "x"}),
        meta("B", "again"),
        meta("unseen", "never bought"),
        meta("C", "  "),
    )
    inter, item, printed = prepare("amazon-2023:Toys", folder="amazon-2023-toys")
    assert inter["user_id"] == ["u1"] * 4 + ["u2"] * 3
    assert inter["item_id"] == ["A", "B", "C", "D", "A", "B", "C"]  # equal times keep the order of the file
    assert inter["timestamp"][0] == 1547589356557 and inter["split"][-3:] == ["train", "valid", "test"]
    assert item["item_id"] == ["A", "B", "C", "D"]
    assert item["title"] == ['Zo\u00eb\u2019s "24"" TV &amp; more'.replace('"" TV', '""   TV'), "", "", ""]
    assert item["categories"][0] == "Toys; Arts, Crafts" and item["description"][0] == "First part. Second part in lines."
    assert (count(printed, "raw lines"), count(printed, "users with equal times")) == (7, 1)
    assert count(printed, "items without title") == 3 and count(printed, "items without metadata") == 1
    assert count(printed, "items described twice") == 1


def test_amazon_2023_raw_reviews_keep_the_earliest(tmp_path, prepare):
    raw = tmp_path / "raw"
    again = review("u", "B", 1616156351887)
    json_lines(
        raw / "Toys.jsonl", review("u", "A", 1616156351889), again, again, review("u", "A", 1616156351885), review("", "A", 1)
    )
    json_lines(raw / "meta_Toys.jsonl", meta("A", "a"), meta("B", "b"))
    inter, _, printed = prepare("amazon-2023:Toys:raw", folder="amazon-2023-toys-raw")
    assert inter["item_id"] == ["A", "B"] and inter["timestamp"].tolist() == [1616156351885, 1616156351887]
    assert count(printed, "duplicates dropped") == 2 and count(printed, "lines without an id") == 1


def test_amazon_2018(tmp_path, prepare):
    raw = tmp_path / "raw"
    rows = [("u", "B", 1528934400), ("u", "A", 1528934400), ("u", "A", 1528934400), ("v", "A", 1500000000)]
    json_lines(
        raw / "Gift_Cards_5.json",
        *(
            {"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t, "vote": "1,341", "style": {"a:": " b"}}
            for u, i, t in rows
        ),
    )
    json_lines(
        raw / "meta_Gift_Cards.json.gz",
        {
            "asin": "A",
            "title": " Maggiano&#39;s Gift Card",
            "brand": "by\n    \n    Microsoft",
            "rank": "1 in x",
            "category": ["a", "b"],
        },
        {
            "asin": "B",
            "title": "R&B; &gt;&gt;&gt; &copy now",
            "brand": "",
            "rank": [">#1"],
            "description": ["", "<div>x</div>"],
        },
    )
    inter, item, printed = prepare("amazon-2018:Gift_Cards", folder="amazon-2018-gift-cards")
    assert inter["item_id"] == ["B", "A", "A", "A"]
    assert item["title"] == ["R&B; >>> &copy now", "Maggiano's Gift Card"] and item["brand"] == ["", "Microsoft"]
    assert item["categories"] == ["", "a; b"] and item["description"] == ["<div>x</div>", ""]
    assert (
        count(printed, "repeated pairs of user and item") == 1 and count(printed, "users whose last two times are equal") == 1
    )


def test_st2si_leaves_out_items_without_title(tmp_path, prepare):
    raw = tmp_path / "raw"
    rows = [{"reviewerID": "u", "asin": i, "overall": 5.0, "unixReviewTime": t} for t, i in enumerate("ABCD")]
    json_lines(raw / "Industrial_and_Scientific_5.json", *rows)
    json_lines(
        raw / "meta_Industrial_and_Scientific.json",
        {"asin": "A", "title": "a"},
        {"asin": "B", "title": ""},
        {"asin": "D", "title": "d"},
    )
    inter, _, printed = prepare("amazon-2018-scientific")
    assert inter["item_id"] == ["A", "D"]
    assert "ST2SI, Table 1: 11,041 users, 5,327 items, 76,896 interactions: ours differ" in printed


def test_amazon_2014_metadata_are_literals_that_are_not_run(tmp_path, prepare, capsys):
    raw = tmp_path / "raw"
    row = {"reviewerID": "u", "overall": 5.0, "unixReviewTime": 1393545600}
    json_lines(raw / "Music_5.json", row | {"asin": "0006428320"}, row | {"asin": "1384719342"})
    lines(
        raw / "meta_Music.json",
        "{'asin': '0006428320', 'title': \"Chef Paul's\", 'categories': [['Books', 'Cooking'], ['Books', 'Food']]}",
        "{'asin': '1384719342', 'salesRank': {}, 'description': 'a \"b\" c'}",
    )
    inter, item, printed = prepare("amazon-2014:Music", folder="amazon-2014-music")
    assert inter["item_id"] == ["0006428320", "1384719342"]
    assert item["title"] == ["Chef Paul's", ""] and item["categories"][0] == "Books; Cooking; Food"
    assert item["description"] == ["", 'a "b" c'] and count(printed, "items without title") == 1

    mark = tmp_path / "mark"
    lines(raw / "meta_Music.json", "{'asin': '1', 'title': 'a'}", f"{{'asin': open({str(mark)!r}, 'w').name}}")
    assert main(["prepare", "amazon-2014:Music", f"--raw-dir={raw}", "--overwrite=True"]) == 2
    assert "meta_Music.json:2 is neither JSON nor a Python dict (ValueError)" in capsys.readouterr().err
    assert not mark.exists()


def test_movielens_100k(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(raw / "u.data", "2\t10\t3\t881250949", "1\t11\t5\t881250950", "2\t12\t4\t881250948", "2\t11\t1\t881250949")
    flags = "|".join("0001010000000000000")  # Animation, Comedy
    nothing = "|".join("1" + "0" * 18)
    lines(
        raw / "u.item",
        f"10|Mis\u00e9rables, Les (1995) |01-Jan-1995||http://x|{flags}",
        f"11|Land Before Time III (1995) (V)|01-Jan-1995||http://x|{flags}",
        f"12|unknown||||{nothing}",
        encoding="latin-1",
    )
    inter, item, printed = prepare("movielens-100k")
    assert inter["user_id"] == ["2", "2", "2", "1"] and inter["item_id"] == ["12", "10", "11", "11"]
    assert item["title"] == ["unknown", "Mis\u00e9rables, Les (1995)", "Land Before Time III (1995) (V)"]
    assert item["release_year"] == ["", "1995", "1995"] and item["categories"][1] == "Animation; Comedy"
    assert "RSLLM, Table 3: 943 users, 1,682 items, 100,000 interactions: ours differ" in printed


def test_movielens_dat(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(raw / "ratings.dat", "1::1193::5::978300760", "1::661::3::978302109")
    lines(
        raw / "movies.dat",
        "661::Dracula: Dead and Loving It (1995)::Horror",
        "1193::Caf\u00e9 (1995)::Drama",
        encoding="latin-1",
    )
    inter, item, _ = prepare("movielens-1m")
    assert inter["timestamp"].tolist() == [978300760, 978302109] and inter["rating"].tolist() == [5, 3]
    assert item["title"] == ["Caf\u00e9 (1995)", "Dracula: Dead and Loving It (1995)"]


def test_movielens_csv(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(
        raw / "ratings.csv",
        "userId,movieId,rating,timestamp",
        "1,31,2.5,1260759144",
        "1,32,0.5,1260759145",
        "1,33,4.0,1260759146",
    )
    lines(
        raw / "movies.csv",
        "movieId,title,genres",
        '31,"""Great Performances"" Cats, The (1998)",(no genres listed)',
        "32,Hamlet (2000) ,Drama|Crime",
        "33,Fargo (2007-),Drama",
    )
    inter, item, _ = prepare("movielens-latest-small")
    assert inter["rating"].tolist() == [2.5, 0.5, 4]
    assert item["title"] == ['"Great Performances" Cats, The (1998)', "Hamlet (2000)", "Fargo (2007-)"]
    assert item["categories"] == ["", "Drama; Crime", "Drama"] and item["release_year"] == ["1998", "2000", "2007"]


def test_steam(tmp_path, prepare):
    raw = tmp_path / "raw"
    review = "{{u'username': u'{}', u'product_id': u'{}', u'date': u'{}', u'text': u'{}', u'hours': 3.2}}"
    lines(
        raw / "steam_reviews.json.gz",
        review.format("Z\\u00eb", 2, "2018-01-02", "good"),
        review.format("Z\\u00eb", 2, "2018-01-02", "good"),
        review.format("Z\\u00eb", 1, "2018-01-01", "a"),
        review.format("Z\\u00eb", 3, "", "a"),
    )
    lines(
        raw / "steam_games.json",
        "{u'app_name': u'Sam & Max', u'title': u'Sam &amp; Max 101', u'id': u'1', u'price': 4.99, u'genres': [u'Action']}",
        "{u'url': u'http://x', u'price': u'Free To Play'}",
        "{u'title': u'Only a title', u'id': u'2'}",
        "{u'app_name': u'twice', u'id': u'2'}",
    )
    inter, item, printed = prepare("steam", "--core=0")
    assert inter["user_id"] == ["Z\u00eb"] * 2 and inter["item_id"] == ["1", "2"]
    assert inter["timestamp"].tolist() == [1514764800, 1514851200]
    assert item["title"] == ["Sam & Max", "Only a title"]
    assert count(printed, "duplicates dropped") == 1 and count(printed, "without a time, left out") == 1
    assert count(printed, "items described twice") == 1


def test_lastfm(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(raw / "user_artists.dat", "userID\tartistID\tweight", "2\t51\t13883", "2\t65  \t170", "2\t60\t9", end="\r\n")
    lines(
        raw / "artists.dat",
        "id\tname\turl\tpictureURL",
        '51\t"Weird Al" Yankovic\thttp://x\t',
        "60\tRoyce da 5'9\"\t\t",
        "65\t\u05d0\t\t",
    )
    inter, item, printed = prepare("lastfm", "--core=0")
    assert inter["item_id"] == ["51", "65", "60"] and inter["timestamp"].tolist() == [0, 1, 2]
    assert item["title"] == ['"Weird Al" Yankovic', "\u05d0", "Royce da 5'9\""]
    assert "There are no times" in printed
    assert "timestamp_format: none" in (tmp_path / "dataset" / "lastfm" / "lastfm.yaml").read_text()

    head = "userID\tartistID\ttagID\ttimestamp"
    rows = ("2\t51\t1\t1238536800000", "2\t51\t2\t1138536800000", "2\t60\t2\t1100000000000")
    lines(raw / "user_taggedartists-timestamps.dat", head, *rows, end="\r\n")
    inter, _, printed = prepare("lastfm", "--core=0", "--overwrite=True")
    assert inter["item_id"] == ["60", "51"] and inter["timestamp"].tolist() == [1100000000000, 1138536800000]
    assert count(printed, "without a time, left out") == 1


@pytest.mark.parametrize("categories", [["Caf\u00e9s", "Bars"], "Caf\u00e9s, Bars"])
def test_yelp(tmp_path, prepare, categories):
    raw = tmp_path / "raw"
    tip = {"user_id": "u", "business_id": "b", "date": "2011-02-09", "text": "x"}
    json_lines(raw / "yelp_academic_dataset_tip.json", tip, tip, tip | {"text": "other"}, tip | {"date": "2010-10-04 01:02:03"})
    json_lines(
        raw / "yelp_academic_dataset_business.json",
        {"business_id": "b", "name": "Rebecca's", "categories": categories, "open": True},
    )
    inter, item, printed = prepare("yelp-tip", "--core=0")
    assert inter["timestamp"].tolist() == [1286154123, 1297209600, 1297209600]
    assert item["title"] == ["Rebecca's"] and item["categories"] == ["Caf\u00e9s; Bars"]
    assert count(printed, "duplicates dropped") == 1 and count(printed, "repeated pairs") == 2


def test_goodreads_with_an_index_column(tmp_path, prepare):
    raw = tmp_path / "raw"
    lines(
        raw / "goodreads_interactions.csv", ",user_id,book_id,is_read,rating,is_reviewed", "290,7,423,1,4,0", "814,7,1368,0,0,0"
    )
    lines(raw / "book_id_map.csv", "book_id_csv,book_id", "423,99", "1368,423")
    json_lines(raw / "goodreads_books.json", {"book_id": "99", "title": "Right"}, {"book_id": "423", "title": "Other"})
    inter, item, _ = prepare("goodreads", "--core=0")
    assert inter["item_id"] == ["423", "1368"] and item["title"] == ["Right", "Other"]
    assert inter["rating"][0] == 4 and inter["rating"][1] != inter["rating"][1]


def test_core_is_iterated(tmp_path, prepare):
    raw = tmp_path / "raw"
    rows = [f"{user},{item},5,{user}" for user, items in {1: "12", 2: "12", 3: "23", 4: "34"}.items() for item in items]
    lines(raw / "ratings.csv", "userId,movieId,rating,timestamp", *rows)
    inter, _, _ = prepare("movielens-20m", "--items=none", "--core=2")
    # Item 4 goes, with it user 4; then item 3 has one user left, and user 3 one item.
    assert sorted(set(inter["user_id"])) == ["1", "2"] and sorted(set(inter["item_id"])) == ["1", "2"]


def test_a_bad_line_is_named_and_nothing_written(tmp_path, capsys):
    raw = tmp_path / "raw"
    row = {"reviewerID": "u", "asin": "A", "overall": 5.0, "unixReviewTime": 1}
    json_lines(raw / "Toys_5.json", row)
    lines(raw / "meta_Toys.json", json.dumps({"asin": "A", "title": "a"}), '{"asin": "B"')
    assert main(["prepare", "amazon-2018:Toys", f"--raw-dir={raw}"]) == 2
    assert "meta_Toys.json:2 is no record as expected" in capsys.readouterr().err
    assert not list((tmp_path / "dataset").glob("*")) if (tmp_path / "dataset").exists() else True


def test_a_cut_gzip_file_is_named(tmp_path, capsys):
    raw = tmp_path / "raw"
    path = json_lines(
        raw / "Toys_5.json.gz", *({"reviewerID": "u", "asin": str(i), "overall": 5.0, "unixReviewTime": i} for i in range(999))
    )
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["prepare", "amazon-2018:Toys", f"--raw-dir={raw}", "--items=none"]) == 2
    assert "Toys_5.json.gz is no whole gzip file" in capsys.readouterr().err
