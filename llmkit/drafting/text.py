"""The text of a drafted plugin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.drafting.record import Draft, Line

__all__ = ["plugin_text"]

_KINDS = ("Alibi", "Block", "Embedding", "GatedMLP", "GroupedQuery", "Head", "Kind", "LayerNorm", "LearnedPositions",
          "NoNorm", "NoPositions", "Parallel", "PlainMLP", "PreNorm", "RMSNorm", "Rope", "Sandwich", "SharedParallel",
          "SlotShape")  # fmt: skip
_NAMES = ("Fused", "Names", "Transposed")
_KEYS = ("Computed", "Key")
_WIDTH = 116


def plugin_text(draft: Draft, name: str) -> str:
    """The module: imports, where needed a kind of its own, and `ARCHITECTURE`."""
    body = "\n".join([*_own_kind(draft), *_architecture(draft, name)]) + "\n"
    return "\n".join([*_docstring(draft, name), *_imports(body), "", body])


def _docstring(draft: Draft, name: str) -> Iterator[str]:
    yield f'"""{name}: a draft, made from the headers and the config of {draft.label}.'
    yield ""
    yield "Names and shapes fit that checkpoint. The mathematics is a guess: go through every line marked `check:`, add"
    yield "variants for what releases of the family vary, and run `llmkit plugins check` on this file. Headers show no"
    yield "scaled embeddings or residuals, caps on scores or logits, windows, or the order of rows in fused matrices."
    special = [*draft.special, *draft.remarks]
    if special:
        yield ""
        yield "What the draft does not have:"
        yield from (line for text in special for line in _wrapped(f"- {text}"))
    unexplained = draft.config.unexplained()
    if unexplained:
        yield ""
        yield "Keys of config.json that it does not use, some of which may change what is computed:"
        text = ", ".join(f"{k} = {_short(v)}" for k, v in unexplained.items())
        yield from _wrapped(text)
    yield '"""'
    yield ""


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for word in text.replace("\\", "/").replace('"""', "'''").split(" "):
        if line and len(line) + len(word) + 1 > _WIDTH:
            yield line
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    yield line


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _imports(body: str) -> Iterator[str]:
    code = re.sub(r"#.*", "", body)

    def used(names: tuple[str, ...]) -> str:
        return ", ".join(n for n in names if re.search(rf"\b{n}\b", code))

    yield "from __future__ import annotations"
    yield ""
    if "@dataclass" in body:
        yield "from dataclasses import dataclass"
        yield ""
    yield "from llmkit.architecture.architecture import Architecture, Dims"
    if keys := used(_KEYS):
        yield f"from llmkit.architecture.keys import {keys}"
    line = f"from llmkit.architecture.kinds import {used(_KINDS)}"
    if len(line) > _WIDTH:
        yield "from llmkit.architecture.kinds import ("
        yield from (f"    {name}," for name in used(_KINDS).split(", "))
        line = ")"
    yield line
    yield f"from llmkit.architecture.names import {used(_NAMES)}"


def _own_kind(draft: Draft) -> Iterator[str]:
    if not draft.extra:
        return
    base = "Block" if draft.is_plain else "Kind"
    yield ""
    yield "@dataclass(frozen=True)"
    yield f"class DraftedBlock({base}):"
    if draft.is_plain:
        yield '    """check: these weights are named and shaped, and nothing is computed with them."""'
    else:
        yield '    """check: weights are named and shaped; it needs a torch_reader (llmkit/architecture/kind.py)."""'
    yield ""
    yield "    def slots(self) -> dict[str, SlotShape]:"
    yield "        return {"
    if draft.is_plain:
        yield "            **super().slots(),"
    for leaf, (formulas, sort) in draft.extra.items():
        shape = ", ".join(f'"{f}"' for f in formulas) + ("," if len(formulas) == 1 else "")
        yield f'            "{leaf}": SlotShape(({shape}), "{sort}"),'
    yield "        }"
    yield ""


