"""Griffe extension: what docstrings write as Sphinx does, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?(?:[\w.]+\.)?(\w+)`")  # :func:`module.name`: the last part is shown
_MATH = re.compile(r"^\.\. math::\n\s*((?:[ \t]+\S.*\n?)+)", re.MULTILINE)
_BLOCK = re.compile(r"(?<=\S)::$", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Turn roles, formulas (shown as their source) and the colons before a code block into Markdown."""

    def formula(match: re.Match[str]) -> str:
        return f"\n```text\n{textwrap.dedent(' ' * 4 + match[1].rstrip())}\n```\n"

    return _BLOCK.sub(":", _ROLE.sub(r"`\1`", _MATH.sub(formula, text)))


class SphinxDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
