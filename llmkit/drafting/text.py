"""The text of a drafted plugin: the architecture as Python, from one template."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from llmkit.architecture.keys import Key
from llmkit.architecture.names import Fused, Transposed
from llmkit.drafting.draft import Draft

__all__ = ["plugin_text"]

_WIDTH = 116
_POSITIONAL = {Key: 2, Fused: 2, Transposed: 1}  # how many fields go without their names
_TEMPLATE = '''"""{name}: a draft, made from the headers and the config of {label}, after the plugin {after}.

Names and shapes come from that checkpoint, the computation from {after}. Go through every line marked `check:`, add
variants for what releases of the family vary, and run `llmkit plugins check` on this file.
{unknown}"""

from __future__ import annotations

{imports}

ARCHITECTURE = {architecture}
'''


def plugin_text(draft: Draft, label: str) -> str:
    """The module."""
    unread = ", ".join(f"{k} = {v!r:.80}" for k, v in draft.unread.items())
    items = [*draft.problems, *draft.unknown]
    items += [f"keys of config.json that nothing reads, and may change what is computed: {unread}"] if unread else []
    wrapped = [textwrap.fill(f"- {t}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for t in items]
    imports = {(type(v).__module__, type(v).__name__) for v in _dataclasses(draft.architecture)}
    modules = {module: sorted(n for m, n in imports if m == module) for module, _ in sorted(imports)}
    return _TEMPLATE.format(
        name=draft.architecture.name,
        label=_plain(label),
        after=draft.after,
        unknown=_plain("\n".join(["", "Not known:", "", *wrapped, ""])) if items else "",
        imports="\n".join(f"from {module} import {', '.join(names)}" for module, names in modules.items()),
        architecture=_code(draft.architecture, "", 0, draft.checks),
    )


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


def _dataclasses(value: Any) -> Iterator[Any]:
    if is_dataclass(value):
        yield value
    for _, _, part in _parts(value)[1]:
        yield from _dataclasses(part)


def _code(value: Any, path: str, indent: int, checks: Mapping[str, str]) -> str:
    """A value as Python: on one line, or on more where that is long or a part of it is to be checked."""
    opening, parts, closing = _parts(value)
    if not opening:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    below = {name: f"{path}.{name}".lstrip(".") for name, _, _ in parts}
    pieces = {name: before + _code(part, below[name], indent + 4, checks) for name, before, part in parts}
    line = opening + ", ".join(pieces.values()) + ("," if closing == ")" and opening == "(" and len(parts) == 1 else "")
    is_checked = any(checked in below.values() for checked in checks)
    if not is_checked and "\n" not in line and indent + len(line) < _WIDTH - 12:
        return line + closing
    lines = [opening]
    for name, piece in pieces.items():
        why, code = checks.get(below[name]), " " * (indent + 4) + piece + ","
        if why and "\n" not in code and len(code + why) < _WIDTH - 10:
            code += f"  # check: {why}"
        elif why:
            lines.append(f"{' ' * (indent + 4)}# check: {why}")
        lines.append(code)
    return "\n".join([*lines, " " * indent + closing])


def _parts(value: Any) -> tuple[str, list[tuple[str, str, Any]], str]:
    """What opens a value, its parts (their name, what stands before them, the part), and what closes it."""
    if is_dataclass(value):
        n_plain = _POSITIONAL.get(type(value), 0)
        stated = [(f.name, "" if i < n_plain else f"{f.name}=", getattr(value, f.name))
                  for i, f in enumerate(fields(value)) if not _is_default(f, getattr(value, f.name))]  # fmt: skip
        return f"{type(value).__name__}(", stated, ")"
    if isinstance(value, Mapping):
        return "{", [(str(k), f"{json.dumps(k, ensure_ascii=False)}: ", v) for k, v in value.items()], "}"
    if isinstance(value, tuple):
        return "(", [(str(i), "", v) for i, v in enumerate(value)], ")"
    if isinstance(value, list):
        return "[", [(str(i), "", v) for i, v in enumerate(value)], "]"
    return "", [], ""


def _is_default(field: Any, value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(value == default) and type(value) is type(default)
