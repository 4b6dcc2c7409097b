"""MkDocs hook: one page of reference for each public room of the package, made from the modules that are there."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parents[1] / "recbole_llm"

# What a user or the author of a model calls; the other rooms are the library's own affair.
PUBLIC = {
    "quick_start": "Train and compare",
    "recommend": "Load and recommend",
    "registry": "Register models",
    "errors": "Errors",
    "config": "Settings",
    "model": "Models",
    "recommender": "What a model is made of",
    "evaluation": "Evaluation",
    "results": "Results",
    "data": "Data",
    "loss": "Losses",
}


def modules(room: str) -> list[str]:
    """The public modules of a room, by their dotted names."""
    files = [PACKAGE / f"{room}.py", *sorted((PACKAGE / room).rglob("*.py"))]
    found = [file for file in files if file.is_file() and not file.name.startswith("_")]
    return [".".join(("recbole_llm", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in found]


def pages() -> dict[str, str]:
    """The Markdown of each page by its name."""
    pages = {}
    for room, title in PUBLIC.items():
        if names := modules(room):
            pages[room] = f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
    listed = [f"- [{PUBLIC[room]}]({room}.md): " + ", ".join(f"`{name}`" for name in modules(room)) for room in pages]
    pages["index"] = "# Reference\n\nFrom the docstrings of the public modules.\n\n" + "\n".join(listed) + "\n"
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the pages to the navigation."""
    names = ["index", *(name for name in pages() if name != "index")]
    if config.nav is None or any("Reference" in entry for entry in config.nav):
        return config  # `mkdocs serve` calls this again
    config.nav.append({"Reference": [f"reference/{name}.md" for name in names]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files
