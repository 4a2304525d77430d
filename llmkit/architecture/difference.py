"""Where two models differ as computations: sizes, kinds and their parameters. Names and storage do not count."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from llmkit.architecture.model import Model
from llmkit.architecture.scaling import Scaling, method_of

_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
_STORAGE = ("tied", "pairs")
# Fields of kinds that config.json has a common name for.
_IN_CONFIG = {
    "position.scaling": "rope_scaling", "position.theta": "rope_theta", "position.share": "partial_rotary_factor",
    "attention.window": "sliding_window",
}  # fmt: skip

# Some configs hold a float32 written out (9.999999747378752e-06); models compute in no more.
_FLOAT32 = 1e-6


def difference(wanted: Model, other: Model) -> str | None:
    """The first thing in which two models compute differently, in words; None where they are the same.

    Which rows of q and k make a rotary pair is storage (`architecture/storage.py` reorders them), and so is tying.
    """
    for size in _SIZES:
        a, b = getattr(wanted.dims, size), getattr(other.dims, size)
        if a != b:
            return f"{size} is {a}, here {b}"
    pairs: list[tuple[Any, Any]] = list(zip(wanted.blocks, other.blocks, strict=True))
    pairs += [(wanted.embedding, other.embedding), (wanted.final_norm, other.final_norm), (wanted.head, other.head)]
    return next((text for a, b in pairs if (text := _differs(a, b, ""))), None)


def _differs(a: Any, b: Any, at: str) -> str | None:
    if _is_same(a, b):
        return None
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return f"{at or 'the block'} is {_short(a)}, here {_short(b)}"
    for field in dataclasses.fields(a):
        if field.name not in _STORAGE:
            inner = f"{at}.{field.name}" if at else field.name
            inner = _IN_CONFIG.get(inner, inner)
            text = _differs(getattr(a, field.name), getattr(b, field.name), inner)
            if text is not None:
                return text
    return None


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_is_same, a, b))
    is_number = isinstance(a, float) and isinstance(b, float)
    return bool(a == b or (is_number and math.isclose(a, b, rel_tol=_FLOAT32)))


def _short(value: Any) -> str:
    if isinstance(value, Scaling):
        return repr(method_of(value))
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
