"""The endpoint is a server in a thread: what a real one does wrong is played by a function per test."""

from __future__ import annotations

import collections
import email.utils
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from recbole_llm import cli
from recbole_llm.backbone import endpoint as endpoint_module
from recbole_llm.backbone.endpoint import Answer, EndpointSettings, ask_endpoint
from recbole_llm.errors import UserError

SECRET = "sk-local-0123456789abcdef"


def completion(text, **choice):
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]
    }


def how_many_incomplete(answers):
    return sum(answer.text is None for answer in answers)


def echo(prompt, nth):
    """The default endpoint: answers every prompt with itself."""
    return 200, {}, completion(f"answer to {prompt}")


class Endpoint:
    """A chat endpoint on this machine.

    Attributes:
        reply: (prompt, how often this prompt was asked) -> (status, headers, body); a str or bytes body is sent as is.
        requests: (path, headers, body) in order of arrival.
        most_open: the largest number of requests that were open at the same time.
    """

    def __init__(self):
        self.reply = echo
        self.requests = []
        self.times = []
        self.most_open = 0
        self._open = 0
        self._asked = collections.Counter()
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # 40 ms per answer otherwise

            def do_POST(self):
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                if not sent:
                    return  # a client that was interrupted between the headers and the body
                body = json.loads(sent)
                prompt = body["messages"][-1]["content"]
                with endpoint._lock:
                    endpoint.requests.append((self.path, self.headers, body))
                    endpoint.times.append(time.monotonic())
                    endpoint._asked[prompt] += 1
                    nth = endpoint._asked[prompt]
                    endpoint._open += 1
                    endpoint.most_open = max(endpoint.most_open, endpoint._open)
                try:
                    status, headers, reply = endpoint.reply(prompt, nth)
                finally:
                    with endpoint._lock:
                        endpoint._open -= 1
                if not isinstance(reply, (str, bytes)):
                    reply = json.dumps(reply)
                reply = reply.encode() if isinstance(reply, str) else reply
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                except OSError:
                    self.close_connection = True  # the client has gone, as some tests want

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def prompts(self):
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def endpoint(no_proxy, monkeypatch):
    """An endpoint, and an ``openai`` client that waits a twentieth of its usual time before a retry."""
    pytest.importorskip("openai")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.025)
    monkeypatch.setattr(endpoint_module, "_PAUSE", 0.025)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def settings(endpoint, tmp_path, monkeypatch):
    """Return settings for the endpoint, with a few of them changed."""
    monkeypatch.setenv("LOCAL_ENDPOINT_KEY", SECRET)

    def make(**changes):
        values = {
            "base_url": endpoint.url,
            "model": "gpt-local",
            "api_key_variable": "LOCAL_ENDPOINT_KEY",
            "retries": 2,
            "timeout": 10.0,
            "answers_file": tmp_path / "answers" / "file.jsonl",
        }
        return EndpointSettings(**{**values, **changes})

    return make


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- what is asked and what comes back ------------------------------------------------------------------------------


def test_request_has_what_the_protocol_wants(endpoint, settings):
    answers = ask_endpoint(["Which film next?"], settings(temperature=0, max_tokens=17))
    assert answers == [Answer("answer to Which film next?", None)]
    ((path, headers, body),) = endpoint.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body == {
        "model": "gpt-local",
        "messages": [{"role": "user", "content": "Which film next?"}],
        "temperature": 0,
        "max_tokens": 17,
    }


def test_parameters_that_are_none_are_not_sent(endpoint, settings):
    ask_endpoint(["a"], settings(temperature=None, max_tokens=None))
    assert set(endpoint.requests[0][2]) == {"model", "messages"}


