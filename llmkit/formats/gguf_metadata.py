"""The types of GGUF's metadata, checked when a header is read, so that later readers need no checks.

Source: ggml-org/ggml, docs/gguf.md. Keys of an architecture that the standard does not name may be of any type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import InputError

_SHOWN_CHARS = 40


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _all(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_kind, value))


_TEXT, _WHOLE, _TRUTH = ("text", _is_text), ("a whole number", _is_whole), ("true or false", _is_truth)
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "general.architecture": _TEXT, "general.type": _TEXT, "general.alignment": _WHOLE,
    "split.count": _WHOLE, "split.no": _WHOLE,
    "tokenizer.ggml.model": _TEXT, "tokenizer.ggml.pre": _TEXT, "tokenizer.chat_template": _TEXT,
    "tokenizer.ggml.tokens": ("a list of texts", _all(_is_text)),
    "tokenizer.ggml.merges": ("a list of texts", _all(_is_text)),
    "tokenizer.ggml.scores": ("a list of numbers", _all(_is_number)),
    "tokenizer.ggml.token_type": ("a list of whole numbers", _all(_is_whole)),
    "tokenizer.ggml.add_bos_token": _TRUTH, "tokenizer.ggml.add_eos_token": _TRUTH,
    "tokenizer.ggml.add_space_prefix": _TRUTH,
    "llmkit.source_dtype": _TEXT, "llmkit.config": _TEXT,
}  # fmt: skip
_SIZES = ("block_count", "expert_count", "context_length", "embedding_length")  # after the architecture and a dot


def check_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Hold the metadata of a file to the types that the standard gives them.

    Raises:
        InputError: a value of another type; it names the key.
    """
    sizes = {f"{metadata.get('general.architecture')}.{size}" for size in _SIZES}
    for key, value in metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        kind = _WHOLE if is_id or key in sizes else _KINDS.get(key)
        if kind is None or kind[1](value):
            continue
        shown = type(value).__name__ if isinstance(value, list) else repr(value)[:_SHOWN_CHARS]
        raise InputError(
            f"{path}: metadata {key} is {shown}; expected {kind[0]}",
            hint="download the file again, or convert the original checkpoint again with a current converter",
        )
