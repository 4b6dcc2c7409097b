"""The HTTP interface: ``/recommend``, ``/items``, ``/health``, and a page to try them. ``docs/serving.md`` describes it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from logging import getLogger
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recbole_llm._version import __version__
from recbole_llm.errors import UserError, printable
from recbole_llm.serving.batching import Batcher, BusyError
from recbole_llm.serving.limits import Limits
from recbole_llm.serving.service import Answer, Service, UnknownUserError
from recbole_llm.serving.service import Query as Question

_MOST_COMPLETIONS = 50
_LONGEST_TEXT = 1000  # of a title or id
_PAGES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
_HEADERS = {
    # Nothing from elsewhere, and no script or style but the page's own files.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

Name = Annotated[StrictStr, Field(max_length=_LONGEST_TEXT)] | StrictInt


class Asked(BaseModel):
    """The body of a question."""

    model_config = ConfigDict(extra="forbid")

    user: Name | None = Field(None, description="id of a user of the data set")
    history: list[Name] | None = Field(None, description="titles or ids of items, oldest first")
    topk: StrictInt = Field(10, ge=1, description="the most items of the answer")
    exclude_history: StrictBool = Field(True, description="whether items of the history are left out")


class Item(BaseModel):
    """An item of the data set."""

    item: str
    title: str


class Because(Item):
    """An item of the history that is near a recommended one."""

    similarity: float = Field(description="cosine of the two items' vectors")


class Recommended(Item):
    """A recommended item."""

    score: float = Field(description="what it is ranked by; to be compared within one answer only")
    because: list[Because] = Field(description="the nearest items of the history, nearest first")


class Recommendations(BaseModel):
    """The answer to a question."""

    items: list[Recommended]
    history: list[Item] = Field(description="what was read, oldest first; of a long history the latest")


class Health(BaseModel):
    """What a server is."""

    status: str
    model: str
    dataset: str
    items: int
    users: bool = Field(description="whether users may be asked for by id")
    search: str
    waiting: int = Field(description="questions in the queue")
    version: str


def make_app(service: Service, limits: Limits | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application around a service.

    Args:
        service: what answers.
        limits: None: the usual ones.
        hosts: names under which the server may be addressed; ``*``: any.
    """
    limits = limits or Limits()
    batcher: Batcher[Question, Answer] = Batcher(
        service.answer, limits.max_batch, limits.batch_milliseconds / 1000, limits.max_queue
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(
        title=f"{service.model} on {service.dataset}",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere; /openapi.json is there
        redoc_url=None,
    )
    app.state.batcher = batcher
    app.add_middleware(Guard, limits=limits, hosts=hosts)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(*_sentence(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        shown = printable(request.url.path)
        if error.status_code == 404:
            return _refusal(404, f"there is no {shown}: POST /recommend, GET /items, /health or /.")
        if error.status_code == 405:
            return _refusal(405, f"{request.method} {shown} is not possible: POST /recommend, GET the others.")
        return _refusal(error.status_code, str(error.detail))

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> JSONResponse:
        return _refusal(404 if isinstance(error, UnknownUserError) else 422, str(error))

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return _refusal(503, f"{limits.max_queue} questions are waiting already: ask again later.", {"retry-after": "1"})

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> JSONResponse:
        return _refusal(504, f"no answer within {limits.max_seconds:g} seconds: ask again later.", {"retry-after": "1"})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _refusal(500, "the answer could not be computed: the server's log has the reason.")

    @app.post("/recommend")
    async def recommend(asked: Asked) -> Recommendations:
        """Recommend items for a user or after a history."""
        if asked.topk > limits.max_topk:
            raise UserError(f"topk: {asked.topk} is more than the {limits.max_topk} that this server gives.")
        if asked.history is not None and len(asked.history) > limits.max_history:
            count = len(asked.history)
            raise UserError(f"history: {count} items are more than the {limits.max_history} that this server reads.")
        question = service.query(
            None if asked.user is None else str(asked.user),
            None if asked.history is None else [str(name) for name in asked.history],
            asked.topk,
            asked.exclude_history,
        )
        try:
            async with asyncio.timeout(limits.max_seconds):
                answer = await batcher.ask(question)
        except (BusyError, TimeoutError):
            raise
        except Exception:
            getLogger().exception("a question could not be answered")
            raise
        return _recommendations(service, question, answer, limits)

    @app.get("/items")
    def items(
        query: Annotated[str, Query(max_length=_LONGEST_TEXT)] = "",
        limit: Annotated[int, Query(ge=1, le=_MOST_COMPLETIONS)] = 10,
    ) -> list[Item]:
        """Items whose titles begin with, or contain, what was typed; or the one of this id."""
        titles = service.titles
        return [Item(item=titles.ids[item], title=titles.texts[item]) for item in titles.complete(query, limit)]

    @app.get("/health")
    def health() -> Health:
        """What this server is, and that it works."""
        return Health(
            status="ok",
            model=service.model,
            dataset=service.dataset,
            items=service.items,
            users=service.has_users,
            search=service.index.name,
            waiting=batcher.waiting,
            version=__version__,
        )

    for path, (name, kind) in _PAGES.items():
        app.add_api_route(path, _file(name, kind), include_in_schema=False)
    return app


def _recommendations(service: Service, question: Question, answer: Answer, limits: Limits) -> Recommendations:
    ids, texts = service.titles.ids, service.titles.texts
    return Recommendations(
        items=[
            Recommended(**best._asdict(), because=[Because(**vars(reason)) for reason in reasons])
            for best, reasons in zip(answer.items, answer.reasons, strict=True)
        ],
        history=[Item(item=ids[item], title=texts[item]) for item in question.items[-limits.max_history :]],
    )


def _file(name: str, kind: str) -> Any:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    async def serve() -> Response:
        return Response(text, media_type=kind)

    return serve


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


def _sentence(error: RequestValidationError) -> tuple[int, str]:
    """Status and sentence of the first thing that is wrong with a question."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return 400, f"the body is no JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})."
    if first["type"] == "missing" and not place:
        return 400, 'the body is missing: send JSON such as {"history": ["a title"]}.'
    if first["type"] == "extra_forbidden":
        return 422, f"{printable('.'.join(place))} is no key of a question: give {', '.join(Asked.model_fields)}."
    if not place:
        return 422, 'the body must be a JSON object such as {"history": ["a title"]}, sent as application/json.'
    kinds = ("int", "str", "constrained-str")  # of a text or number, which of them it was tried as
    where = ".".join(part for part in place if part not in kinds)
    return 422, f"{printable(where)}: {printable(first['msg'].replace('Input should', 'it must'))}."


class Guard:
    """Reads a question's body within limits of size and time before anything else sees it; adds headers to each answer.

    A question to another host is refused: a page from elsewhere, whose name leads here, must not read a local server's answers.

    Args:
        app: what comes next.
        limits: of the server.
        hosts: names under which it may be addressed; ``*``: any.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Sequence[str]) -> None:
        self.app, self.limits, self.hosts = app, limits, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        host = re.sub(r":\d*$", "", host).lower()
        if "*" not in self.hosts and host not in self.hosts:
            shown = printable(host) or "nothing"
            await self._refuse(with_headers, 400, f"{shown} is no name of this server: start it with --hosts={shown}.")
            return
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            await self._refuse(with_headers, 408, f"the question did not arrive within {self.limits.max_seconds:g} seconds.")
            return
        if body is None:
            await self._refuse(with_headers, 413, f"the question has more than {self.limits.max_body} bytes.")
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replayed, with_headers)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self.limits.max_body:
                return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.limits.max_body:
                return None
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, send: Send, status: int, sentence: str) -> None:
        content = json.dumps({"error": sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})
