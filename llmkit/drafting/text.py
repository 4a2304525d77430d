"""The text of a drafted plugin: what it has of the plugin it is made after, and what differs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pprint import pformat
from typing import Any

from llmkit.architecture.keys import Key
from llmkit.architecture.names import Fused, Transposed
from llmkit.drafting.draft import Draft

_KINDS = (Key, Fused, Transposed)  # what is written as a whole
_TEMPLATE = '''"""{name}: a draft, made from the headers and the config of {label}, after the plugin {after}.

Names and shapes come from that checkpoint, the computation from {after}. Go through every line marked `check:`, add
variants for what releases of the family vary, and run `llmkit plugins check` on this file.
{unknown}"""

from __future__ import annotations

from dataclasses import replace

import {module} as like
from llmkit.architecture.architecture import Architecture
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
    lines = []
    for field in fields(made):
        value, where = getattr(made, field.name), f"like.{attribute}.{field.name}"
        for path, why in draft.checks.items():
            if path.partition(".")[0] == field.name:
                lines += textwrap.wrap(f"# check: {path}: {why}", 110, subsequent_indent="#   ")
        if value != field.default and (field.default_factory is MISSING or value != field.default_factory()):
            lines.append(f"{field.name}={_code(value, getattr(draft.like, field.name), where)},")
    body = "\n".join(lines)
    used = [f"from {kind.__module__} import {kind.__name__}" for kind in _KINDS if f"{kind.__name__}(" in body]
    return _TEMPLATE.format(
        name=made.name,
        label=_plain(label),
        after=draft.like.name,
        unknown=_plain("\n".join(["", "Not known:", "", *wrapped, ""])) if items else "",
        module=module,
        imports="\n".join(used),
        fields=textwrap.indent(body, " " * 4),
    )


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


def _code(value: Any, like: Any, where: str) -> str:
    """A value as Python: the plugin's own where it is the same, that with other fields where it is of its kind."""
    if value == like and type(value) is type(like):
        return where
    if type(value) is type(like) and is_dataclass(value) and not isinstance(value, _KINDS):
        lines = [f"{where},"]
        for name in (f.name for f in fields(value) if getattr(value, f.name) != getattr(like, f.name)):
            lines.append(f"{name}={_code(getattr(value, name), getattr(like, name), f'{where}.{name}')},")
        return "\n".join(["replace(", textwrap.indent("\n".join(lines), " " * 4), ")"])
    if isinstance(value, Mapping):
        lines = [f"    {k!r}: {v!r}," for k, v in value.items()]
        return "\n".join(["{", *lines, "}"]) if lines else "{}"
    return pformat(value, 100)
