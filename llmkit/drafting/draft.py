"""A plugin drafted for a checkpoint that none describes: the plugin that fits it best, with its names and keys.

Names and shapes come from the headers. What is computed with them is what that plugin computes; headers do not show it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pprint import pformat
from textwrap import fill, indent, wrap
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.check import mismatches
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.names import Fused, Names, Transposed, parts_of, stem_of
from llmkit.architecture.registry import Plugin, default_registry
from llmkit.drafting.keys import Config, fields_of
from llmkit.drafting.names import Headers, KnownNames, n_unnamed, names_like, read_headers
from llmkit.errors import InputError, LlmkitError, PluginError, listing
from llmkit.layouts.opening import layouts
from llmkit.tensors.spec import TensorSpec

_NOT_SHOWN = "as {} computes: headers do not show positions, the order of rotary pairs, scales, caps or windows"
# What a plugin's functions of the config raise, given one of another family.
_OF_ANOTHER_FAMILY = (LlmkitError, ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)
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

Names and shapes come from that checkpoint, the computation from {after}. Go through every line marked
`check:`, add variants for what releases of the family vary, and run `llmkit plugins check` on this file.
"""


@dataclass(frozen=True)
class Draft:
    """An architecture made of headers and a config.

    Attributes:
        architecture: what was made.
        plugin, like: the plugin whose computation it has, and that one's architecture.
        checks: path of a field (`block.norm.eps`, `names.slots.attn.qkv`) -> what is not known of it.
        unknown: what speaks for a computation that it does not have, in words.
        unread: keys of config.json that it does not read -> their values.
        problems: what of the checkpoint's names and shapes it does not fit.
        misfits: tensors that do not fit, whether the plugin takes it for another release, keys that the plugin does not
            read, values that it assumes, less the names that are its own: the plugin with the least is taken.
    """

    architecture: Architecture
    plugin: Plugin
    like: Architecture
    checks: Mapping[str, str]
    unknown: tuple[str, ...]
    unread: Mapping[str, Any]
    problems: tuple[str, ...]
    misfits: tuple[int, ...]


def draft_plugin(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], *, name: str, label: str) -> Draft:
    """The architecture of the plugin that fits a checkpoint best, in the checkpoint's names and keys.

    Raises:
        InputError: names without layer numbers, no embedding, or nothing that is like a decoder that a plugin has.
    """
    headers = read_headers(specs, label)
    loaded = {
        p: a for p, a in default_registry().load_all().items() if not isinstance(a, PluginError) and not p.is_given
    }
    # Of equals the one that most others are equivalent to.
    order = sorted(loaded, key=lambda p: -sum(loaded[p].name in a.equivalents for a in loaded.values()))
    tables = KnownNames(
        [*(loaded[p].names for p in order), *(s.names for layout in layouts() for s in layout.spellings)]
    )
    known: dict[str, list[str]] = {}
    for path, _, key in (read for p in order for read in fields_of(loaded[p])):
        if isinstance(key, Key):
            known.setdefault(path.rpartition(".")[2], []).extend(key.spellings)
    named = []
    for rank, plugin in enumerate(order):
        with suppress(*_OF_ANOTHER_FAMILY):
            names = names_like(headers, loaded[plugin], tables)
            named.append((n_unnamed(headers, names), rank, plugin, names))
    best, most = None, (sys.maxsize, 0)  # tensors that do not fit the best, and its rank
    for n_least, rank, plugin, names in sorted(named, key=lambda of: of[:2]):
        if n_least > most[0]:
            break
        with suppress(*_OF_ANOTHER_FAMILY):
            draft = _after(plugin, loaded[plugin], names, Config(config, known), headers, specs, name, most[0])
            if draft and (best is None or (*draft.misfits, rank) < (*best.misfits, most[1])):
                best, most = draft, (draft.misfits[0], rank)
    if best is None:
        raise InputError(f"{label}: no plugin has layers that are like its own", hint="llmkit plugins list shows them")
    return best


