"""The import of torch, which takes a second and loses a Ctrl-C that comes during it."""

from __future__ import annotations

import importlib

from llmkit.lazy_imports import uninterrupted


def import_torch() -> None:
    """Import torch; an interrupt that came meanwhile is raised afterwards.

    Raises:
        KeyboardInterrupt: Ctrl-C came while torch was imported.
    """
    with uninterrupted():
        importlib.import_module("torch")
