"""Prompts answered by an LLM behind an OpenAI-compatible chat endpoint.

The ``openai`` client retries, waits and times out. What is added here is what a run over a whole test split needs:

* Each answer is on disk as soon as it arrives, under the hash of its request: a run that was killed asks only for what is
  missing, and a finished one is repeated without a request, a key or the ``openai`` package.
* A prompt without an answer is an :class:`Answer` with the reason, and the run goes on; where no further prompt can be
  answered (no connection, no credit, a revoked key), the remaining ones are marked as not asked.
* The key is read from an environment variable when it is needed. No setting, file, log or message holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from recbole_llm.backbone.answers_file import AnswersFile
from recbole_llm.errors import UserError

__all__ = ["Answer", "EndpointSettings", "ask_endpoint"]

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 120.0  # seconds; an endpoint whose Retry-After is longer gets no further request (nor does the client wait)
_PAUSE = 0.5  # seconds before a prompt whose answer is not a chat completion is sent again
_SHORTEST_SECRET = 8  # shorter keys are placeholders for local servers ("EMPTY"), and words that an answer may contain

# Least value, whether the bound itself is allowed, and whether the number must be whole.
_NUMBERS = {
    "temperature": (0, True, False),
    "max_tokens": (1, True, True),
    "timeout": (0, False, False),
    "retries": (0, True, True),
    "parallel_requests": (1, True, True),
    "give_up_after": (1, True, True),
}


@dataclass(frozen=True)
class EndpointSettings:
    """Which endpoint is asked, and how.

    Attributes:
        base_url: the endpoint without ``/chat/completions``, such as ``https://api.openai.com/v1``.
        model: its name at the endpoint.
        api_key_variable: name of the environment variable with the key, such as ``OPENAI_API_KEY``; never the key itself.
            None: the endpoint needs no key, as most local servers.
        temperature: 0 for the most likely answer. None: not sent, for models that refuse any.
        max_tokens: longest answer, in tokens. None: not sent, the endpoint's own limit.
        timeout: seconds that one try of a request may take. A later answer is lost, and may be paid for.
        retries: how often a request is repeated after an error that may pass, 0 or more.
        parallel_requests: how many requests are open at the same time. Affects only the speed.
        answers_file: JSON lines, one per answer, read at the start and appended to. One run at a time may use it.
            None: answers are not stored.
        give_up_after: the run ends after this many prompts in a row without a connection.

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
    give_up_after: int = 5

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        if not isinstance(self.model, str) or not self.model.strip():
            raise UserError("model must be the name of a model at the endpoint")
        # Capitals only: most keys (sk-..., gsk_..., hexadecimal) fail here, before a message can repeat them.
        variable = self.api_key_variable
        if variable is not None and not (isinstance(variable, str) and re.fullmatch("[A-Z_][A-Z0-9_]{0,63}", variable)):
            raise UserError(
                "api_key_variable must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "not the key itself"
            )
        for name, (least, inclusive, whole) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("temperature", "max_tokens"):
                continue
            is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < least or (value == least and not inclusive):
                kind, bound = "a whole number" if whole else "a number", "of at least" if inclusive else "above"
                raise UserError(f"{name} must be {kind} {bound} {least}, not {value!r}")


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt: a text, or one sentence that says why there is none."""

    text: str | None
    error: str | None = None


def ask_endpoint(
    prompts: Sequence[str],
    settings: EndpointSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Send every prompt as the only message of a chat, and return the answers in the order of the prompts.

    Answers that ``settings.answers_file`` holds for the same model, parameters and prompt are taken from there,
    whichever endpoint gave them. A prompt that appears twice is sent once. Errors that may pass (no connection, a
    timeout, HTTP 408, 409, 429 and 5xx, an answer without text) are retried; failures are not written to the file.

    Ctrl-C ends the open requests and raises KeyboardInterrupt; the answers so far are in the file.

    Args:
        prompts: texts.
        settings: see there.
        on_progress: called with the number of prompts that are done (answered or failed) and of all prompts, after each
            answer and once for those in the file.

    Returns:
        ``len(prompts)`` answers.

    Raises:
        UserError: the ``openai`` package or the key is missing, the endpoint refuses the key or knows no such model or
            address (HTTP 401 or 404 before any answer in this run), or ``answers_file`` cannot be read or written.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of texts, not a single text")
    requests = [_request(prompt, settings) for prompt in prompts]
    keys = [hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest() for request in requests]
    file = AnswersFile(settings.answers_file)
    texts, copies = file.read(), Counter(keys)
    answers = {key: Answer(texts[key]) for key in keys if key in texts}
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in answers}

    done = sum(copies[key] for key in answers)
    if done and on_progress:
        on_progress(done, len(keys))

    def store(key: str, answer: Answer) -> None:
        nonlocal done
        if answer.text is not None:
            file.add(key, settings.model, answer.text)
        answers[key] = answer
        done += copies[key]
        if on_progress:
            on_progress(done, len(keys))

    reason = ""
    if missing:
        run = _Run(_read_key(settings), _import_openai(), settings)
        with file, _quiet_loggers():
            run.run(missing, store)
        reason = run.stop_reason
    return [answers.get(key, Answer(None, f"not asked: {reason}")) for key in keys]


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # .port may raise
    except (ValueError, AttributeError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            "base_url must be the address of a chat endpoint, such as https://api.openai.com/v1 or http://localhost:8000/v1"
        )
    if parts.username or parts.password:
        raise UserError("base_url must not hold a password: put the key in an environment variable (api_key_variable)")


def _request(prompt: str, settings: EndpointSettings) -> dict[str, Any]:
    request: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": prompt}]}
    if settings.temperature is not None:
        request["temperature"] = float(settings.temperature)  # 0 and 0.0 are the same request
    if settings.max_tokens is not None:
        request["max_tokens"] = settings.max_tokens
    return request


def _import_openai() -> ModuleType:
    try:
        import openai  # lazily: an optional extra
    except ImportError:
        raise UserError('An endpoint needs the openai package: pip install "recbole-llm[endpoint]"') from None
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
def _quiet_loggers() -> Iterator[None]:
    """Hide the client's line per request or retry at level INFO, unless its logger has a level of its own."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2", "openai")]
    loggers = [other for other in loggers if other.level == logging.NOTSET]
    for other in loggers:
        other.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for other in loggers:
            other.setLevel(logging.NOTSET)


