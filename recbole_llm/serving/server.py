"""The process that answers: loads a model, listens, and ends when it is told to, after the questions that it took."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import uvicorn

from recbole_llm.errors import say
from recbole_llm.recommend import load
from recbole_llm.results.log import Readable
from recbole_llm.serving.app import make_app
from recbole_llm.serving.limits import Limits
from recbole_llm.serving.service import Service

_CONNECTIONS = 64  # beyond those whose questions may wait


def run(
    folder: str,
    listener: socket.socket,
    host: str,
    hosts: Sequence[str],
    search: str,
    limits: Limits,
    given: Mapping[str, Any],
) -> None:
    """Load the model in ``folder`` and answer at ``listener`` until a signal comes (SIGINT, SIGTERM)."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Readable())
    say(f"Loading {folder} ...", sys.stderr)
    service = Service(load(folder, **given), search)
    app = make_app(service, limits, hosts)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=limits.max_queue + limits.max_batch + _CONNECTIONS,
        timeout_graceful_shutdown=max(1, int(limits.max_seconds)),
    )
    say(f"{service.model} on {service.dataset}, {service.items:,} items, search: {service.index.name}", sys.stderr)
    say(f"Ready at {address} (stop: Ctrl-C)", sys.stderr)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # the signal once more, when all is answered
        pass
    say("Stopped.", sys.stderr)