def _architecture(draft: Draft, name: str) -> Iterator[str]:
    config = draft.config.values
    stated = config.get("architectures")
    matches = [str(a) for a in stated] if isinstance(stated, list) else []
    model_type = config.get("model_type")
    yield ""
    yield "ARCHITECTURE = Architecture("
    yield f"    name={_quoted(name)},"
    yield f"    matches=({''.join(f'{_quoted(m)}, ' for m in matches).rstrip(' ')}),"
    yield "    releases=(),  # check: the published models that it describes, as people know them"
    if model_type:
        yield f"    model_types=({_quoted(str(model_type))},),"
    yield "    dims=Dims("
    yield from _assigned(draft.dims, 8)
    yield "    ),"
    if draft.embedding:
        yield from _broken(f"    embedding=Embedding({', '.join(draft.embedding)}),")
    if draft.is_plain:
        yield f"    block={'DraftedBlock' if draft.extra else 'Block'}("
        order: list[str] = ["norm", "attention", "position", "mlp", "residual"]
        fields = {k: draft.parts[k] for k in order if k in draft.parts}
        yield from _assigned(fields, 8)
        yield "    ),"
    else:
        yield "    block=DraftedBlock(),"
    if "final_norm" in draft.parts:
        yield from _assigned({"final_norm": draft.parts["final_norm"]}, 4)
    yield f"    head=Head({', '.join(draft.head)}),"
    yield "    names=Names("
    for slot, default in (("embed", ""), ("final_norm", "final_norm"), ("head", "lm_head")):
        yield f"        {slot}={_quoted(draft.outer.get(slot, default))},"
    yield f"        block={_quoted(draft.layout.block)},"
    yield "        slots={"
    for slot, line in draft.slots.items():
        yield from _commented(f"            {_quoted(slot)}: {line.code},", line)
    yield "        },"
    outer = {k: v for k, v in draft.outer.items() if k not in ("embed", "final_norm", "head")}
    if outer:
        yield from _broken(f"        outer={{{', '.join(f'{_quoted(k)}: {_quoted(v)}' for k, v in outer.items())}}},")
    if draft.layout.ignored:
        yield from _broken(f"        ignored=({''.join(f'{_quoted(p)}, ' for p in draft.layout.ignored).rstrip(' ')}),")
    yield "    ),"
    yield "    tiny={"
    for key, value in _tiny(draft).items():
        yield from _broken(f"        {_quoted(key)}: {_value(value)},")
    yield "    },"
    yield ")"


def _assigned(lines: Mapping[str, Line], indent: int) -> Iterator[str]:
    for key, line in lines.items():
        yield from _commented(f"{' ' * indent}{key}={line.code},", line)


def _commented(text: str, line: Line) -> Iterator[str]:
    """The line with its comment behind it, or above it where both are too long."""
    comment = f"  # check: {line.check}" if line.check else ""
    if len(text + comment) > _WIDTH:
        yield text[: len(text) - len(text.lstrip())] + comment.strip()
        comment = ""
    yield from _broken(text + comment)


def _broken(text: str) -> Iterator[str]:
    """The line, or where it is too long one line for each thing in its outermost brackets."""
    opened = min((i for i in map(text.find, "({[") if i >= 0), default=-1)
    if len(text) <= _WIDTH or opened < 0:
        yield text
        return
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    closed = max(map(text.rfind, ")}]"))
    yield text[: opened + 1]
    depth, start = 0, opened + 1
    for i in range(opened + 1, closed + 1):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(text[i], 0)
        if i == closed or (text[i] == "," and depth == 0):
            if piece := text[start:i].strip():
                yield from _broken(f"{indent}{piece},")
            start = i + 1
    yield indent[:-4] + text[closed:]


def _value(value: Any) -> str:
    """A literal with double quotes."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(_value(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_value(k)}: {_value(v)}' for k, v in value.items())}}}"
    return repr(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tiny(draft: Draft) -> dict[str, Any]:
    """The config with the sizes of a model that is built in milliseconds."""
    sizes = draft.sizes
    heads = 4 if sizes["heads"] > 1 else 1
    kv = heads if sizes["kv_heads"] == sizes["heads"] else 1 if sizes["kv_heads"] == 1 else 2
    head_dim = 16
    small: dict[str, int] = {
        "hidden": heads * head_dim if heads > 1 else 64, "layers": 2, "heads": heads, "kv_heads": kv,
        "head_dim": head_dim, "ffn": 96, "vocab": 128, "context": 64, "rotary_dim": 8,
    }  # fmt: skip
    by_key = {key: small[name] for name, key in draft.config.used.items() if name in small}
    found: dict[str, Any] = {}
    for key, value in draft.config.values.items():
        if key in by_key:
            found[key] = by_key[key]
        elif key in ("architectures", "model_type") or key in draft.config.used.values():
            found[key] = value
        elif key in draft.config.unexplained() and isinstance(value, bool | int | float | str):
            found[key] = _scaled(key, value, sizes, small)
    return found


def _scaled(key: str, value: Any, sizes: Mapping[str, int], small: Mapping[str, int]) -> Any:
    """A key that the draft does not use but that repeats a size: it must stay the same size."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        return value
    words = {"layers": ("layer",), "head_dim": ("head", "channel"), "kv_heads": ("kv", "group"),
             "hidden": ("embed", "hidden", "dim"), "ffn": ("ffn", "inter"), "heads": ("head",),
             "context": ("length", "position")}  # fmt: skip
    for name, parts in words.items():
        if value == sizes.get(name) and any(p in key for p in parts):
            return small[name]
    return value
