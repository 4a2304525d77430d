"""The sizes that shapes show, and the config key of each."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.drafting.record import Draft, Line
from llmkit.drafting.sizes import Config

__all__ = ["find_sizes", "is_attention_decoder", "rows_of"]


def find_sizes(draft: Draft, inner: Mapping[str, str]) -> None:
    """Sizes from shapes, and the config key of each."""
    shapes = {slot: draft.layout.inner[stem] for stem, slot in inner.items()}
    config, sizes = draft.config, draft.sizes
    hidden = sizes["hidden"]
    sizes["layers"] = draft.layout.n_layers
    heads_key = config.find("heads")
    heads = config.values[heads_key] if heads_key is not None else None
    sizes["heads"] = int(heads) if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else 1
    if heads_key is None and is_attention_decoder(inner):
        draft.remarks.append("the number of heads: config.json states none under a name that is known")
    down = shapes.get("mlp.down", {}).get("weight")
    if down is not None and len(down) == 2:
        sizes["ffn"] = down[1] if down[0] == hidden else down[0]
    else:
        sizes["ffn"] = _guessed_ffn(draft)
    sizes["head_dim"], sizes["kv_heads"] = _head_sizes(draft, shapes)
    for name in ("hidden", "layers", "vocab"):
        draft.dims[name] = _dim(config, name, sizes[name])
    draft.dims["heads"] = Line(f'"{heads_key}"') if heads_key else Line("Key((), 1)", "the number of heads")
    draft.dims["ffn"] = _ffn(draft)
    if sizes["kv_heads"] != sizes["heads"] or any(k in config.values for k in ("num_key_value_heads",)):
        key = config.find("kv_heads", sizes["kv_heads"])
        draft.dims["kv_heads"] = (
            Line(f'Key("{key}", None)') if key else Line(f"Key((), {sizes['kv_heads']})", "no key holds this number")
        )
    if sizes["head_dim"] != hidden // sizes["heads"] or "head_dim" in config.values:
        key = config.find("head_dim", sizes["head_dim"])
        draft.dims["head_dim"] = (
            Line(f'Key("{key}", None)') if key else Line(f"Key((), {sizes['head_dim']})", "no key holds this number")
        )
    context = config.find("context")
    if context:
        draft.dims["context"] = Line(f'Key("{context}", None)')
        if isinstance(config.values[context], int):
            sizes["context"] = config.values[context]


def _dim(config: Config, name: str, value: int) -> Line:
    key = config.find(name, value)
    return Line(f'"{key}"') if key else Line(f"Key((), {value})", f"no key of config.json is {value}")


def _ffn(draft: Draft) -> Line:
    ffn, hidden = draft.sizes["ffn"], draft.sizes["hidden"]
    key = draft.config.find("ffn", ffn)
    if key:
        return Line(f'"{key}"')
    if ffn % hidden == 0 and "hidden" in draft.config.used:
        return Line(f'Computed(lambda config: {ffn // hidden} * config["{draft.config.used["hidden"]}"])')
    return Line(f"Key((), {ffn})", f"no key of config.json is {ffn}")


def _guessed_ffn(draft: Draft) -> int:
    """The width that a matrix of the block has besides the hidden one; for blocks that no word fits."""
    hidden = draft.sizes["hidden"]
    widths = [n for leaves in draft.layout.inner.values() for shape in leaves.values() for n in shape if n > hidden]
    return max(set(widths), key=widths.count) if widths else hidden


def _head_sizes(draft: Draft, shapes: Mapping[str, dict[str, tuple[int, ...]]]) -> tuple[int, int]:
    """(head_dim, key/value heads) from the rows of q, k and v, together or apart."""
    hidden, heads = draft.sizes["hidden"], draft.sizes["heads"]
    head_dim = max(hidden // heads, 1)
    if "attn.q" in shapes:
        out = rows_of(shapes["attn.q"]["weight"], hidden)
        head_dim = max(out // heads, 1)
        k = shapes.get("attn.k", {}).get("weight")
        return head_dim, max((rows_of(k, hidden) if k else out) // head_dim, 1)
    if "attn.qkv" in shapes:
        rows = rows_of(shapes["attn.qkv"]["weight"], hidden)
        o = shapes.get("attn.o", {}).get("weight")
        if o is not None and len(o) == 2:
            inside = o[1] if o[0] == hidden else o[0]
            head_dim = max(inside // heads, 1)
        return head_dim, max((rows // head_dim - heads) // 2, 1)
    return head_dim, heads


def rows_of(shape: tuple[int, ...], hidden: int) -> int:
    """Rows of a matrix [out, hidden], or the columns of one stored as [hidden, out]."""
    return shape[0] if shape[-1] == hidden else shape[-1]


def is_attention_decoder(inner: Mapping[str, str]) -> bool:
    """Whether the slots of a block are those of attention and an MLP."""
    slots = set(inner.values())
    has_attention = ({"attn.q", "attn.k", "attn.v"} <= slots or "attn.qkv" in slots) and "attn.o" in slots
    has_mlp = "mlp.down" in slots and bool({"mlp.up", "mlp.gate_up"} & slots)
    return has_attention and has_mlp