def test_without_a_key_variable_no_key_of_the_environment_is_sent(endpoint, settings, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert ask_endpoint(["a"], settings(api_key_variable=None))[0].text
    assert SECRET not in str(endpoint.requests[0][1])


def test_answers_have_the_order_of_the_prompts_whatever_the_order_of_arrival(endpoint, settings):
    def later_prompts_first(prompt, nth):
        time.sleep(0.02 * (6 - int(prompt)))
        return echo(prompt, nth)

    endpoint.reply = later_prompts_first
    prompts = [str(number) for number in range(6)]
    assert [answer.text for answer in ask_endpoint(prompts, settings(parallel_requests=6))] == [
        f"answer to {p}" for p in prompts
    ]


def test_parallelism_is_used_and_bounded(endpoint, settings):
    def slowly(prompt, nth):
        time.sleep(0.03)
        return echo(prompt, nth)

    endpoint.reply = slowly
    ask_endpoint([str(number) for number in range(12)], settings(parallel_requests=3))
    assert endpoint.most_open == 3


def test_equal_prompts_are_asked_once_and_all_answered(endpoint, settings):
    progress = []
    answers = ask_endpoint(["a", "b", "a"], settings(), lambda done, total: progress.append((done, total)))
    assert [answer.text for answer in answers] == ["answer to a", "answer to b", "answer to a"]
    assert sorted(endpoint.prompts) == ["a", "b"]
    assert progress[-1] == (3, 3)


def test_no_prompts_no_requests(endpoint, settings):
    assert ask_endpoint([], settings()) == []
    assert endpoint.requests == []


def test_a_single_text_is_not_taken_for_prompts(settings):
    with pytest.raises(TypeError):
        ask_endpoint("abc", settings())


def test_works_where_an_event_loop_is_running(endpoint, settings):
    import asyncio

    async def cell_of_a_notebook():
        return ask_endpoint(["a"], settings())

    assert asyncio.run(cell_of_a_notebook())[0].text == "answer to a"


# --- the file of answers --------------------------------------------------------------------------------------------


def test_answers_in_the_file_need_no_request_no_key_and_no_package(endpoint, settings, monkeypatch):
    first = ask_endpoint(["a", "b"], settings())
    assert len(endpoint.requests) == 2
    monkeypatch.delenv("LOCAL_ENDPOINT_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    progress = []
    assert ask_endpoint(["b", "a"], settings(), lambda *counts: progress.append(counts)) == first[::-1]
    assert progress == [(2, 2)]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 3}])
def test_another_model_or_parameter_is_another_question(endpoint, settings, change):
    ask_endpoint(["a"], settings())
    ask_endpoint(["a"], settings(**change))
    assert len(endpoint.requests) == 2


def test_each_answer_is_on_disk_when_it_is_reported(endpoint, settings):
    asked = settings(parallel_requests=1)
    lines = []
    ask_endpoint(["a", "b", "c"], asked, lambda done, total: lines.append((done, asked.answers_file.read_bytes().count(b"\n"))))
    assert all(on_disk >= done for done, on_disk in lines) and len(lines) == 3


@pytest.mark.parametrize("left", [1, 5, 40])
def test_the_torn_line_of_a_killed_run_is_ignored_and_cut_off(endpoint, settings, left):
    asked = settings(parallel_requests=1)
    ask_endpoint(["a", "b"], asked)
    whole = asked.answers_file.read_bytes()
    first = whole.index(b"\n") + 1
    asked.answers_file.write_bytes(whole[: first + left])
    assert [answer.text for answer in ask_endpoint(["a", "b"], asked)] == ["answer to a", "answer to b"]
    assert endpoint.prompts == ["a", "b", "b"]
    assert asked.answers_file.read_bytes() == whole


def test_a_last_line_without_its_end_is_an_answer_and_stays_apart(endpoint, settings):
    asked = settings(parallel_requests=1)
    ask_endpoint(["a"], asked)
    asked.answers_file.write_bytes(asked.answers_file.read_bytes().rstrip(b"\n"))
    ask_endpoint(["a", "b"], asked)
    assert endpoint.prompts == ["a", "b"]
    assert len([json.loads(line) for line in asked.answers_file.read_bytes().splitlines()]) == 2


