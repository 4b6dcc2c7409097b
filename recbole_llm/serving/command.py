"""The commands ``recbole-llm export`` and ``recbole-llm serve``."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from recbole_llm.config.checks import GIVEN
from recbole_llm.config.command_line import parse_command_line, refuse_unknown
from recbole_llm.errors import UserError, say
from recbole_llm.serving.limits import Limits

EXPORT_HELP = """\
recbole-llm export RUN --output=FOLDER [--with_backbone=True] [--with_users=True]
  write what recommends of a trained model, without its data: item vectors, ids, titles, trained weights
  --with_backbone  put a copy of the LLM in; without it the LLM is named, with its fingerprint
  --with_users     put the users' histories in, so that users can be asked for by id
  where the run's files have moved: --data_path, --teacher_checkpoint, --pretrained, --backbone"""
SERVE_HELP = """\
recbole-llm serve RUN_OR_EXPORT [--host=127.0.0.1] [--port=8000] [--hosts=NAME,NAME] [--search=auto|exact|faiss]
  answer over HTTP: POST /recommend, GET /items?query=, GET /health, and a page to try it at /
  --hosts   names under which the server may be addressed (any: '*'); usually those of --host
  limits    {limits}
  where files have moved: --data_path, --teacher_checkpoint, --pretrained, --backbone"""
LOCAL = ("127.0.0.1", "localhost", "[::1]")


def export(argv: Sequence[str]) -> int:
    """``recbole-llm export``: write what recommends of a trained model."""
    flags = ("with_backbone", "with_users")
    sources, settings = _read(argv, {"output", *flags, *GIVEN}, flags)
    if settings.get("help"):
        say(EXPORT_HELP)
        return 0
    folder = _one(sources, "the folder of a run: saved/LLMSTAR-...")
    if not isinstance(settings.get("output"), str):
        raise UserError("name the folder to write: --output=FOLDER.")
    for flag in flags:
        if not isinstance(settings.get(flag, False), bool):
            raise UserError(f"--{flag} is {settings[flag]!r}: give True or False.")
    from recbole_llm.serving.export import export as write  # it needs PyTorch

    given = {name: settings[name] for name in GIVEN if name in settings}
    say(write(folder, settings["output"], settings.get("with_backbone", False), settings.get("with_users", False), given))
    return 0


def serve(argv: Sequence[str]) -> int:
    """``recbole-llm serve``: answer questions over HTTP."""
    limits = [field.name for field in fields(Limits)]
    sources, settings = _read(argv, {"host", "port", "hosts", "search", *limits, *GIVEN})
    if settings.get("help"):
        say(SERVE_HELP.format(limits=", ".join(f"--{field.name}={field.default}" for field in fields(Limits))))
        return 0
    folder = _one(sources, "the folder of a run or an export")
    given = {name: settings[name] for name in GIVEN if name in settings}
    checked = Limits.of(settings)
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'serve needs the package {package}: pip install "recbole-llm[serve]"')
    from recbole_llm.serving.index import check_kind  # they need PyTorch
    from recbole_llm.serving.server import run

    search = str(settings.get("search", "auto"))
    check_kind(search)
    host, given_port = str(settings.get("host", "127.0.0.1")), str(settings.get("port", 8000))  # RecBole's port is a text
    port = int(given_port) if given_port.isascii() and given_port.isdigit() and len(given_port) < 6 else -1
    if not 0 <= port < 65_536:
        raise UserError(f"port is {given_port!r}: give a whole number from 0 (any that is free) to 65535.")
    hosts = [name.strip() for name in str(settings["hosts"]).split(",")] if "hosts" in settings else _names(host)
    with _listening(host, port) as listener:
        run(folder, listener, host, hosts, search, checked, given)
    return 0


def _read(argv: Sequence[str], known: set[str], flags: Sequence[str] = ()) -> tuple[list[str], dict[str, Any]]:
    words = [f"--{word[2:].replace('-', '_', 1)}" if word.startswith("--with-") else word for word in argv]
    sources = [word for word in words if not word.startswith("-")]
    settings = parse_command_line([word for word in words if word.startswith("-")], flags=flags)
    refuse_unknown(settings, known | {"help"})
    return sources, settings


def _one(sources: Sequence[str], what: str) -> str:
    if len(sources) != 1:
        raise UserError(f"name {what} (found {len(sources)}).")
    return sources[0]


def _names(host: str) -> list[str]:
    """The names under which a server is addressed: a page from elsewhere must not reach a local one by a name of its own."""
    if host in (*LOCAL, "::1"):
        return list(LOCAL)
    return ["*"] if host in ("0.0.0.0", "::") else [f"[{host}]" if ":" in host else host]


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        why = f"host and port: {host}:{port} cannot be used ({error.strerror})"
        raise UserError(f"{why}: give another --port or --host.") from None
    return listener
