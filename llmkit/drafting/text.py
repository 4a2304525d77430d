"""The text of a drafted plugin: what it has of the plugin it is made after, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pprint import pformat
from textwrap import fill, indent, wrap
from typing import Any

from llmkit.architecture.keys import Key
from llmkit.architecture.names import Fused, Transposed
from llmkit.drafting.draft import Draft

_KINDS = (Key, Fused, Transposed)  # what is written as a whole
_TEMPLATE = '''"""{about}"""

from __future__ import annotations

from dataclasses import replace

import {module} as like
from llmkit.architecture.architecture import Architecture
{imports}

ARCHITECTURE = Architecture(
{fields}
)
'''
_ABOUT = """{name}: a draft, made from the headers and the config of {label}, after the plugin {after}.

Names and shapes come from that checkpoint, the computation from {after}. Go through every line marked `check:`, add
variants for what releases of the family vary, and run `llmkit plugins check` on this file.
"""


def plugin_text(draft: Draft, label: str) -> str:
    """The module."""
    made, (module, _, attribute) = draft.architecture, draft.plugin.target.partition(":")
    about, items = _ABOUT.format(name=made.name, label=label, after=draft.like.name), [*draft.problems, *draft.unknown]
    if draft.unread:
        unread = ", ".join(f"{k} = {v!r:.80}" for k, v in draft.unread.items())
        items.append(f"keys of config.json that nothing reads, and may change what is computed: {unread}")
    if items:
        lines = [fill(f"- {item}", 116, subsequent_indent="  ", break_on_hyphens=False) for item in items]
        about += "\n".join(["", "Not known:", "", *lines, ""])
    body = []
    for field in fields(made):
        value, where = getattr(made, field.name), f"like.{attribute}.{field.name}"
        for path, why in draft.checks.items():
            if path.partition(".")[0] == field.name:
                body += wrap(f"# check: {path}: {why}", 110, subsequent_indent="#   ")
        if value != field.default and (field.default_factory is MISSING or value != field.default_factory()):
            body.append(f"{field.name}={_code(value, getattr(draft.like, field.name), where)},")
    text = indent("\n".join(body), " " * 4)
    imports = [f"from {kind.__module__} import {kind.__name__}" for kind in _KINDS if f"{kind.__name__}(" in text]
    quotable = about.replace("\\", "/").replace('"""', "'''")
    return _TEMPLATE.format(about=quotable, module=module, imports="\n".join(imports), fields=text)


def _code(value: Any, like: Any, where: str) -> str:
    """A value as Python: the plugin's own where it is the same, that with other fields where it is of its kind."""
    if value == like and type(value) is type(like):
        return where
    if type(value) is type(like) and is_dataclass(value) and not isinstance(value, _KINDS):
        names = [f.name for f in fields(value) if getattr(value, f.name) != getattr(like, f.name)]
        changed = [f"{n}={_code(getattr(value, n), getattr(like, n), f'{where}.{n}')}," for n in names]
        return "\n".join(["replace(", indent("\n".join([f"{where},", *changed]), " " * 4), ")"])
    if isinstance(value, Mapping) and value:
        return "\n".join(["{", *(f"    {k!r}: {v!r}," for k, v in value.items()), "}"])
    return pformat(value, 100)