@pytest.mark.parametrize("content", ["user_id:token\n", '{"model": "SASRec"}', "epochs: 3"])
def test_another_file_is_neither_read_nor_touched(endpoint, settings, tmp_path, content):
    file = tmp_path / "something.else"
    file.write_text(content)
    with pytest.raises(UserError, match="line 1"):
        ask_endpoint(["a"], settings(answers_file=file))
    assert file.read_text() == content
    assert endpoint.requests == []


def test_a_file_that_cannot_be_written_is_told_before_anything_is_paid(endpoint, settings, tmp_path):
    (tmp_path / "plain").write_text("")
    for path in (tmp_path, tmp_path / "plain" / "answers.jsonl"):
        with pytest.raises(UserError, match="answers_file"):
            ask_endpoint(["a"], settings(answers_file=path))
    assert endpoint.requests == []


def test_answers_with_any_characters_survive_the_file(endpoint, settings):
    text = 'Amélie\u2028"2001"\n\ud800 \U0001f3ac'
    endpoint.reply = lambda prompt, nth: (200, {}, completion(text))
    first = ask_endpoint(["a"], settings())
    assert first == ask_endpoint(["a"], settings()) == [Answer(text)]
    assert len(endpoint.requests) == 1


def test_what_failed_is_asked_again_by_the_next_run(endpoint, settings):
    endpoint.reply = lambda prompt, nth: echo(prompt, nth) if prompt == "a" or nth > 3 else (500, {}, "")
    answers = ask_endpoint(["a", "b"], settings())
    assert how_many_incomplete(answers) == 1
    assert how_many_incomplete(ask_endpoint(["a", "b"], settings())) == 0
    assert collections.Counter(endpoint.prompts) == {"a": 1, "b": 4}


# --- what may pass is retried ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ({"Retry-After": "0.3"}, 0.3),
        ({"retry-after-ms": "250", "Retry-After": "60"}, 0.25),
        ({"Retry-After": "soon"}, 0.0),
    ],
)
def test_too_many_requests_waits_as_the_endpoint_says(endpoint, settings, header, wait):
    endpoint.reply = lambda prompt, nth: (
        (429, header, {"error": {"message": "slow"}}) if nth == 1 else echo(prompt, nth)
    )
    assert ask_endpoint(["a"], settings())[0].text == "answer to a"
    first, second = endpoint.times
    assert wait <= second - first < wait + 1


def test_a_date_in_retry_after_is_understood(endpoint, settings):
    def until(prompt, nth):
        return (
            (429, {"Retry-After": email.utils.formatdate(time.time() + 1.5, usegmt=True)}, "")
            if nth == 1
            else echo(prompt, nth)
        )

    endpoint.reply = until
    assert ask_endpoint(["a"], settings())[0].text == "answer to a"
    assert endpoint.times[1] - endpoint.times[0] > 0.4  # the date has whole seconds


def test_a_prompt_that_waits_keeps_its_place_among_the_open_requests(endpoint, settings):
    endpoint.reply = lambda prompt, nth: (
        (429, {"Retry-After": "0.1"}, "") if (prompt, nth) == ("a", 1) else echo(prompt, nth)
    )
    answers = ask_endpoint(["a", "b"], settings(parallel_requests=1))
    assert endpoint.prompts == ["a", "a", "b"] and how_many_incomplete(answers) == 0
    assert endpoint.times[2] - endpoint.times[0] >= 0.1


def test_an_endpoint_that_wants_hours_is_asked_no_more(endpoint, settings):
    endpoint.reply = lambda prompt, nth: (
        echo(prompt, nth) if prompt == "a" else (429, {"Retry-After": "7200"}, "daily limit")
    )
    answers = ask_endpoint(list("abcdef"), settings(parallel_requests=1))
    assert [answer.text is None for answer in answers] == [False] + [True] * 5
    assert endpoint.prompts == ["a", "b"]
    assert "daily limit" in answers[1].error
    assert answers[5].error.startswith("not asked: ") and "7200 seconds" in answers[5].error


