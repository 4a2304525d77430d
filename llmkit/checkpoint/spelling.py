"""Tensor names as the family, or another version of transformers, spells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.architecture.names import Names, NameTable
from llmkit.architecture.registry import find
from llmkit.architecture.storage import single_experts
from llmkit.errors import PluginError, listing
from llmkit.tensors.lazy import Lazy

# How the names of a language model inside one of several modalities begin: with transformers 4.52 and later, before,
# in files of the model without its head, where it is named after texts (Idefics, SmolVLM), and inside another model.
LANGUAGE_MODEL_PREFIXES = (
    {"model.language_model.": "model."},
    {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
    {"language_model.": "model."},
    {"model.text_model.": "model."},
    {"model.language_model.model.": "model.", "model.language_model.lm_head.": "lm_head."},
)


def in_family_names(tensors: Mapping[str, Lazy], config: Mapping[str, Any]) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors with the prefix that the family's names begin with and its experts one by one, and what to tell.

    Files saved from the model without its head lack it (`h.0.ln_1.weight`); those saved with the head have it
    (`transformer.h.0.ln_1.weight`), as have adapters, deltas and every library's idea of the family.
    """
    try:
        architecture = find(config)
    except PluginError:  # whoever needs the architecture will hear of it
        architecture = None
    if architecture is None:
        return dict(tensors), []
    if architecture.names.respelled:
        tensors = {_respelled(name, architecture.names): lazy for name, lazy in tensors.items()}
    tensors = single_experts(tensors, architecture.names)
    prefix, table = architecture.names.prefix, NameTable(architecture.names)
    if (outer := _outer(tensors, table)) is not None:
        tensors = {name.removeprefix(outer): lazy for name, lazy in tensors.items()}
        return tensors, [f"{len(tensors)} names are read without {outer!r}, which they all begin with"]
    if not prefix:
        return dict(tensors), []
    renamed: dict[str, Lazy] = {}
    changed = []
    for name, lazy in tensors.items():
        full_name = prefix + name
        is_meant = not name.startswith(prefix) and full_name not in tensors and table.slot(name) is None
        if is_meant and (table.slot(full_name) is not None or table.is_ignored(full_name)):
            changed.append(name)
            renamed[full_name] = lazy
        else:
            renamed[name] = lazy
    if not changed:
        return renamed, []
    return renamed, [
        f"{len(changed)} names are read with {prefix!r} before them, as the family has it ({listing(changed, 1)})"
    ]


def _outer(tensors: Mapping[str, Lazy], table: NameTable) -> str | None:
    """What every name begins with that the family's do not: a module that trained the model as a part of its own."""
    first = next(iter(tensors), "")
    for outer in (first[: i + 1] for i, letter in enumerate(first) if letter == "."):
        outside = (n for n in tensors if table.slot(n) or not n.startswith(outer) or not table.slot(n[len(outer) :]))
        if next(outside, None) is None:
            return outer
    return None


def _respelled(name: str, names: Names) -> str:
    other = next((other for other in names.respelled if other in name), None)
    return name if other is None else name.replace(other, names.respelled[other])


def spellings(module: str) -> Iterator[str]:
    """Other paths that a module of a model of several modalities has in files or memory of other versions."""
    plain = {f"{module}."}
    for prefixes in LANGUAGE_MODEL_PREFIXES:
        plain |= {after + f"{module}.".removeprefix(b) for b, after in prefixes.items() if f"{module}.".startswith(b)}
    for text in plain:
        yield text[:-1]
        for prefixes in LANGUAGE_MODEL_PREFIXES:
            yield from (b + text.removeprefix(a)[:-1] for b, a in prefixes.items() if text.startswith(a))
    yield module.removeprefix("model.") if module.startswith("model.") else f"model.{module}"
