"""Asking an LLM behind an OpenAI-compatible chat endpoint, for models that are only ever prompted.

A run over a test split is thousands of requests, hours and money, so that what matters here is what is left of it
where something goes wrong:

* every answer is on disk before the next one is waited for, under the hash of what was asked: a run that was killed
  asks only what is missing, and a finished one is repeated without a request, a key or the ``openai`` package;
* a prompt without an answer is an :class:`Answer` with the reason, and the run goes on; where going on is in vain (no
  connection, no credit, a key that was revoked) the remaining prompts are marked as not asked;
* the key is read from an environment variable when it is needed. No setting, file, log or message holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from recbole_llm.errors import UserError

__all__ = ["Answer", "EndpointSettings", "ask", "how_many_incomplete"]

logger = logging.getLogger(__name__)

Request = Mapping[str, Any]  # the body of a chat-completions request

# A run that is interrupted waits this long (seconds) for its open connections to be closed, then leaves them.
_FAREWELL = 5.0

# How often (seconds) the waiting thread looks up: some platforms deliver Ctrl-C only then.
_LOOK_UP = 0.2

# Shorter keys are the placeholders that local servers want ("EMPTY"): no secrets, and words that an answer may hold.
_SHORTEST_SECRET = 8

_RECORD_START = b'{"key": "'


@dataclass(frozen=True)
class EndpointSettings:
    """What is asked, and with how much patience.

    Attributes:
        base_url: the endpoint without ``/chat/completions``, such as ``https://api.openai.com/v1``.
        model: its name at the endpoint.
        api_key_variable: name of the environment variable with the key, such as ``OPENAI_API_KEY``. None: the endpoint
            wants no key, as most local servers. Never the key itself.
        temperature: 0 for the likeliest answer. None: not sent, for models that refuse any.
        max_tokens: longest answer, in tokens. None: not sent, the endpoint's own limit.
        timeout: seconds that one request may take from start to end. An answer that comes later is lost, and may be
            paid for.
        retries: how often a request is repeated after an error that may pass, 0 or more.
        parallel_requests: how many requests are open at the same time. Affects only the speed.
        answers_file: JSON lines, one per answer, read at the start and appended to. One run at a time may use it.
            None: answers are not kept.
        backoff: seconds before the first retry, at most; doubled with every further one.
        longest_wait: seconds; no retry waits longer. An endpoint that asks for more (``Retry-After``) is asked no more.
        give_up_after: so many prompts in a row without a connection, each after its retries, end the run.

    Raises:
        UserError: a value is out of its range, ``base_url`` is no URL or holds a password, or ``api_key_variable`` does
            not look like the name of a variable.
    """

    base_url: str
    model: str
    api_key_variable: str | None = None
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    timeout: float = 60.0
    retries: int = 5
    parallel_requests: int = 8
    answers_file: str | os.PathLike | None = None
    backoff: float = 1.0
    longest_wait: float = 300.0
    give_up_after: int = 5

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        if not isinstance(self.model, str) or not self.model.strip():
            raise UserError("model must be the name of a model at the endpoint")
        # Capitals only: most keys (sk-..., gsk_..., hf_..., hexadecimal) then fail here, before a message repeats them.
        variable = self.api_key_variable
        if variable is not None and not (isinstance(variable, str) and re.fullmatch("[A-Z_][A-Z0-9_]{0,63}", variable)):
            raise UserError(
                "api_key_variable must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "not the key itself"
            )
        for name, least, whole in (
            ("temperature", 0, False),
            ("max_tokens", 1, True),
            ("timeout", None, False),
            ("retries", 0, True),
            ("parallel_requests", 1, True),
            ("backoff", 0, False),
            ("longest_wait", 0, False),
            ("give_up_after", 1, True),
        ):
            value = getattr(self, name)
            if value is None and name in ("temperature", "max_tokens"):
                continue
            kinds = int if whole else (int, float)
            is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (value <= 0 if least is None else value < least):
                what = "a whole number" if whole else "a number"
                bound = "above 0" if least is None else f"of at least {least}"
                raise UserError(f"{name} must be {what} {bound}, not {value!r}")


@dataclass(frozen=True)
class Answer:
    """What came of one prompt: either a text, or one sentence on why there is none."""

    text: str | None
    error: str | None = None


def how_many_incomplete(answers: Sequence[Answer]) -> int:
    """Count the prompts that got no answer; to ask again with the same ``answers_file`` asks only these."""
    return sum(answer.text is None for answer in answers)


def ask(
    prompts: Sequence[str],
    settings: EndpointSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Ask every prompt as the only message of a chat, and return the answers in the order of the prompts.

    Answers that ``settings.answers_file`` holds for the same model, parameters and prompt are taken from there,
    whichever endpoint gave them. A prompt that appears twice is asked once. Errors that may pass (no connection, a
    timeout, HTTP 408, 409, 429 and 5xx, an answer without text) are retried after an exponentially growing, randomised
    wait, or when the endpoint says; nothing that failed is written to the file.

    Ctrl-C ends the open requests and raises KeyboardInterrupt; the answers so far are in the file.

    Args:
        prompts: texts; an empty sequence asks nothing.
        settings: see there.
        on_progress: called in this thread with the number of prompts that are done (answered or failed) and of all
            prompts, after each one and once for those in the file.

    Returns:
        ``len(prompts)`` answers.

    Raises:
        UserError: the ``openai`` package or the key is missing, the endpoint refuses the key or knows no such model or
            address (HTTP 401 or 404 before any answer in this run), or ``answers_file`` cannot be read or written.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of texts: a single one would be asked letter by letter")
    requests: dict[str, Request] = {}
    keys = []
    for prompt in prompts:
        request = _request(prompt, settings)
        key = _key(request)
        requests[key] = request
        keys.append(key)

    file = _AnswersFile(settings.answers_file)
    texts = file.read()
    answers = {key: Answer(texts[key]) for key in requests if key in texts}
    missing = {key: request for key, request in requests.items() if key not in answers}

    copies = Counter(keys)
    done = sum(copies[key] for key in answers)
    if done and on_progress:
        on_progress(done, len(keys))
    reason = ""
    if missing:
        api_key = _read_key(settings)
        openai = _import_openai()
        with file, _quiet_requests(), _Run(openai, settings, api_key, missing, file) as run:
            for key, answer in run.results():
                answers[key] = answer
                done += copies[key]
                if on_progress:
                    on_progress(done, len(keys))
        reason = run.stop_reason
    not_asked = Answer(None, f"not asked: {reason}")
    return [answers.get(key, not_asked) for key in keys]


# ---------------------------------------------------------------------------------------------------------------------
# Before the first request
# ---------------------------------------------------------------------------------------------------------------------


def _check_url(url: str) -> None:
    example = "such as https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # .port may raise
    except (ValueError, AttributeError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"base_url must be the address of a chat endpoint, {example}")
    if parts.username or parts.password:
        raise UserError("base_url must not hold a password: put the key in an environment variable (api_key_variable)")


def _request(prompt: str, settings: EndpointSettings) -> dict[str, Any]:
    request: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": prompt}]}
    if settings.temperature is not None:
        request["temperature"] = float(settings.temperature)  # 0 and 0.0 are the same question
    if settings.max_tokens is not None:
        request["max_tokens"] = settings.max_tokens
    return request


def _key(request: Request) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _import_openai() -> ModuleType:
    try:
        import openai
    except ImportError:
        raise UserError("Asking an endpoint needs the openai package: pip install recbole-llm[endpoint]") from None
    return openai


def _read_key(settings: EndpointSettings) -> str | None:
    variable = settings.api_key_variable
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"The environment variable {variable} (api_key_variable) is not set: it must hold the key")
    # Other characters cannot be sent, and the HTTP client's error would repeat them.
    if not re.fullmatch("[!-~]+", key):
        raise UserError(f"The environment variable {variable} (api_key_variable) holds characters that no key has")
    return key


@contextlib.contextmanager
def _quiet_requests() -> Iterator[None]:
    """Keep the HTTP client from logging a line per request at level INFO, unless its logger was set up on purpose."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    loggers = [other for other in loggers if other.level == logging.NOTSET]
    for other in loggers:
        other.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for other in loggers:
            other.setLevel(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------------------------
# The file of answers
# ---------------------------------------------------------------------------------------------------------------------


class _AnswersFile:
    """JSON lines ``{"key": sha256 of the request, "model": its name, "text": the answer}``; open while a context."""

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self._whole = 0  # bytes, up to the end of the last whole record
        self._ends_line = True
        self._file: BinaryIO | None = None

    def read(self) -> dict[str, str]:
        """Return key -> text; of several records with the same key the last.

        Raises:
            UserError: the file cannot be read, or holds something that is no answer.
        """
        texts: dict[str, str] = {}
        if self.path is None:
            return texts
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    ends = line.endswith(b"\n")
                    record = _parse_record(line)
                    if record is not None:
                        texts[record["key"]] = record["text"]
                    elif line.strip():
                        # Only what a killed run can have left is passed over, and later cut off: the start of a record.
                        if not ends and (line.startswith(_RECORD_START) or _RECORD_START.startswith(line)):
                            break
                        raise UserError(
                            f"{self.path}, line {number}: not an answer; delete the line, or name another answers_file"
                        )
                    self._whole += len(line)
                    self._ends_line = ends
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"answers_file {self.path} cannot be read: {error.strerror}") from None
        return texts

    def __enter__(self) -> _AnswersFile:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab")
                if self._file.tell() > self._whole:
                    self._file.truncate(self._whole)
                if not self._ends_line:
                    self._file.write(b"\n")
            except OSError as error:
                raise self._cannot_write(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, model: str, text: str) -> None:
        if self._file is None:
            return
        # ASCII only: half a surrogate pair in an answer has no UTF-8.
        line = json.dumps({"key": key, "model": model, "text": text}) + "\n"
        try:
            self._file.write(line.encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"answers_file {self.path} cannot be written: {error.strerror}; name another file")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("text"), str):
        return record
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The requests
# ---------------------------------------------------------------------------------------------------------------------