def test_server_errors_until_the_retries_are_exhausted(endpoint, settings):
    endpoint.reply = lambda prompt, nth: (
        (500, {}, {"error": {"message": "out of memory"}}) if prompt == "b" else echo(prompt, nth)
    )
    answers = ask_endpoint(["a", "b", "c"], settings(retries=3))
    assert [answer.text for answer in answers] == ["answer to a", None, "answer to c"]
    assert answers[1].error == "HTTP 500: out of memory"
    assert endpoint.prompts.count("b") == 4


def test_waits_grow(endpoint, settings):
    endpoint.reply = lambda prompt, nth: (503, {}, "")
    ask_endpoint(["a"], settings(retries=4))
    waits = [after - before for before, after in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert len(waits) == 4 and waits[0] > 0.015 and waits[3] > 2 * waits[0]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("<html>gateway</html>", "the answer is not JSON: <html>gateway</html>"),
        ("", "the answer is not JSON: empty"),
        (b"\xff\xfe\x00", "the answer is not JSON"),
        ("[" * 100_000, "the answer is not JSON"),
        ("[1]", "the answer is no chat completion: [1]"),
        ({"choices": []}, "the answer is no chat completion"),
        ({"error": {"message": "upstream"}}, "upstream"),
        ({"choices": [None]}, "the answer is no chat completion"),
        ({"choices": [{"message": "hello"}]}, "the answer is no chat completion"),
        (completion(None), "the answer has no text (finish_reason stop)"),
        (completion("  \n"), "the answer has no text"),
        (completion(["a"]), "the answer has no text"),
    ],
)
def test_nonsense_is_retried_then_reported(endpoint, settings, body, sentence):
    endpoint.reply = lambda prompt, nth: (200, {}, body) if prompt == "b" else echo(prompt, nth)
    answers = ask_endpoint(["a", "b", "c"], settings(retries=1))
    assert [answer.text for answer in answers] == ["answer to a", None, "answer to c"]
    assert sentence in answers[1].error
    assert len(answers[1].error) < 300
    assert endpoint.prompts.count("b") == 2


def test_slow_answers_are_given_up_and_the_rest_goes_on(endpoint, settings):
    def slowly(prompt, nth):
        if prompt == "b":
            time.sleep(1.2)
        return echo(prompt, nth)

    endpoint.reply = slowly
    start = time.monotonic()
    answers = ask_endpoint(["a", "b", "c"], settings(retries=1, timeout=0.4))
    assert [answer.text for answer in answers] == ["answer to a", None, "answer to c"]
    assert answers[1].error == "no answer within 0.4 seconds"
    assert time.monotonic() - start < 1.15