def _after(
    plugin: Plugin, like: Architecture, names: Names, config: Config, headers: Headers,
    specs: Mapping[str, TensorSpec], name: str, most: int,
) -> Draft | None:  # fmt: skip
    """The draft with the computation of one plugin; None where more than `most` tensors do not fit it."""
    parts = config.adapted(like, _sizes(headers, names, config.heads(like.dims)))
    stated = config.values.get("model_type")
    classes, types = tuple(map(str, config.values.get("architectures") or ())), tuple(filter(None, [stated]))
    tiny = {config.renamed.get(k, k): v for k, v in like.tiny.items() if k not in ("architectures", "model_type")}
    architecture = Architecture(name, classes, names=names, tiny=tiny, model_types=types, **parts)
    model = architecture.bind(config.values)
    if names.head not in headers.outer and not model.is_tied:
        architecture = replace(architecture, head=replace(architecture.head, tied=True))
        model = architecture.bind(config.values)
    n_wrong = sum(map(len, mismatches(model.tensors(), specs, model.table)))
    if n_wrong > most:
        return None
    report = model.check(specs)
    unknown = [f"tensors that no name table knows: {listing(report.extra, 4)}"] if report.extra else []
    n_own = len(headers.inner.keys() & set(map(stem_of, like.names.slots.values())))
    n_unread = len(replace(architecture, fixed=like.fixed, unused=like.unused).bind(config.values).unread.unknown)
    in_its_words = {**config.values, **{known: config.values.get(key) for known, key in config.renamed.items()}}
    is_other = like.when is not None and not like.when(in_its_words)
    checks = {**config.checks, "block": _NOT_SHOWN.format(like.name)}
    for slot, entry in names.slots.items():
        if parts_of(slot, entry) and stem_of(entry) != stem_of(like.names.slots.get(slot, "")):
            checks[f"names.slots.{slot}"] = 'the order of rows (rows="stacked" or "per_group"), and of its parts'
    return Draft(
        architecture, plugin, like, checks, (*unknown, *model.unread.refused),
        {path: lookup(Key(path, None), config.values) for path in model.unread.unknown}, tuple(report.problems),
        (n_wrong, is_other, n_unread, config.n_assumed, -n_own),
    )  # fmt: skip


def _sizes(headers: Headers, names: Names, heads: int) -> dict[str, int]:
    """Sizes by the shapes."""
    vocab, width = headers.shape(names.embed)
    hidden = (headers.shape(names.final_norm) or (width,))[0]

    def other_side(slot: str) -> int:
        """The length of a matrix [out, in], or one stored [in, out], that is not the hidden one; 0 without one."""
        shape = headers.shape(names.slots.get(slot, "")) or (0, hidden)
        return shape[0] if shape[-1] == hidden else shape[-1]

    head_dim = max((other_side("attn.q") or other_side("attn.o") or hidden) // heads, 1)
    of_kv = other_side("attn.k") // head_dim or (other_side("attn.qkv") // head_dim - heads) // 2
    latent, norm = (headers.shape(names.slots.get(f"attn.{slot}", "")) for slot in ("kv_a", "kv_a_norm"))
    if latent and norm:  # all heads share the key: its head_dim rotated dims stand below what is compressed
        head_dim, of_kv = latent[0] - norm[0], heads
    sizes = {"hidden": hidden, "layers": headers.n_layers, "heads": heads, "vocab": vocab, "head_dim": head_dim}
    sizes |= {"kv_heads": of_kv if of_kv > 0 else heads, "ffn": other_side("mlp.down")}
    return {name: size for name, size in sizes.items() if size}


def plugin_text(draft: Draft, label: str) -> str:
    """The module: what it has of the plugin that it is made after, and what differs."""
    architecture, (module, _, attribute) = draft.architecture, draft.plugin.target.partition(":")
    about = _ABOUT.format(name=architecture.name, label=label, after=draft.like.name)
    items = [*draft.problems, *draft.unknown]
    if draft.unread:
        unread = ", ".join(f"{k} = {v!r:.80}" for k, v in draft.unread.items())
        items.append(f"keys of config.json that nothing reads, and may change what is computed: {unread}")
    if items:
        lines = [fill(f"- {item}", 116, subsequent_indent="  ", break_on_hyphens=False) for item in items]
        about += "\n".join(["", "Not known:", "", *lines, ""])
    body = []
    for field in fields(architecture):
        value, where = getattr(architecture, field.name), f"like.{attribute}.{field.name}"
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
        return "\n".join(["{", *(indent(f"{k!r}: {_code(v, _code, where)},", " " * 4) for k, v in value.items()), "}"])
    return pformat(value, width=100)
