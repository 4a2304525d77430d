"""The import of torch, which takes a second and loses a Ctrl-C that comes during it."""

from __future__ import annotations

import importlib
import signal
import threading


def import_torch() -> None:
    """Import torch; an interrupt that came meanwhile is raised afterwards.

    Raises:
        KeyboardInterrupt: Ctrl-C came while torch was imported.
    """
    if threading.current_thread() is not threading.main_thread():
        importlib.import_module("torch")
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        importlib.import_module("torch")
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt
