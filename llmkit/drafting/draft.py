"""A plugin drafted for a checkpoint that none describes: the architecture of the plugin that fits it best, renamed.

Names and shapes come from the headers. What is computed with them is what the plugin computes; headers do not show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.keys import Computed, Key, as_key, lookup
from llmkit.architecture.names import Names, NameTable, stem_of
from llmkit.drafting.headers import Headers, read_headers
from llmkit.drafting.keys import Keys
from llmkit.drafting.known import Known, known_plugins, likeness, without_computed
from llmkit.drafting.slots import names_like, other_side
from llmkit.errors import InputError, LlmkitError, listing
from llmkit.tensors.spec import TensorSpec

__all__ = ["Draft", "draft_plugin"]

_NOT_SHOWN = "headers do not show positions, the order of rotary pairs, scales, caps or windows"
# Flags of biases, which the headers show: field -> the slots that have the bias.
_BIASES = {"attention.qkv_bias": ("attn.q", "attn.qkv"), "attention.out_bias": ("attn.o",), "mlp.bias": ("mlp.down",)}


@dataclass(frozen=True)
class Draft:
    """An architecture made of headers and a config.

    Attributes:
        architecture: what was made.
        after: the name of the plugin whose computation it has.
        checks: path of a field (`block.norm.eps`, `names.slots.attn.qkv`) -> what is not known of it.
        unknown: what speaks for a computation that it does not have, in words.
        unread: keys of config.json that it does not read -> their values.
        problems: what of the checkpoint's names and shapes it does not fit.
        unlikeness: tensors that do not fit, whether the plugin takes it for another release, keys that the plugin does
            not read, values that it assumes, less the names that are its own: the plugin with the least is taken.
    """

    architecture: Architecture
    after: str
    checks: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    unread: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unlikeness: tuple[int, ...] = ()


def draft_plugin(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], *, name: str, label: str) -> Draft:
    """The architecture of the plugin that fits a checkpoint best, in the checkpoint's names and keys.

    Raises:
        InputError: names without layer numbers, no embedding, or nothing that is like a decoder that a plugin has.
    """
    headers, known = read_headers(specs, label), known_plugins()
    if not any(len(leaves.get("weight", ())) == 2 for leaves in headers.outer.values()):
        raise InputError(
            f"{label}: no embedding among the tensors outside the layers ({listing(headers.outer) or 'none'}): "
            "a plugin cannot be drafted from that"
        )
    made = []
    for i, architecture in enumerate(known.architectures):
        try:
            made.append((_after(architecture, known, headers, specs, config, name), i))
        except (LlmkitError, ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue  # the plugin's functions of the config, given one of another family
    if not made:
        raise InputError(f"{label}: no plugin has layers that are like its own", hint="llmkit plugins list shows them")
    return min(made, key=lambda pair: (pair[0].unlikeness, pair[1]))[0]


def _after(
    like: Architecture, known: Known, headers: Headers, specs: Mapping[str, TensorSpec], config: Mapping[str, Any],
    name: str,
) -> Draft:  # fmt: skip
    """The draft with the computation of one plugin."""
    names, unsure = names_like(headers, known, like)
    keys = Keys(config, known.keys)
    sizes = _sizes(headers, names, keys)
    dims = _dims(sizes, keys)
    stated = {**config, **{_first_spelling(like, size): value for size, value in sizes.items()}}
    extra = {k: _constant(size, stated) for k, size in like.dims.extra.items()}
    parts: dict[str, Any] = {}
    for part in ("embedding", "block", "final_norm", "head"):
        parts[part] = keys.in_kind(without_computed(getattr(like, part), stated), part, like.tiny)
    architecture = Architecture(
        name=name,
        matches=tuple(str(a) for a in config.get("architectures") or ()),
        model_types=(config["model_type"],) if isinstance(config.get("model_type"), str) else (),
        dims=replace(dims, extra=extra),
        names=names,
        tiny=_tiny(config, sizes, keys),
        **parts,
    )
    architecture, absent = _completed(_as_stored(architecture, headers, config), config, like.names)
    model = architecture.bind(config)
    report = model.check(specs)
    checks = keys.checks | {f"names.slots.{slot}": why for slot, why in (unsure | absent).items()}
    checks["block"] = f"as {like.name} computes: {_NOT_SHOWN}"
    unknown = [f"tensors that no name table knows: {listing(report.extra, 4)}"] if report.extra else []
    if len({*map(repr, like.bind({**like.tiny}).blocks)}) > 1:
        unknown.append(f"layers of {like.name} are not all alike; the draft has its first for all")
    unknown += model.unread.refused
    unread = {path: lookup(Key(path, None), config) for path in model.unread.unknown}
    n_wrong = len(report.missing) + len(report.extra) + len(report.misshapen)
    n_own = sum(likeness(stem_of(e), stem_of(like.names.slots.get(slot, ""))) >= 3 for slot, e in names.slots.items())
    is_other = like.when is not None and not like.when(stated)
    unlikeness = (n_wrong, is_other, len(like.bind(stated).unread.unknown), keys.n_assumed, -n_own)
    return Draft(architecture, like.name, checks, tuple(unknown), unread, tuple(report.problems), unlikeness)


def _completed(made: Architecture, config: Mapping[str, Any], own: Names) -> tuple[Architecture, dict[str, str]]:
    """The architecture with the plugin's own names for weights that no tensor is like, and which they are."""
    table, absent = NameTable(made.names), {}
    for leaf in made.bind(config).block.slots():
        slot = table.stored_in(leaf)[0].rpartition(".")[0]
        if slot not in made.names.slots:
            absent[slot] = own.slots.get(slot, slot)
    names = replace(made.names, slots={**made.names.slots, **absent})
    return replace(made, names=names), dict.fromkeys(absent, "no tensor is like it")


