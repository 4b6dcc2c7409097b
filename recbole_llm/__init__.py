"""LLM-based sequential recommenders for RecBole. Importing this package is all it takes: RecBole then knows them.

>>> import recbole_llm
>>> from recbole.quick_start import run_recbole
>>> run_recbole(model="LLMSTAR", dataset="ml-100k")  # doctest: +SKIP
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

# oneDNN, which multiplies bfloat16 matrices on CPU, keeps 1,024 prepared multiplications, one for each shape that it met.
# Ragged prompts give a new shape at every step: memory would grow by gigabytes. It looks here when it is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# A process that others wait for and that is lost is told in a sentence: without PyTorch's warnings of each connection to it.
if "RANK" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from wrapt import register_post_import_hook  # noqa: E402

from recbole_llm._version import __version__  # noqa: E402
from recbole_llm.registry import register_model  # noqa: E402

if TYPE_CHECKING:
    from recbole_llm.quick_start import compare
    from recbole_llm.recommend import load
    from recbole_llm.results.report.write import write_report as report
    from recbole_llm.results.table import table

__all__ = ["__version__", "compare", "load", "register_model", "report", "table"]

# Imported when they are first used: they need RecBole and PyTorch, or the libraries of tables and tests.
_LATER = {
    "compare": "recbole_llm.quick_start:compare",
    "load": "recbole_llm.recommend:load",
    "report": "recbole_llm.results.report.write:write_report",
    "table": "recbole_llm.results.table:table",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LATER[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _extend(_recbole: Any) -> None:
    from recbole_llm import compat, plugin

    compat.apply()
    plugin.register()


if "recbole" not in sys.modules and importlib.util.find_spec("recbole") is None:
    from recbole_llm.compat import RecBoleIsMissing

    sys.meta_path.append(RecBoleIsMissing())

# RecBole imports PyTorch, which takes seconds: whoever only asks for help, or mistyped a word, does without.
register_post_import_hook(_extend, "recbole")
