"""Questions over HTTP: the answers of the model, whatever arrives together, and a sentence for each mistake."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from recbole_llm import cli
from recbole_llm.serving.app import make_app
from recbole_llm.serving.limits import Limits

LIMITS = Limits(max_history=30, max_topk=20, max_body=2000, max_queue=4, max_seconds=5, batch_milliseconds=20)


@pytest.fixture
def client(service):
    with TestClient(make_app(service, LIMITS)) as client:
        yield client


def pairs(items):
    return [(item["item"], item["title"]) for item in items]


def test_an_answer_is_that_of_the_model(client, service):
    trained = service.trained
    answer = client.post("/recommend", json={"user": "u1", "topk": 5}).json()
    (expected,) = trained.recommend(users="u1", topk=5)
    assert pairs(answer["items"]) == [best[:2] for best in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([best.score for best in expected], rel=1e-4)
    assert [item["title"] for item in answer["history"]] == trained.history_of("u1")
    titles = trained.history_of("u2")[:4]
    ids = [service.titles.ids[service.titles.find(title)] for title in titles]
    (expected,) = trained.recommend(histories=[titles], topk=4, filter=None)
    for history in (titles, ids, [f"  {title.upper()} " for title in titles]):
        asked = {"history": history, "topk": 4, "exclude_history": False}
        assert pairs(client.post("/recommend", json=asked).json()["items"]) == [best[:2] for best in expected]


def test_why_is_the_nearest_of_the_history_by_cosine(client, service):
    vectors = service.vectors.items
    answer = client.post("/recommend", json={"user": "u3", "topk": 3}).json()
    known = {item["title"] for item in answer["history"]}
    for item in answer["items"]:
        mine = vectors[service.titles.find(item["title"])]
        cosines = {
            title: float(mine @ vectors[service.titles.find(title)] / mine.norm() / vectors[service.titles.find(title)].norm())
            for title in known
        }
        best = sorted(cosines, key=cosines.__getitem__, reverse=True)[:2]
        assert [reason["title"] for reason in item["because"]] == best
        similarities = [reason["similarity"] for reason in item["because"]]
        assert similarities == pytest.approx([cosines[title] for title in best], abs=1e-5)


def test_questions_that_arrive_together_are_one_batch_with_the_answers_of_each_alone(service):
    users = [f"u{number}" for number in range(1, 9)]
    app = make_app(service, Limits(batch_milliseconds=200))

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post("/recommend", json={"user": user, "topk": 5}) for user in users))

    found = [answer.json() for answer in asyncio.run(ask_all())]
    assert app.state.batcher.batches == [8]
    for user, answer in zip(users, found, strict=True):
        (alone,) = service.trained.recommend(users=user, topk=5)
        assert pairs(answer["items"]) == [best[:2] for best in alone]
        assert [item["score"] for item in answer["items"]] == pytest.approx([best.score for best in alone], rel=1e-4)


def test_one_forward_pass_of_the_llm_and_one_search_for_a_user(client, service, monkeypatch):
    calls = []

    def counted(name, function):
        return lambda *given, **more: calls.append(name) or function(*given, **more)

    decoder = service.trained.model.backbone.model
    monkeypatch.setattr(decoder, "forward", counted("LLM", decoder.forward))
    monkeypatch.setattr(service.index, "search", counted("search", service.index.search))
    client.post("/recommend", json={"user": "u1"})  # the keys and values of the prompts' common beginning are kept from then on
    calls.clear()
    assert client.post("/recommend", json={"user": "u2"}).status_code == 200
    assert calls == ["LLM", "search"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("asked", "status", "sentence"),
    [
        ({}, 422, "give either user or history"),
        ({"user": "u1", "history": ["x"]}, 422, "give either user or history"),
        ({"user": "nobody"}, 404, "chain has no user 'nobody'"),
        ({"user": True}, 422, "user: it must be"),
        ({"user": "x" * 1001}, 422, "user: .*1000"),
        ({"history": []}, 422, "at least one title"),
        ({"history": ["The Unwritten Title"]}, 404, "no item with the title or id 'The Unwritten Title'; the nearest is 'The "),
        ({"history": "The Iron Ferry"}, 422, "history: it must be a valid list"),
        ({"history": ["1", None]}, 422, "history.1: it must be"),
        ({"history": ["1"] * 31}, 422, "31 items are more than the 30"),
        ({"history": ["1"], "topk": 21}, 422, "21 is more than the 20"),
        ({"history": ["1"], "topk": 0}, 422, "topk: it must be greater"),
        ({"history": ["1"], "topk": "5"}, 422, "topk: it must be"),
        ({"history": ["1"], "topk": 1e400}, 422, "topk: it must be"),
        ({"history": ["1"], "exclude_history": "no"}, 422, "exclude_history: it must be"),
        ({"histroy": ["1"]}, 422, "histroy is no key.*user, history, topk, exclude_history"),
        ({"history": ["x" * 900] * 3}, 413, "more than 2000 bytes"),
        ([1], 422, "must be a JSON object"),
        (None, 4, "body|JSON object"),
    ],
)
def test_a_mistake_is_one_sentence(client, asked, status, sentence):
    body = json.dumps(asked).replace("Infinity", "1e400")
    answer = client.post("/recommend", content=body, headers=JSON)
    assert str(answer.status_code).startswith(str(status)), answer.text
    assert set(answer.json()) == {"error"} and re.search(sentence, answer.json()["error"]), answer.text
    assert answer.json()["error"].isprintable()


MALFORMED = [b"", b"{", b"\xff\xfe", b'{"history":' * 150, b"[" * 1900, b'{"user": "\\ud800"}']
MALFORMED.append(b'{"topk": ' + b"9" * 1900 + b"}")


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_refused(client, body):
    answer = client.post("/recommend", content=body, headers=JSON)
    assert answer.status_code in (400, 404, 422) and set(answer.json()) == {"error"} and answer.json()["error"].isprintable()
    assert client.get("/health").json()["status"] == "ok"


def test_a_body_without_length_is_cut_off(client):
    answer = client.post("/recommend", content=(b" " * 500 for _ in range(100)), headers=JSON)
    assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/recommend", 405, "POST /recommend"),
        ("POST", "/health", 405, "POST /recommend"),
        ("GET", "/docs", 404, "there is no /docs"),
        ("GET", "/%1b%5b2J", 404, "there is no"),
        ("GET", "/items?limit=0", 422, "limit: it must be greater"),
        ("GET", "/items?limit=51", 422, "limit: it must be less"),
        ("GET", f"/items?query={'x' * 1001}", 422, "query: .*1000"),
    ],
)
def test_other_addresses(client, method, path, status, sentence):
    answer = client.request(method, path)
    assert answer.status_code == status and re.search(sentence, answer.json()["error"])
    assert answer.json()["error"].isprintable()


def test_health_and_completion(client, service):
    health = client.get("/health").json()
    assert (health["status"], health["model"], health["dataset"], health["items"]) == ("ok", "LLMSRec", "chain", 40)
    assert health["users"] is True and health["search"] == "exact"
    title = service.titles.texts[5]
    found = client.get("/items", params={"query": title[:8].lower(), "limit": 50}).json()
    assert title in [item["title"] for item in found]
    assert client.get("/items", params={"query": service.titles.ids[5], "limit": 1}).json()[0]["title"] == title


def test_every_answer_forbids_what_is_not_the_servers_own(client):
    for path in ("/", "/page.css", "/page.js", "/health", "/nothing"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    page = client.get("/").text
    assert not re.search(r"(?:src|href)=\"(?!page\.|data:,)|<style|style=|\son\w+=|https?:", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", client.get("/page.js").text)


def test_a_page_from_elsewhere_cannot_read_a_local_server(service):
    with TestClient(make_app(service, LIMITS, ["127.0.0.1", "[::1]"])) as client:
        for host in ("127.0.0.1", "127.0.0.1:8000", "[::1]:8000"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", ""):
            answer = client.get("/health", headers={"host": host})
            assert answer.status_code == 400 and "no name of this server" in answer.json()["error"]


def test_a_full_queue_and_a_late_answer(service, monkeypatch):
    """Of seven questions one is computed, four wait, and two are refused; none of the five is there in time."""
    may_go = threading.Event()
    monkeypatch.setattr(service, "answer", lambda questions: may_go.wait(20) and [])
    limits = Limits(max_queue=4, max_batch=1, max_seconds=1, batch_milliseconds=0)
    app = make_app(service, limits)

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post("/recommend", json={"user": "u1"}))
            await asyncio.sleep(0.3)
            rest = [asyncio.create_task(client.post("/recommend", json={"user": "u1"})) for _ in range(6)]
            found = await asyncio.gather(first, *rest)
            may_go.set()
            return found

    found = asyncio.run(ask_all())
    assert sorted(answer.status_code for answer in found) == [503, 503, 504, 504, 504, 504, 504]
    assert all(answer.headers["retry-after"] == "1" for answer in found)
    sentences = {answer.json()["error"] for answer in found}
    assert sentences == {"4 questions are waiting already: ask again later.", "no answer within 1 seconds: ask again later."}


def test_what_fails_is_told_without_its_reason_and_the_next_is_answered(service, monkeypatch, caplog):
    with TestClient(make_app(service, LIMITS), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(service.index, "search", lambda *given: 1 / 0)
            answer = client.post("/recommend", json={"user": "u1"})
            assert answer.status_code == 500 and "server's log" in answer.json()["error"] and "division" not in answer.text
        assert "division by zero" in caplog.text
        assert client.post("/recommend", json={"user": "u1"}).status_code == 200


def test_limits_are_read_from_the_command():
    assert Limits.of({"max_topk": 7, "batch_milliseconds": 0}).max_topk == 7
    for value in (0, -1, True, "many", 2.5, 1e12):
        with pytest.raises(ValueError, match="max_topk is"):
            Limits.of({"max_topk": value})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the folder of a run or an export"),
        (["a", "b"], "found 2"),
        (["saved", "--port=70000"], "port is '70000'"),
        (["saved", "--search=fast"], "search is 'fast'"),
        (["saved", "--max_topk=none"], "max_topk is 'none'"),
        (["saved", "--prt=1"], "did you mean --port"),
        (["saved", "--host=300.1.1.1"], "cannot be used"),
        (["nowhere", "--port=0"], "nowhere.recbole_llm.json does not exist"),
    ],
)
def test_mistakes_on_the_command_line(arguments, sentence, capsys):
    assert cli.main(["serve", *arguments]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(trained, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", str(trained["LLMSRec"]), f"--port={taken.getsockname()[1]}"]) == 2
    error = capsys.readouterr().err
    assert "give another --port" in error and "Loading" not in error


@pytest.mark.slow
def test_a_server_ends_at_a_signal_after_the_question_that_it_took(trained, tmp_path):
    command = [sys.executable, "-m", "recbole_llm", "serve", str(trained["LLMSRec"]), "--port=0", "--batch_milliseconds=1500"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("Ready"):
                break
        address = re.search(r"http://127.0.0.1:\d+/", line)[0]
        found = []

        def ask():
            found.append(httpx.post(f"{address}recommend", json={"user": "u1"}, timeout=20))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.7)  # it waits for others now
        process.send_signal(signal.SIGTERM)
        asking.join(20)
        assert process.wait(20) == 0 and found[0].status_code == 200 and len(found[0].json()["items"]) == 10
        assert process.stderr.read() == "Stopped.\n", lines
