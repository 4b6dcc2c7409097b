"""A report as one HTML file that needs nothing else: style, script, figures and plotly.js are in it.

plotly.js is embedded once, compressed: the browser unpacks it (about 4.8 MB of script take 1.9 MB in the file). A policy in
the page's head forbids every connection, and any script but the page's own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from recbole_llm.results.report.parts import Details, Plot, Row, Section

_HERE = Path(__file__).parent


@dataclass
class Page:
    """What a report's file is made of.

    Attributes:
        title: of the page.
        sections: in order; a section without parts is left out.
        notes: sentences above all sections.
        footer: how and when the page was made.
    """

    title: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    footer: str = ""
    plots: list[Plot] = field(default_factory=list, init=False)

    def html(self) -> str:
        """The file's text."""
        sections = [section for section in self.sections if section.parts]
        self.plots = [plot for section in sections for plot in _plots(section.parts)]
        figures = _script_json([json.loads(plot.figure.to_json()) for plot in self.plots])
        library, license_line = _library()
        strict = jinja2.StrictUndefined
        environment = jinja2.Environment(autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
        environment.filters["anchor"] = anchor
        template = environment.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
        return template.render(
            title=self.title,
            sections=sections,
            notes=list(self.notes),
            footer=self.footer,
            number={id(plot): place for place, plot in enumerate(self.plots)},
            identity=id,
            has_plots=bool(self.plots),
            # Text of this package, of plotly and of json.dumps above: the only parts that are not escaped by the template.
            style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
            script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
            figures=Markup(figures),
            library=Markup(library),
            license_line=license_line,
            nonce=hashlib.sha256((figures + repr(sections)).encode("utf-8", "replace")).hexdigest()[:32],
        )


def anchor(text: str) -> str:
    """A title as the target of a link."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _plots(parts: Sequence[Any]) -> list[Plot]:
    found: list[Plot] = []
    for part in parts:
        if isinstance(part, Plot):
            found.append(part)
        elif isinstance(part, (Row, Details)):
            found += _plots(part.parts)
    return found


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _library() -> tuple[str, str]:
    """plotly.js, compressed, in base64; and the lines of its license."""
    text = plotly.offline.get_plotlyjs()
    packed = gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0)
    notice = re.match(r"\s*/\*\*(.*?)\*/", text, flags=re.DOTALL)
    lines = [line.strip(" *") for line in (notice.group(1) if notice else "plotly.js, MIT license").splitlines()]
    return base64.b64encode(packed).decode("ascii"), " ".join(line for line in lines if line)
