"""Pure functions Checkpoint -> Checkpoint: the command, the recipe step and the Python call are the same function."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.transforms import convert, delta, lora, quantize, vocab

__all__ = ["convert", "delta", "lora", "quantize", "vocab"]


def __getattr__(name: str) -> Any:
    # Each is loaded on first use: one command needs one of them.
    if name in __all__:
        return import_module(f"llmkit.transforms.{name}")
    raise AttributeError(f"module 'llmkit.transforms' has no attribute {name!r}")
