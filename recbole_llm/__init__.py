"""LLM-based sequential recommenders for RecBole. Importing this package is all it takes: RecBole then knows them.

>>> import recbole_llm
>>> from recbole.quick_start import run_recbole
>>> run_recbole(model="LLMSTAR", dataset="ml-100k")  # doctest: +SKIP
"""

from recbole_llm import compat, registry
from recbole_llm._version import __version__

__all__ = ["__version__"]

compat.apply()
registry.register()