def test_an_answer_that_trickles_in_has_the_same_deadline(settings):
    """Each byte comes in time, and the whole never."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(60):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=trickle, daemon=True).start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        (answer,) = ask_endpoint(["a"], settings(base_url=url, retries=0, timeout=0.5))
    assert answer == Answer(None, "no answer within 0.5 seconds")
    assert time.monotonic() - start < 1.5


# --- what does not pass is not retried ------------------------------------------------------------------------------


def test_a_bad_request_is_that_prompt_only(endpoint, settings):
    too_long = {"error": {"message": "maximum context length\nexceeded", "code": "context_length_exceeded"}}
    endpoint.reply = lambda prompt, nth: (400, {}, too_long) if prompt == "b" else echo(prompt, nth)
    answers = ask_endpoint(["b", "a"], settings())
    assert answers == [Answer(None, "HTTP 400: maximum context length exceeded"), Answer("answer to a")]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (completion(None, finish_reason="length"), "max_tokens were used up before any text"),
        (completion("", finish_reason="content_filter"), "the answer has no text (finish_reason content_filter)"),
        (completion(None, message={"content": None, "refusal": "I cannot"}), "the model refused: I cannot"),
    ],
)
def test_no_text_for_a_reason_is_not_paid_for_twice(endpoint, settings, body, sentence):
    endpoint.reply = lambda prompt, nth: (200, {}, body)
    assert ask_endpoint(["a"], settings()) == [Answer(None, sentence)]
    assert len(endpoint.requests) == 1


def test_a_prompt_that_cannot_be_sent_is_that_prompt_only(settings):
    answers = ask_endpoint(["half a pair \ud800", "a"], settings())
    assert answers[1] == Answer("answer to a")
    assert answers[0].text or "Unicode" in answers[0].error


@pytest.mark.parametrize(
    ("status", "names"),
    [(401, ["LOCAL_ENDPOINT_KEY", "HTTP 401"]), (404, ["base_url", "model", "gpt-local", "HTTP 404"])],
)
def test_a_refusal_of_the_first_answer_raises(endpoint, settings, status, names):
    endpoint.reply = lambda prompt, nth: (status, {}, {"error": {"message": "no"}})
    with pytest.raises(UserError) as error:
        ask_endpoint(list("abcdefgh"), settings(parallel_requests=1))
    assert all(name in str(error.value) for name in names)
    assert len(endpoint.requests) == 1


def test_no_key_where_one_is_wanted(endpoint, settings):
    endpoint.reply = lambda prompt, nth: (401, {}, "")
    with pytest.raises(UserError, match="api_key_variable"):
        ask_endpoint(["a"], settings(api_key_variable=None))


@pytest.mark.parametrize(
    ("status", "code"), [(401, "invalid_api_key"), (402, None), (429, "insufficient_quota")], ids=str
)
def test_a_key_or_credit_that_ends_midway_loses_nothing(endpoint, settings, status, code):
    refusal = {"error": {"message": "no more", "code": code}}
    endpoint.reply = lambda prompt, nth: echo(prompt, nth) if prompt in "ab" else (status, {}, refusal)
    answers = ask_endpoint(list("abcdef"), settings(parallel_requests=1))
    assert [answer.text for answer in answers] == ["answer to a", "answer to b", None, None, None, None]
    assert answers[2].error == f"HTTP {status}: no more"
    assert answers[3].error == f"not asked: HTTP {status}: no more"
    assert how_many_incomplete(answers) == 4
    assert set(endpoint.prompts) == {"a", "b", "c"}
    endpoint.reply = echo
    assert how_many_incomplete(ask_endpoint(list("abcdef"), settings())) == 0
    assert endpoint.prompts.count("a") == 1


# --- no connection --------------------------------------------------------------------------------------------------


def test_without_a_connection_the_run_stops_after_the_first_few(settings, caplog):
    start = time.monotonic()
    prompts = [str(number) for number in range(500)]
    asked = settings(base_url=f"http://127.0.0.1:{unused_port()}/v1", retries=1, parallel_requests=2, give_up_after=4)
    with caplog.at_level(logging.WARNING):
        answers = ask_endpoint(prompts, asked)
    assert how_many_incomplete(answers) == len(answers) == 500
    assert answers[0].error.startswith("no connection to http://127.0.0.1:")
    not_asked = [
        answer for answer in answers if answer.error.startswith("not asked: 4 prompts in a row: no connection")
    ]
    assert 490 <= len(not_asked) <= 496
    assert time.monotonic() - start < 5
    assert caplog.text.count("No more prompts are asked") == 1


def test_a_connection_now_and_then_goes_on(endpoint, settings, monkeypatch):
    """Dropped connections are counted in a row: one answer, and the count begins anew."""

    def drop_most(prompt, nth):
        if int(prompt) % 4:
            raise ConnectionAbortedError  # the server closes the connection without an answer
        return echo(prompt, nth)

    monkeypatch.setattr(endpoint.server, "handle_error", lambda *_: None)
    endpoint.reply = drop_most
    answers = ask_endpoint([str(number) for number in range(12)], settings(retries=0, parallel_requests=1, give_up_after=4))
    assert [answer.text is not None for answer in answers] == [number % 4 == 0 for number in range(12)]


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_promptly_and_keeps_what_is_finished(endpoint, settings, interruptible):
    def hang_on_c(prompt, nth):
        if prompt == "c":
            threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            time.sleep(4)
        return echo(prompt, nth)

    endpoint.reply = hang_on_c
    asked = settings(parallel_requests=1, timeout=30)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_endpoint(["a", "b", "c", "d"], asked)
    assert time.monotonic() - start < 3
    endpoint.reply = echo
    assert how_many_incomplete(ask_endpoint(["a", "b", "c", "d"], asked)) == 0
    assert endpoint.prompts == ["a", "b", "c", "c", "d"]


def test_ctrl_c_in_a_notebook_stops_promptly(endpoint, settings, interruptible):
    import asyncio

    def hang(prompt, nth):
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        time.sleep(4)
        return echo(prompt, nth)

    async def cell_of_a_notebook():
        return ask_endpoint(["a", "b"], settings(parallel_requests=1, timeout=30))

    endpoint.reply = hang
    start, loop = time.monotonic(), asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell_of_a_notebook())
    loop.close()
    assert time.monotonic() - start < 3 and endpoint.prompts == ["a"]


def test_an_exception_in_on_progress_ends_the_requests(endpoint, settings):
    def fail(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_endpoint([str(number) for number in range(50)], settings(parallel_requests=1), fail)
    assert len(endpoint.requests) < 50


# --- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_answer_file_log_or_message(endpoint, settings, caplog):
    """Even where the endpoint repeats it."""
    long = f"{'x' * 190} {SECRET}"
    endpoint.reply = lambda prompt, nth: {
        "a": (200, {}, completion(f"the key is {SECRET}")),
        "b": (400, {}, {"error": {"message": f"bad {SECRET}"}}),
        "c": (500, {}, long),
        "d": (200, {}, long),
    }[prompt]
    with caplog.at_level(logging.DEBUG):
        answers = ask_endpoint(["a", "b", "c", "d"], settings())
    assert [answer.text for answer in answers] == ["the key is [key]", None, None, None]
    assert answers[1].error == "HTTP 400: bad [key]"
    endpoint.reply = lambda prompt, nth: (401, {}, {"error": {"message": f"Incorrect API key: {SECRET}"}})
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as error:
        ask_endpoint(["e"], settings())
    told = "".join(traceback.format_exception(error.value)) + caplog.text + str(answers) + repr(settings())
    told += settings().answers_file.read_text()
    assert SECRET[:12] not in told


def test_a_missing_key_names_the_variable(endpoint, settings, monkeypatch):
    for value in ("", "  "):
        monkeypatch.setenv("LOCAL_ENDPOINT_KEY", value)
        with pytest.raises(UserError, match="LOCAL_ENDPOINT_KEY"):
            ask_endpoint(["a"], settings())
    assert endpoint.requests == []


def test_a_key_that_cannot_be_sent_is_not_repeated(endpoint, settings, monkeypatch):
    monkeypatch.setenv("LOCAL_ENDPOINT_KEY", "schlüssel\nzwei")
    with pytest.raises(UserError) as error:
        ask_endpoint(["a"], settings())
    assert "LOCAL_ENDPOINT_KEY" in str(error.value) and "schl" not in str(error.value)


def test_requests_are_not_logged_one_by_one(settings, caplog):
    with caplog.at_level(logging.INFO):
        ask_endpoint(["a", "b"], settings())
    assert caplog.records == []
    assert logging.getLogger("httpx").level == logging.getLogger("httpx2").level == logging.NOTSET


# --- before anything is asked (these need no openai) ----------------------------------------------------------------


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "recbole-llm\[endpoint\]"'):
        ask_endpoint(["a"], EndpointSettings("http://127.0.0.1:9/v1", "m", answers_file=tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "http://host:many/v1"},
        {"base_url": None},
        {"model": " "},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"timeout": 0},
        {"timeout": None},
        {"retries": -1},
        {"retries": 1.5},
        {"parallel_requests": 0},
        {"parallel_requests": True},
        {"give_up_after": 0},
    ],
)
def test_wrong_settings_are_named(wrong):
    values = {"base_url": "http://host/v1", "model": "m", **wrong}
    with pytest.raises(UserError, match=next(iter(wrong))):
        EndpointSettings(**values)


@pytest.mark.parametrize(
    "secret",
    [
        {"api_key_variable": "sk-abcdef0123456789"},
        {"api_key_variable": "gsk_abcdef0123456789"},
        {"api_key_variable": "abcdef0123456789"},
        {"base_url": "https://user:abcdef0123456789@host/v1"},
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_repeated(secret):
    values = {"base_url": "http://host/v1", "model": "m", **secret}
    with pytest.raises(UserError, match="api_key_variable") as error:
        EndpointSettings(**values)
    assert "abcdef" not in str(error.value)


# ---- The whole way: a model that asks, run by the command


def zero_shot(chain_data, url, **settings):
    """Run the command; return the model's metrics."""
    given = {
        "model": "ZeroShot",
        "dataset": "chain",
        "data_path": chain_data,
        "recommend_by": "generation",
        "backbone": "tiny",
        "use_gpu": False,
        "show_progress": False,
        "eval_args": "{mode: uni9}",
        "endpoint_url": url,
        "endpoint_model": "gpt-local",
        "endpoint_answers": "answers.jsonl",
        "endpoint_retries": 1,
        "results_file": "out.json",
        **settings,
    }
    assert cli.main(["run", *(f"--{key}={value}" for key, value in given.items())]) == 0
    (row,) = json.loads(Path("out.json").read_text())
    assert row["users"] == 60
    return row["metrics"]["test"]


