"""The text of a drafted plugin: what it has of the plugin it is made after, and what differs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pprint import pformat
from typing import Any

from llmkit.architecture.keys import Key
from llmkit.drafting.draft import Draft

__all__ = ["plugin_text"]

_TEMPLATE = '''"""{name}: a draft, made from the headers and the config of {label}, after the plugin {after}.

Names and shapes come from that checkpoint, the computation from {after}. Go through every line marked `check:`, add
variants for what releases of the family vary, and run `llmkit plugins check` on this file.
{unknown}"""

from __future__ import annotations

from dataclasses import replace

import {module} as like
{imports}

ARCHITECTURE = Architecture(
{fields}
)
'''


def plugin_text(draft: Draft, label: str) -> str:
    """The module."""
    made, (module, _, attribute) = draft.architecture, draft.plugin.target.partition(":")
    unread = ", ".join(f"{k} = {v!r:.80}" for k, v in draft.unread.items())
    items = [*draft.problems, *draft.unknown]
    items += [f"keys of config.json that nothing reads, and may change what is computed: {unread}"] if unread else []
    wrapped = [textwrap.fill(f"- {t}", 116, subsequent_indent="  ", break_on_hyphens=False) for t in items]
    parts = []
    for field in (
        "name",
        "matches",
        "model_types",
        "dims",
        "embedding",
        "block",
        "final_norm",
        "head",
        "names",
        "tiny",
    ):
        whys = {path: why for path, why in draft.checks.items() if path.partition(".")[0] == field}
        for path, why in whys.items():
            parts += textwrap.wrap(f"# check: {path}: {why}", 110, subsequent_indent="#   ")
        parts.append(f"{field}={_code(getattr(made, field), getattr(draft.like, field), f'like.{attribute}.{field}')},")
    body = "\n".join(parts)
    imports = {
        "llmkit.architecture.architecture": ["Architecture"],
        "llmkit.architecture.keys": [n for n in ("Key",) if f"{n}(" in body],
        "llmkit.architecture.names": [n for n in ("Fused", "Transposed") if f"{n}(" in body],
    }
    return _TEMPLATE.format(
        name=made.name,
        label=_plain(label),
        after=draft.like.name,
        unknown=_plain("\n".join(["", "Not known:", "", *wrapped, ""])) if items else "",
        module=module,
        imports="\n".join(f"from {where} import {', '.join(names)}" for where, names in imports.items() if names),
        fields=textwrap.indent(body, " " * 4),
    )


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


def _code(value: Any, like: Any, where: str) -> str:
    """A value as Python: the plugin's own where it is the same, that with other fields where it is of its kind."""
    if value == like and type(value) is type(like):
        return where
    if type(value) is type(like) and is_dataclass(value) and not isinstance(value, Key):
        pairs = [(f.name, getattr(value, f.name), getattr(like, f.name)) for f in fields(value)]
        changes = [
            f"{name}={_code(mine, theirs, f'{where}.{name}')}," for name, mine, theirs in pairs if mine != theirs
        ]
        return f"replace(\n    {where},\n{textwrap.indent(chr(10).join(changes), ' ' * 4)}\n)"
    if isinstance(value, Mapping):
        lines = [f"    {k!r}: {v!r}," for k, v in value.items()]
        return "\n".join(["{", *lines, "}"]) if lines else "{}"
    return pformat(value, 100)
