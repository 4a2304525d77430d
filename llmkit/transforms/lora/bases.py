"""Whether a base is the model that the config of an adapter names: by what both hold, else by what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.errors import LlmkitError
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_files import CONFIG_NAME
from llmkit.formats.paths import expanded
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Lazy, Read

_COMPARED = 8  # tensors, from the first layer to the last
_NBYTES = 2**16  # of each
# In names of models: words that say how it is stored, not which one it is.
_STORAGE = {"hf", "bnb", "gptq", "awq", "gguf", "onnx", "4bit", "8bit", "int4", "int8", "fp8", "fp16", "bf16", "fp32"}


def doubt(base: Checkpoint, adapter: Adapter) -> str | None:
    """Why a base may be another model than the one that an adapter was trained on, in words; None where it is that.

    A model that is here is compared: single tensors are read, some kilobytes of each.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    is_here, other = _difference(base, named)
    if other:
        return (
            f"{base.label} is not the model that {adapter.label} was trained on: {other} differs from that of {named}, "
            f"which its {CONFIG_NAME} names"
        )
    names = [base.label, base.config.get("_name_or_path"), *(base.origin.resolve().parts[-3:] if base.origin else ())]
    if is_here or any(_words(named) == _words(name) for name in names if isinstance(name, str)):
        return None
    return (
        f"{base.label} may be another model than the one that {adapter.label} was trained on: its {CONFIG_NAME} names "
        f"{named}, which is not here to compare with"
    )


def _difference(base: Checkpoint, named: str) -> tuple[bool, str]:
    """Whether a model of that name is a folder here that has tensors to compare, and the first that differs."""
    try:
        path = expanded(named)
        if not path.is_dir():
            return False, ""
        if base.origin is not None and path.samefile(base.origin):
            return True, ""
        pairs = list(_pairs(base, open_checkpoint(path)))
        chosen = pairs[:: -(-len(pairs) // _COMPARED) or 1]
        return bool(chosen), next((name for name, a, b in chosen if are_equal(a, b, _NBYTES) is False), "")
    except (LlmkitError, OSError, ValueError, RuntimeError):
        return False, ""


def _pairs(base: Checkpoint, named: Checkpoint) -> Iterator[tuple[str, Lazy, Lazy]]:
    """Tensors of both that are equal where it is one model: what quantization, adapters or new tokens change is not."""
    is_merged = any(step.get("transform") == "lora.merge" for step in base.history)
    for name, a in base.tensors.items():
        b = named.tensors.get(name)
        if b is None or a.shape != b.shape or not (a.dtype.is_float and b.dtype.is_float):
            continue
        if len(a.shape) > 1 and (is_merged or not (isinstance(a.node, Read) and isinstance(b.node, Read))):
            continue
        if a.dtype is b.dtype or a.dtype.itemsize != b.dtype.itemsize:
            narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
            yield name, a.cast(narrow), b.cast(narrow)


def _words(name: str) -> set[str]:
    """What tells a model in a path or hub id: the words of its last part (`models--owner--name` in the hub's cache)."""
    last = name.rstrip("/").rpartition("/")[2].rpartition("--")[2].lower()
    return set(re.findall(r"[a-z]+|\d+[a-z]*", last)) - _STORAGE
