"""LLM-based sequential recommenders for RecBole. Importing this package is all it takes: RecBole then knows them.

>>> import recbole_llm
>>> from recbole.quick_start import run_recbole
>>> run_recbole(model="LLMSTAR", dataset="ml-100k")  # doctest: +SKIP
"""

import importlib
import os

# oneDNN, which multiplies bfloat16 matrices on CPU, keeps 1,024 prepared multiplications, one for each shape that it met.
# Ragged prompts give a new shape at every step: memory would grow by gigabytes. It looks here when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

from typing import Any  # noqa: E402

from wrapt import register_post_import_hook  # noqa: E402

from recbole_llm._version import __version__  # noqa: E402
from recbole_llm.registry import register_model  # noqa: E402

__all__ = ["__version__", "load", "register_model"]

_WHERE = {"load": "recbole_llm.recommend"}  # what needs RecBole and PyTorch, imported when it is asked for


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'recbole_llm' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def _extend(_recbole: Any) -> None:
    from recbole_llm import compat, plugin

    compat.apply()
    plugin.register()


# RecBole imports PyTorch, which takes seconds: whoever only asks for help, or mistyped a word, does without.
register_post_import_hook(_extend, "recbole")