def first_candidate(prompt):
    return completion(re.search('title candidates are "([^"]+)"', prompt)[1])


def test_a_run_ends_with_what_was_answered_and_the_next_asks_for_the_rest(endpoint, chain_data, capsys):
    def fate(prompt):
        kinds = ["slow"] + ["error", "nonsense", "busy", "no title"] * 2 + ["title"] * 3
        return kinds[zlib.crc32(prompt.encode()) % 12]

    def troubled(prompt, nth):
        kind = fate(prompt)
        if kind == "slow":
            time.sleep(1.5)
        if kind == "busy" and nth == 1:
            return 429, {"Retry-After": "0.05"}, ""
        said = {"error": "", "nonsense": "<html>Welcome!</html>", "no title": completion("I would rather not")}
        return (500 if kind == "error" else 200), {}, said.get(kind, first_candidate(prompt))

    endpoint.reply = troubled
    metrics = zero_shot(chain_data, endpoint.url, endpoint_timeout=1)
    kinds = collections.Counter(map(fate, set(endpoint.prompts)))
    unanswered = kinds["error"] + kinds["slow"] + kinds["nonsense"]
    assert len(kinds) == 6 and kinds.total() == 60
    assert metrics["incomplete"] == unanswered
    assert metrics["validratio"] == pytest.approx((kinds["busy"] + kinds["title"]) / (60 - unanswered))
    assert len(Path("answers.jsonl").read_text().splitlines()) == 60 - unanswered
    assert "incomplete" in capsys.readouterr().out
    hits = metrics["hit@1"]

    endpoint.requests.clear()
    endpoint.reply = lambda prompt, nth: (200, {}, first_candidate(prompt))
    metrics = zero_shot(chain_data, endpoint.url, endpoint_timeout=30)
    assert len(endpoint.prompts) == unanswered
    assert {fate(prompt) for prompt in endpoint.prompts} == {"error", "slow", "nonsense"}
    assert "incomplete" not in metrics and metrics["validratio"] == pytest.approx(1 - kinds["no title"] / 60)
    assert metrics["hit@1"] >= hits and len(Path("answers.jsonl").read_text().splitlines()) == 60

    endpoint.requests.clear()
    assert zero_shot(chain_data, endpoint.url) == metrics and not endpoint.requests


def test_a_run_without_any_answer_says_so(no_proxy, chain_data):
    pytest.importorskip("openai")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        assert zero_shot(chain_data, url, endpoint_retries=0) == {"hit@1": 0.0, "incomplete": 60.0}
