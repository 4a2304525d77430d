"""How emitters are found: by a kind's type, or in the kind itself when a plugin brought it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmkit.architecture.kind import Kind
from llmkit.errors import RequirementError

__all__ = ["Emitters", "emitter_of"]

Emitters = Mapping[type, Callable[..., Any]]


def emitter_of(kind: Kind, emitters: Emitters) -> Callable[..., Any]:
    """The emitter of a kind's type, or the `onnx_emitter` that a plugin's own kind carries.

    Raises:
        RequirementError: there is neither.
    """
    found: Callable[..., Any] | None = emitters.get(type(kind)) or getattr(kind, "onnx_emitter", None)
    if found is None:
        raise RequirementError(
            f"the ONNX export has no emitter for the kind {type(kind).__name__}",
            hint="give the kind an `onnx_emitter` in its plugin, or export with --via optimum",
        )
    return found