@dataclass
class _Failure(Exception):
    """A request without an answer.

    Attributes:
        sentence: why.
        status: of HTTP, where there was an answer.
        unreachable: there was no connection.
        ends_run: no other prompt would be answered.
        send_again: the client took the response for a success and did not retry.
    """

    sentence: str
    status: int | None = None
    unreachable: bool = False
    ends_run: bool = False
    send_again: bool = False


class _Run:
    """The requests of one call of :func:`ask_endpoint`; none outlives :meth:`run`.

    Attributes:
        stop_reason: why no further prompt is sent; empty while prompts are sent.
    """

    def __init__(self, api_key: str | None, openai: ModuleType, settings: EndpointSettings) -> None:
        self.stop_reason = ""
        self._api_key, self._openai, self._settings = api_key, openai, settings
        self._answered = False
        self._unreachable = 0  # prompts in a row
        self._cancel: Callable[[], Any] = lambda: None
        parts = urlsplit(settings.base_url)
        self._address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"

    def run(self, requests: Mapping[str, Mapping[str, Any]], store: Callable[[str, Answer], None]) -> None:
        """Send all requests, and give each answer to ``store`` as it comes."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._send_all(requests, store))
            return
        # A notebook has a running loop, and a loop cannot run inside another: use a thread.
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(asyncio.run, self._send_all(requests, store))
            try:
                future.result()
            except BaseException:  # Ctrl-C hits this thread alone
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._cancel()
                raise

    async def _send_all(self, requests: Mapping[str, Mapping[str, Any]], store: Callable[[str, Answer], None]) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        settings, slots = self._settings, asyncio.Semaphore(self._settings.parallel_requests)
        async with self._openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._api_key or "none",  # the client requires one
            timeout=self._openai.Timeout(settings.timeout, connect=min(10.0, settings.timeout / 2)),
            max_retries=settings.retries,
        ) as client:

            async def send(key: str, request: Mapping[str, Any]) -> tuple[str, Answer | None]:
                async with slots:
                    return key, await self._answer(client, request)

            tasks = [asyncio.ensure_future(send(key, request)) for key, request in requests.items()]
            try:
                for finished in asyncio.as_completed(tasks):
                    key, answer = await finished
                    if answer is not None:
                        store(key, answer)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, client: Any, request: Mapping[str, Any]) -> Answer | None:
        """Send one request; None: the run had ended before.

        Raises:
            UserError: HTTP 401 or 404 before any answer.
        """
        failure = None
        for _ in range(self._settings.retries + 1):
            if self.stop_reason:
                break
            if failure is not None:
                await asyncio.sleep(_PAUSE)
            try:
                text = self._text_of(await self._response(client, request))
            except _Failure as error:
                failure = error
                if not failure.send_again:
                    break
            else:
                self._answered, self._unreachable = True, 0
                return Answer(text)
        if failure is None:
            return None
        if failure.status in (401, 404) and not self._answered:
            self.stop_reason = failure.sentence
            raise UserError(self._remedy(failure))
        self._unreachable = self._unreachable + 1 if failure.unreachable else 0
        if failure.ends_run:
            self._stop(failure.sentence)
        elif self._unreachable >= self._settings.give_up_after:
            self._stop(f"{self._unreachable} prompts in a row: {failure.sentence}")
        return Answer(None, failure.sentence)

    def _stop(self, reason: str) -> None:
        """Send no further prompt. Open requests go on: they may be answered, and are paid for."""
        if not self.stop_reason:
            self.stop_reason = reason
            logger.warning("No more prompts are asked: %s", reason)

    async def _response(self, client: Any, request: Mapping[str, Any]) -> str:
        """The body of a successful response, with the client's retries."""
        openai, settings = self._openai, self._settings
        # The client's timeout starts anew with each byte: this limit ends a response that never gets complete.
        limit = settings.timeout * (settings.retries + 1) + _LONGEST_WAIT * settings.retries
        try:
            async with asyncio.timeout(limit):
                # The unparsed response: what the client makes of malformed ones differs between its versions.
                response = await client.chat.completions.with_raw_response.create(**request)
                return self._without_key(response.http_response.text)
        except openai.APIStatusError as error:
            raise self._failure_of_status(error) from None
        except (TimeoutError, openai.APITimeoutError) as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                raise _Failure(f"no connection to {self._address} in time", unreachable=True) from None
            raise _Failure(f"no answer within {settings.timeout:g} seconds") from None
        except openai.APIConnectionError as error:
            cause = self._short(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise _Failure(f"no connection to {self._address}: {cause}", unreachable=True) from None
        except Exception as error:  # what the client cannot send or read: this prompt fails, the run goes on
            raise _Failure(f"{type(error).__name__}: {self._short(str(error))}") from None

    def _failure_of_status(self, error: Any) -> _Failure:
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        body = body["error"] if isinstance(body.get("error"), dict) else body
        message = body.get("message") if isinstance(body.get("message"), str) else error.response.text
        sentence = f"HTTP {status}: {self._short(message) or 'no message'}"
        with contextlib.suppress(ValueError):  # a date
            seconds = float(error.response.headers.get("retry-after", 0))
            if status in (429, 503) and seconds > _LONGEST_WAIT:
                return _Failure(f"{sentence} (the endpoint wants no request for {seconds:.0f} seconds)", status, ends_run=True)
        no_credit = status == 402 or body.get("code") == "insufficient_quota"
        return _Failure(sentence, status, ends_run=no_credit or status == 401)

    def _text_of(self, body: str) -> str:
        """The text of a chat completion."""
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            raise _Failure(f"the answer is not JSON: {self._short(body) or 'empty'}", send_again=True) from None
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise _Failure(f"the answer is no chat completion: {self._short(body)}", send_again=True)
        content, ending = message.get("content"), choice.get("finish_reason")
        if isinstance(content, str) and content.strip():
            return content
        if isinstance(message.get("refusal"), str):
            raise _Failure(f"the model refused: {self._short(message['refusal'])}")
        if ending == "length":  # as with models that spend their tokens on reasoning; sent again, it would be paid again
            raise _Failure("max_tokens were used up before any text")
        raise _Failure(f"the answer has no text (finish_reason {ending})", send_again=ending != "content_filter")

    def _remedy(self, failure: _Failure) -> str:
        settings, said = self._settings, failure.sentence
        if failure.status == 404:
            where = f"{self._address}/chat/completions"
            return f"{where} has no model {settings.model!r} or does not exist ({said}): set base_url and model"
        variable = settings.api_key_variable
        if variable is None:
            return f"{self._address} needs a key ({said}): name its environment variable in api_key_variable"
        return f"{self._address} refuses the key in the environment variable {variable} ({said}): set it to a valid key"

    def _without_key(self, text: str) -> str:
        key = self._api_key
        return text.replace(key, "[key]") if key and len(key) >= _SHORTEST_SECRET else text

    def _short(self, text: str, length: int = 200) -> str:
        text = " ".join(self._without_key(text).split())
        return text if len(text) <= length else text[: length - 3] + "..."
