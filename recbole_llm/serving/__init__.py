"""Exporting trained models, and answering over HTTP: ``recbole-llm export`` and ``recbole-llm serve``."""
