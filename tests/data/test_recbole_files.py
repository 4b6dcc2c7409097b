"""Data sets that RecBole fetches, from a server here: whole, cut, gone, and something else than a data set."""

from __future__ import annotations

import http.server
import io
import threading
import zipfile
from pathlib import Path

import pytest

from recbole_llm import cli
from recbole_llm.config.settings import make_config
from recbole_llm.data import recbole_files
from recbole_llm.data.dataset import TextSequentialDataset
from recbole_llm.errors import UserError


def archive_of(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def files_of(name: str, title: str) -> dict[str, str]:
    rows = [f"u{user}\ti{(user + place) % 8}\t5\t{10**9 + place}" for user in range(6) for place in range(5)]
    items = [f"i{item}\tTitle {item}" for item in range(8)]
    return {
        f"{name}.inter": "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows]) + "\n",
        f"{name}.item": "\n".join([f"item_id:token\t{title}:token_seq", *items]) + "\n",
    }


@pytest.fixture
def server(monkeypatch):
    """A server whose ``files`` are served by path; what ``cuts`` counts is the bytes after which answers break off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        files: dict[str, bytes] = {}
        cuts: list[int] = []
        asked: list[str] = []

        def do_GET(self):  # noqa: N802
            self.asked.append(self.path)
            data = self.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            body = data[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"one"')
            self.end_headers()
            self.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{served.server_address[1]}"
        addresses = {"ml-1m": f"{place}/ml-1m.zip", "amazon-cds-vinyl": f"{place}/x/Amazon_CDs_and_Vinyl.zip"}
        monkeypatch.setattr(recbole_files, "address_of", addresses.get)
        yield Handler
        served.shutdown()


def read(dataset: str) -> TextSequentialDataset:
    return TextSequentialDataset(make_config("SASRec", dataset, config_dict={"use_gpu": False, "protocol": "retrieval"}))


@pytest.mark.parametrize("cuts", [[], [200, 100]], ids=["whole", "cut twice"])
def test_a_data_set_is_fetched_once(server, cuts):
    server.files = {"/ml-1m.zip": archive_of(files_of("ml-1m", "movie_title"))}
    server.cuts = list(cuts)
    data = read("ml-1m")
    assert (data.user_num, data.item_num) == (7, 9) and data.item_texts[1].startswith("Title ")
    assert sorted(path.name for path in Path("dataset").iterdir()) == ["ml-1m"]
    asked = len(server.asked)
    assert asked == 1 + 2 * bool(cuts)
    read("ml-1m")
    assert len(server.asked) == asked


def test_files_are_renamed_and_may_lie_in_a_folder(server):
    files = {f"some/where/{name}": text for name, text in files_of("Amazon_CDs_and_Vinyl", "title").items()}
    server.files = {"/x/Amazon_CDs_and_Vinyl.zip": archive_of({**files, "../../outside.txt": "no"})}
    assert read("amazon-cds-vinyl").item_texts[1].startswith("Title ")
    names = ["amazon-cds-vinyl.inter", "amazon-cds-vinyl.item", "outside.txt"]
    assert sorted(path.name for path in Path("dataset/amazon-cds-vinyl").iterdir()) == names
    assert not list(Path("..").glob("outside.txt"))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "cannot be fetched (HTTP 404): download it elsewhere and put it at dataset/ml-1m.zip"),
        (b"<html>moved</html>", "dataset/ml-1m.zip is no whole zip file"),
        (archive_of({"readme.txt": "x"}), "holds no ml-1m.inter"),
        (archive_of({"ml-1m.inter": "x" * 5000})[:-30], "is no whole zip file"),
    ],
    ids=["gone", "a page", "another archive", "cut off"],
)
def test_what_is_no_data_set_is_one_sentence(server, data, sentence, capsys):
    server.files = {} if data is None else {"/ml-1m.zip": data}
    with pytest.raises(UserError) as error:
        read("ml-1m")
    assert sentence in str(error.value)
    assert not Path("dataset/ml-1m").exists() and not list(Path("dataset").glob("*.part"))
    assert cli.main(["run", "--model=SASRec", "--dataset=ml-1m"]) == 2
    assert sentence in capsys.readouterr().err


def test_an_archive_that_was_brought_is_used(server):
    Path("dataset").mkdir()
    Path("dataset/ml-1m.zip").write_bytes(archive_of(files_of("ml-1m", "movie_title")))
    assert read("ml-1m").user_num == 7 and server.asked == []


def test_recbole_knows_these():
    for dataset in ("ml-1m", "amazon-cds-vinyl"):
        assert str(recbole_files.address_of(dataset)).startswith("https://")
    assert recbole_files.address_of("no such") is None
