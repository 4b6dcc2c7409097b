"""A service of the small trained models, and what a server needs of packages."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore = []
if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "httpx2")):
    collect_ignore = ["test_http.py", "test_page.py"]


@pytest.fixture(scope="session")
def service(trained):
    from recbole_llm.recommend import load
    from recbole_llm.serving.service import Service

    return Service(load(trained["LLMSRec"]))
