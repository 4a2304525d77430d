"""Libraries that take long to import, imported when one of their names is first used: most commands need none of them.

`from llmkit.lazy_imports import torch` stands among a module's imports, and costs nothing until a tensor is computed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

ENDS = tuple(s for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if s is not None)
"""The signals that ask a process to end."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """For an import, during which some libraries lose a Ctrl-C: one that comes inside is taken afterwards.

    Raises:
        KeyboardInterrupt: at the end, where Ctrl-C came.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {s: h for s in ENDS if is_main and callable(h := signal.getsignal(s)) and not isinstance(h, int)}
    seen: list[int] = []
    for ending in handlers:
        signal.signal(ending, lambda number, _frame: seen.append(number))
    try:
        yield
    finally:
        for ending, handler in handlers.items():
            signal.signal(ending, handler)
    if seen:
        handlers[seen[0]](seen[0], None)


class _Later:
    """A module that is imported by the first look at one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        with uninterrupted():
            module = import_module(self._name)
        value = getattr(module, name)
        setattr(self, name, value)  # the next look finds it here
        return value


if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
else:
    np, onnx, torch = _Later("numpy"), _Later("onnx"), _Later("torch")

__all__ = ["ENDS", "np", "onnx", "torch", "uninterrupted"]
