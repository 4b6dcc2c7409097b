"""Where the sources' files are, in one table. Checksums are those that the publishers give, or that several readers report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """An address with ``{places}`` to fill, and the checksum of what it gives where one is known."""

    url: str
    checksum: str = ""

    def of(self, **places: str) -> str:
        return self.url.format(**places)


_MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets"
_GROUPLENS = "https://files.grouplens.org/datasets"

ADDRESSES = {
    "amazon-2023/benchmark": Address(_MCAULEY + "/data/amazon_2023/benchmark/{core}/last_out/{category}.{split}.csv.gz"),
    "amazon-2023/ratings": Address(_MCAULEY + "/data/amazon_2023/benchmark/{core}/rating_only/{category}.csv.gz"),
    "amazon-2023/reviews": Address(_MCAULEY + "/data/amazon_2023/raw/review_categories/{category}.jsonl.gz"),
    "amazon-2023/items": Address(_MCAULEY + "/data/amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz"),
    "amazon-2018/reviews": Address(_MCAULEY + "/data/amazon_v2/categoryFilesSmall/{category}_5.json.gz"),
    "amazon-2018/items": Address(_MCAULEY + "/data/amazon_v2/metaFiles2/meta_{category}.json.gz"),
    "amazon-2014/reviews": Address(
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_{category}_5.json.gz"
    ),
    "amazon-2014/items": Address("https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_{category}.json.gz"),
    "movielens/100k": Address(_GROUPLENS + "/movielens/ml-100k.zip", "md5:0e33842e24a9c977be4e0107933c0723"),
    "movielens/1m": Address(_GROUPLENS + "/movielens/ml-1m.zip", "md5:c4d9eecfca2ab87c1945afe126590906"),
    "movielens/10m": Address(_GROUPLENS + "/movielens/ml-10m.zip", "md5:ce571fd55effeba0271552578f2648bd"),
    "movielens/20m": Address(_GROUPLENS + "/movielens/ml-20m.zip", "md5:cd245b17a1ae2cc31bb14903e1204af3"),
    "movielens/25m": Address(_GROUPLENS + "/movielens/ml-25m.zip", "md5:6b51fb2759a8657d3bfcbfc42b592ada"),
    "movielens/32m": Address(_GROUPLENS + "/movielens/ml-32m.zip", "md5:d472be332d4daa821edc399621853b57"),
    "movielens/latest-small": Address(_GROUPLENS + "/movielens/ml-latest-small.zip"),
    "lastfm": Address(
        _GROUPLENS + "/hetrec2011/hetrec2011-lastfm-2k.zip",
        "sha256:6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
    ),
    "steam/reviews": Address(_MCAULEY + "/data/steam/steam_reviews.json.gz"),
    "steam/items": Address(_MCAULEY + "/data/steam/steam_games.json.gz"),
    "goodreads": Address(_MCAULEY + "/gdrive/goodreads/{file}"),
}