class _Failure(Exception):
    """One request without an answer.

    Attributes:
        sentence: why.
        retry: whether the same request may succeed later.
        retry_after: seconds, where the endpoint says when.
        status: of HTTP, where there was an answer.
        unreachable: there was no connection.
        ends_run: no other prompt would fare better.
    """

    def __init__(
        self,
        sentence: str,
        *,
        retry: bool,
        retry_after: float | None = None,
        status: int | None = None,
        unreachable: bool = False,
        ends_run: bool = False,
    ):
        super().__init__(sentence)
        self.sentence = sentence
        self.retry = retry
        self.retry_after = retry_after
        self.status = status
        self.unreachable = unreachable
        self.ends_run = ends_run


class _Run:
    """The requests of one call of :func:`ask`, on an event loop in a thread of its own; none outlives the context.

    An event loop, because only there a request can be given up at any moment: at its deadline however slowly the answer
    trickles in, or by Ctrl-C. A thread, because the caller may have a running loop already (a notebook has), and
    because Ctrl-C then hits the caller's thread alone and cannot tear a line of the file.
    """

    def __init__(
        self,
        openai: ModuleType,
        settings: EndpointSettings,
        api_key: str | None,
        requests: Mapping[str, Request],
        file: _AnswersFile,
    ):
        self.stop_reason = ""
        self._openai = openai
        self._settings = settings
        self._api_key = api_key
        self._requests = requests
        self._file = file
        self._finished: queue.SimpleQueue[tuple[str, Answer] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = asyncio.Event()
        self._answered = False
        self._unreachable = 0  # prompts in a row
        self._not_before = 0.0  # on the loop's clock: the endpoint wants no request earlier
        self._random = random.Random()  # its own: the global one belongs to the seeded experiment

    def __enter__(self) -> _Run:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._ask_all())
        self._thread = threading.Thread(target=self._work, name="endpoint", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Here and not in a `finally` of results(): Python 3.11 can raise Ctrl-C at the head of a loop that opens a
        # `try` block outside of that block.
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing to cancel
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_FAREWELL)

    def results(self) -> Iterator[tuple[str, Answer]]:
        """Yield (key, answer) as they come; those of requests that were not made because the run ended are missing.

        Raises:
            UserError: see :func:`ask`.
        """
        while True:
            try:
                result = self._finished.get(timeout=_LOOK_UP)
            except queue.Empty:
                continue
            if result is None:
                break
            yield result
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # for the caller's thread to raise
            self._error = error
        finally:
            self._loop.close()
            self._finished.put(None)

    async def _ask_all(self) -> None:
        settings = self._settings
        client = self._openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._api_key or "none",  # the client insists on one
            # The deadline of the whole request is ours. A connection that takes half of it never comes.
            timeout=self._openai.Timeout(None, connect=min(10.0, settings.timeout / 2)),
            max_retries=0,
        )
        async with client:
            # The unparsed response: what the client makes of nonsense differs between its versions.
            create = client.chat.completions.with_raw_response.create
            waiting = iter(self._requests.items())
            workers = [
                asyncio.ensure_future(self._ask_some(create, waiting))
                for _ in range(min(settings.parallel_requests, len(self._requests)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask_some(self, create: Callable[..., Any], waiting: Iterator[tuple[str, Request]]) -> None:
        """Take one request after the other from ``waiting``, which all workers share."""
        for key, request in waiting:
            answer = await self._ask_one(create, request)
            if answer is None:
                return
            if answer.text is not None:
                self._file.add(key, self._settings.model, answer.text)
            self._finished.put((key, answer))

    async def _ask_one(self, create: Callable[..., Any], request: Request) -> Answer | None:
        """Make a request and its retries. None: the run ended before the first try."""
        failure = None
        tries = 0
        while tries <= self._settings.retries and (failure is None or failure.retry):
            if failure is not None:
                await self._pause(self._wait_after(tries, failure))
            await self._wait_for_endpoint()
            if self._stopped.is_set():
                break
            tries += 1
            try:
                text = await self._try(create, request)
            except _Failure as error:
                failure = error
            else:
                self._answered, self._unreachable = True, 0
                return Answer(text)
            if not failure.unreachable:
                self._unreachable = 0
            self._consider_stopping(failure)
        if failure is None:
            return None
        if failure.unreachable:
            self._unreachable += 1
            if self._unreachable >= self._settings.give_up_after:
                self._stop(f"{self._unreachable} prompts in a row: {failure.sentence}")
        return Answer(None, f"{failure.sentence} ({tries} tries)" if tries > 1 else failure.sentence)

    def _consider_stopping(self, failure: _Failure) -> None:
        if failure.status in (401, 404) and not self._answered:
            self._error = self._error or UserError(self._remedy(failure))
            self._stop(failure.sentence)
        elif failure.ends_run:
            self._stop(failure.sentence)
        elif failure.retry_after is not None and failure.retry_after > self._settings.longest_wait:
            self._stop(f"the endpoint wants no request for {failure.retry_after:.0f} seconds ({failure.sentence})")
        elif failure.retry_after is not None:
            # The endpoint's limits count all requests, so all of them wait.
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + failure.retry_after)

    def _stop(self, reason: str) -> None:
        """Begin no further request. Those that are open go on: they may be answered, and are paid for."""
        if not self._stopped.is_set():
            self.stop_reason = reason
            self._stopped.set()
            if self._error is None:
                logger.warning("No more prompts are asked: %s", reason)

    def _remedy(self, failure: _Failure) -> str:
        settings = self._settings
        if failure.status == 404:
            return (
                f"{self._address}/chat/completions has no model {settings.model!r} or does not exist "
                f"({failure.sentence}): set base_url and model"
            )
        if settings.api_key_variable is None:
            return (
                f"{self._address} wants a key ({failure.sentence}): name the environment variable that holds it in "
                "api_key_variable"
            )
        return (
            f"{self._address} refuses the key in the environment variable {settings.api_key_variable} "
            f"({failure.sentence}): set it to a valid key"
        )

    @property
    def _address(self) -> str:
        parts = urlsplit(self._settings.base_url)
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"

    # --- waiting ---

    def _wait_after(self, tries: int, failure: _Failure) -> float:
        if failure.retry_after is not None:
            return failure.retry_after * self._random.uniform(1.0, 1.1)  # never before, and not all at once
        longest = min(self._settings.backoff * 2.0 ** min(tries - 1, 64), self._settings.longest_wait)
        return longest * self._random.uniform(0.5, 1.0)

    async def _wait_for_endpoint(self) -> None:
        # Anew after each pause: meanwhile another request may have been told to wait longer.
        clock = asyncio.get_running_loop()
        while not self._stopped.is_set() and (seconds := self._not_before - clock.time()) > 0:
            await self._pause(seconds)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than the run lasts."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    # --- one request ---

    async def _try(self, create: Callable[..., Any], request: Request) -> str:
        openai, timeout = self._openai, self._settings.timeout
        try:
            async with asyncio.timeout(timeout):
                response = await create(**request)
                body = response.http_response.text
        except openai.APIStatusError as error:
            raise self._failure_of_status(error) from None
        except (TimeoutError, openai.APITimeoutError) as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                raise _Failure(f"no connection to {self._address} in time", retry=True, unreachable=True) from None
            raise _Failure(f"no answer within {timeout:g} seconds", retry=True) from None
        except openai.APIConnectionError as error:
            cause = self._short(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise _Failure(f"no connection to {self._address}: {cause}", retry=True, unreachable=True) from None
        except Exception as error:  # whatever the client cannot send or read: this prompt's loss, not the run's
            raise _Failure(f"{type(error).__name__}: {self._short(str(error))}", retry=False) from None
        return self._text_of(self._without_key(body))

    def _failure_of_status(self, error: Any) -> _Failure:
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        if isinstance(body.get("error"), dict):
            body = body["error"]
        message = body.get("message")
        if not isinstance(message, str):
            message = error.response.text
        # Both are refusals that no waiting mends, though the first comes as "too many requests".
        no_credit = body.get("code") == "insufficient_quota" or status == 402
        return _Failure(
            f"HTTP {status}: {self._short(message) or 'no message'}",
            retry=(status in (408, 409, 429) or status >= 500) and not no_credit,
            retry_after=_retry_after(error.response.headers) if status in (429, 503) and not no_credit else None,
            status=status,
            ends_run=no_credit or status == 401,
        )

    def _text_of(self, body: str) -> str:
        """Return the text of a chat completion.

        Raises:
            _Failure: there is none.
        """
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            raise _Failure(f"the answer is not JSON: {self._short(body) or 'empty'}", retry=True) from None
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise _Failure(f"the answer is no chat completion: {self._short(body)}", retry=True)
        content, ending = message.get("content"), choice.get("finish_reason")
        if isinstance(content, str) and content.strip():
            return content
        if isinstance(message.get("refusal"), str):
            raise _Failure(f"the model refused: {self._short(message['refusal'])}", retry=False)
        if ending == "length":
            # As models do that spend their tokens on reasoning first. The next try would, too, and is paid for.
            raise _Failure("max_tokens were used up before any text", retry=False)
        raise _Failure(f"the answer has no text (finish_reason {ending})", retry=ending != "content_filter")

    def _without_key(self, text: str) -> str:
        key = self._api_key
        return text.replace(key, "[key]") if key and len(key) >= _SHORTEST_SECRET else text

    def _short(self, text: str, length: int = 200) -> str:
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= length else text[: length - 3] + "..."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that ``Retry-After`` asks for: a number, a date, or milliseconds in OpenAI's own header."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