def _first_spelling(like: Architecture, size: str) -> str:
    key = as_key(getattr(like.dims, size))
    return str(next(iter(key.spellings), size)) if isinstance(key, Key) else size


def _constant(size: str | Key | Computed, config: Mapping[str, Any]) -> Any:
    return Key((), size.of(config)) if isinstance(size, Computed) else size


def _sizes(headers: Headers, names: Names, keys: Keys) -> dict[str, int]:
    """Sizes by the shapes; the number of heads, which no shape tells, by the config."""
    found = {slot: headers.inner.get(stem_of(entry), {}).get("weight", ()) for slot, entry in names.slots.items()}
    shapes = {slot: shape for slot, shape in found.items() if shape}
    vocab, width = headers.outer[names.embed]["weight"]
    norm = list(headers.outer.get(names.final_norm, {}).values())
    hidden = norm[0][0] if norm else width
    heads_key = keys.of_size("heads", None)
    heads = int(keys.config[heads_key.spellings[0]]) if heads_key.spellings else 1
    heads_wide = shapes.get("attn.q") or shapes.get("attn.o")  # heads * head_dim beside the hidden size
    head_dim = max(other_side(heads_wide, hidden) // heads, 1) if heads_wide else hidden // heads
    kv_heads = heads
    if "attn.k" in shapes:
        kv_heads = other_side(shapes["attn.k"], hidden) // head_dim
    elif "attn.qkv" in shapes:
        kv_heads = (other_side(shapes["attn.qkv"], hidden) // head_dim - heads) // 2
    ffn = other_side(shapes["mlp.down"], hidden) if "mlp.down" in shapes else hidden
    sizes = {"hidden": hidden, "layers": headers.n_layers, "heads": heads, "ffn": ffn, "vocab": vocab}
    return sizes | {"head_dim": head_dim, "kv_heads": max(kv_heads, 1)}


def _dims(sizes: dict[str, int], keys: Keys) -> Dims:
    """The key of each size; `sizes` gets the context."""
    found: dict[str, Any] = {name: keys.of_size(name, sizes[name]) for name in ("hidden", "layers", "ffn", "vocab")}
    heads = keys.used.get("heads")
    found["heads"] = Key(heads) if heads else Key((), sizes["heads"])
    if heads is None:
        keys.checks["dims.heads"] = "no key of config.json is like one for the number of heads"
    for name, usual in (("kv_heads", sizes["heads"]), ("head_dim", sizes["hidden"] // sizes["heads"])):
        key = keys.of_size(name, sizes[name], least=0.5)
        if key.spellings:
            found[name] = replace(key, default=None)
        elif sizes[name] != usual:
            found[name] = key
        else:
            keys.checks.pop(f"dims.{name}")
            found[name] = Key((), None)
    context = keys.of_size("context", None)
    if context.spellings:
        sizes["context"] = keys.config[context.spellings[0]]
    return Dims(**found, context=replace(context, default=None))


def _as_stored(made: Architecture, headers: Headers, config: Mapping[str, Any]) -> Architecture:
    """The architecture with the biases and the head that the headers show, where its flags say otherwise."""
    bound, block = made.bind(config), made.block
    for path, slots in _BIASES.items():
        part, flag = path.split(".")
        stored = [headers.inner.get(stem_of(e), {}) for s, e in made.names.slots.items() if s in slots]
        kind = getattr(bound.block, part, None)
        if stored and hasattr(kind, flag) and getattr(kind, flag) != ("bias" in stored[0]):
            changed = replace(getattr(block, part), **{flag: "bias" in stored[0]})
            block = replace(block, **{part: changed})
    has_head = made.names.head in headers.outer
    head = replace(made.head, tied=True) if not has_head and not bound.is_tied else made.head
    return replace(made, block=block, head=head)


def _tiny(config: Mapping[str, Any], sizes: Mapping[str, int], keys: Keys) -> dict[str, Any]:
    """The config with the sizes of a model that is built in milliseconds; lists of lengths for each layer go."""
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if "heads" in keys.used and ("kv_heads" in keys.used or kv_heads in (1, heads)):
        heads, kv_heads = 4, 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    small = {"hidden": 16 * heads, "layers": 2, "heads": heads, "kv_heads": kv_heads, "head_dim": 16, "ffn": 96,
             "vocab": 128, "context": 64}  # fmt: skip
    by_key = {key: small[size] for size, key in keys.used.items() if size in small}
    kept = {k: v for k, v in config.items() if k == "architectures" or isinstance(v, bool | int | float | str | dict)}
    return {key: by_key.get(key, value) for key, value in kept.items()}
