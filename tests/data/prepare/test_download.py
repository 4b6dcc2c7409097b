"""Downloads: cut, resumed, refused, and what is said where nothing can be fetched."""

import hashlib
import http.server
import threading
import zipfile

import pytest

pytest.importorskip("polars")

from recbole_llm.data.prepare import download as downloads  # noqa: E402
from recbole_llm.data.prepare.source import RawFile  # noqa: E402
from recbole_llm.errors import UserError  # noqa: E402

DATA = bytes(range(256)) * 2000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves DATA with ranges; ``cuts`` holds after how many bytes each answer breaks off (None: whole)."""

    cuts: list = []
    asked: list = []
    version = '"one"'
    ranges = True
    data = DATA

    def do_GET(self):
        start, cls = 0, type(self)
        asked = self.headers.get("Range")
        cls.asked.append(asked)
        if asked and self.ranges and self.headers.get("If-Range") == self.version:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.version:
            self.send_header("ETag", self.version)
        self.end_headers()
        cut = cls.cuts.pop(0) if cls.cuts else None
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    kind = type("OwnServer", (Server,), {"cuts": [], "asked": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    kind.address = f"http://127.0.0.1:{running.server_port}/data.bin"
    yield kind
    running.shutdown()
    running.server_close()


def checksum(kind="sha256"):
    return f"{kind}:{hashlib.new(kind, DATA).hexdigest()}"


def test_whole(server, tmp_path):
    target = downloads.download(server.address, tmp_path / "raw" / "data.bin", checksum("md5"))
    assert target.read_bytes() == DATA and [path.name for path in target.parent.iterdir()] == ["data.bin"]


def test_cut_in_the_middle_and_resumed_at_once(server, tmp_path):
    server.cuts += [100_000, 50_000]
    target = downloads.download(server.address, tmp_path / "data.bin", checksum())
    assert target.read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_cut_for_good_and_resumed_by_the_next_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.cuts += [123_456]
    with pytest.raises(UserError, match="came in part only .* after 123,456 bytes.*: run the command again to go on"):
        downloads.download(server.address, tmp_path / "data.bin", checksum())
    assert not (tmp_path / "data.bin").exists()
    assert downloads.download(server.address, tmp_path / "data.bin", checksum()).read_bytes() == DATA
    assert server.asked[-1] == "bytes=123456-"
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.cuts += [1000]
    with pytest.raises(UserError, match="in part only"):
        downloads.download(server.address, tmp_path / "data.bin")
    server.version, server.data = '"two"', DATA[::-1]
    assert downloads.download(server.address, tmp_path / "data.bin").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("attribute, value", [("ranges", False), ("version", "")])
def test_a_server_that_cannot_resume_gives_all_again(server, tmp_path, attribute, value):
    setattr(server, attribute, value)
    server.cuts += [300_000]
    assert downloads.download(server.address, tmp_path / "data.bin", checksum()).read_bytes() == DATA


def test_wrong_checksum_is_refused_and_nothing_stays(server, tmp_path):
    with pytest.raises(UserError, match=r"what http://.* gave is not the file that was published: its md5 is \w+, not abc"):
        downloads.download(server.address, tmp_path / "data.bin", "md5:abc")
    assert not list(tmp_path.iterdir())


def test_one_sentence_where_nothing_can_be_fetched(tmp_path):
    with pytest.raises(UserError) as error:
        downloads.obtain([RawFile("a.csv.gz", "http://127.0.0.1:9/a.csv.gz")], tmp_path)
    sentence = str(error.value)
    assert "\n" not in sentence and "http://127.0.0.1:9/a.csv.gz cannot be fetched" in sentence
    assert sentence.endswith(f"put it at {tmp_path / 'a.csv.gz'}.")


def test_not_found(server, tmp_path):
    server.do_GET = lambda self: self.send_error(404)
    with pytest.raises(UserError, match=r"cannot be fetched \(HTTP 404\): download it elsewhere and put it at"):
        downloads.download(server.address, tmp_path / "data.bin")


def test_a_file_for_people_only(tmp_path):
    with pytest.raises(UserError, match="business.json is not there, and only people can get it: see https://yelp.example"):
        downloads.obtain([RawFile("business.json", page="https://yelp.example")], tmp_path)


def test_files_are_found_packed_unpacked_and_by_other_names(tmp_path):
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "B.csv.gz").write_text("x")
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "u.data").write_text("x")
    wanted = [
        RawFile("a.json.gz"),
        RawFile("b.csv", other_names=("B.csv",)),
        RawFile("u.data", archive="ml.zip"),
        RawFile("absent", required=False),
    ]
    found = downloads.obtain(wanted, tmp_path)
    names = {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()}
    assert names == {"a.json.gz": "a.json", "b.csv": "B.csv.gz", "u.data": "ml/u.data"}


def test_a_member_of_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "x")
        archive.writestr("../../u.item", "y")  # a name that leads out of the folder
    file = RawFile("u.data", "http://127.0.0.1:9/ml.zip", archive="ml.zip")
    assert downloads.obtain([file], tmp_path)["u.data"] == tmp_path / "ml" / "u.data"
    item = RawFile("u.item", "http://127.0.0.1:9/ml.zip", archive="ml.zip")
    assert downloads.obtain([item], tmp_path)["u.item"] == tmp_path / "ml" / "u.item"
    wrong = RawFile("u.user", "http://127.0.0.1:9/ml.zip", archive="ml.zip", checksum="md5:abc")
    with pytest.raises(UserError, match="ml.zip is not the file that was published"):
        downloads.obtain([wrong], tmp_path)
    (tmp_path / "ml.zip").write_bytes((tmp_path / "ml.zip").read_bytes()[:50])
    with pytest.raises(UserError, match="ml.zip is no whole zip file"):
        downloads.obtain([RawFile("u.user", "http://x", archive="ml.zip")], tmp_path)
