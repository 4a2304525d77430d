"""Libraries that take long to import, imported when one of their names is first used: most commands need none of them.

`from llmkit.lazy_imports import torch` stands among a module's imports, and costs nothing until a tensor is computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Later:
    """A module that is imported by the first look at one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self._name), name)
        setattr(self, name, value)  # the next look finds it here
        return value


if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
else:
    np, onnx, torch = _Later("numpy"), _Later("onnx"), _Later("torch")

__all__ = ["np", "onnx", "torch"]
