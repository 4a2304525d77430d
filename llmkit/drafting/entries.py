"""The name table of a draft: which entry each stem gets, and what no slot takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.drafting.dims import rows_of
from llmkit.drafting.record import Draft, Line
from llmkit.errors import listing

__all__ = ["is_gate_up", "name_entries"]

_ORDER = ("attn_norm", "attn.qkv", "attn.q", "attn.k", "attn.v", "attn.q_norm", "attn.k_norm", "attn.o",
          "attn_post_norm", "mlp_norm", "mlp.gate_up", "mlp.gate", "mlp.up", "mlp.down", "mlp_post_norm")  # fmt: skip
_STACKED_WORDS = ("c_attn", "w_pack", "qkv_proj", "wqkv", "in_proj")


def name_entries(draft: Draft, inner: Mapping[str, str]) -> None:
    """The name table: slot -> entry; what no slot takes keeps its stem."""
    tensors = draft.layout.inner
    shapes = {slot: tensors[stem] for stem, slot in inner.items()}
    is_transposed = draft.is_plain and _is_transposed(draft, shapes)
    for stem, leaves in tensors.items():
        slot = inner.get(stem)
        if slot is None or not draft.is_plain:
            slot = slot or stem
            for leaf, shape in leaves.items():
                draft.extra[f"{slot}.{leaf}".rstrip(".")] = _formulas(draft, shape), _sort(slot, leaf, shape)
            draft.slots[slot] = Line(f'"{stem}"')
            continue
        if slot == "mlp.up" and is_gate_up(draft, shapes):
            slot = "mlp.gate_up"
        draft.slots[slot] = _entry(draft, slot, stem, leaves, is_transposed)
    draft.slots = dict(sorted(draft.slots.items(), key=lambda item: _rank(item[0])))
    if draft.extra:
        names = listing(draft.extra, 4)
        what = (
            "tensors that no kind of llmkit has" if draft.is_plain else "a block that is no attention decoder of llmkit"
        )
        draft.special.append(f"{what}: {names}")


def _rank(slot: str) -> int:
    """The place of a slot in the order of the computation; what has none stays behind, as it was stored."""
    return next((i for i, part in enumerate(_ORDER) if slot == part or slot.startswith(part + ".")), len(_ORDER))


def _entry(draft: Draft, slot: str, stem: str, leaves: Mapping[str, Any], is_transposed: bool) -> Line:
    code, check = f'"{stem}"', None
    if slot == "attn.qkv":
        word = stem.lower().rpartition(".")[2]
        is_stacked = word in _STACKED_WORDS or "multi_query_group_num" in draft.config.values
        kv = draft.sizes["kv_heads"]
        layout = "" if is_stacked or kv == 1 else ', layout="per_group"'
        code = f'Fused("{stem}", ("q", "k", "v"){layout})'
        check = 'the order of rows: layout="per_group" (q, k, v of head 0, of head 1, …) or all of q, of k, of v'
    elif slot == "mlp.gate_up":
        code, check = f'Fused("{stem}", ("gate", "up"))', "which half is the gate"
    if is_transposed and len(leaves.get("weight", ())) == 2:
        code = f"Transposed({code})"
        check = check or ("square: stored as [in, out] like the others?" if len(set(leaves["weight"])) == 1 else None)
    return Line(code, check)


def _is_transposed(draft: Draft, shapes: Mapping[str, dict[str, tuple[int, ...]]]) -> bool:
    """Whether matrices are stored as [in, out]: told by those that are not square."""
    down = shapes["mlp.down"]["weight"]
    ffn, hidden = draft.sizes["ffn"], draft.sizes["hidden"]
    return down == (ffn, hidden) and ffn != hidden


def _formulas(draft: Draft, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Each length as a product of dims where it is one."""
    s = draft.sizes
    known = {s["hidden"]: "hidden", s["ffn"]: "ffn", s["vocab"]: "vocab"}
    known.setdefault(s["heads"] * s["head_dim"], "heads*head_dim")
    for k in (2, 3, 4):
        known.setdefault(k * s["hidden"], f"{k}*hidden")
        known.setdefault(k * s["ffn"], f"{k}*ffn")
    if s["heads"] > 1:
        known.setdefault(s["kv_heads"] * s["head_dim"], "kv_heads*head_dim")
        known.setdefault(s["head_dim"], "head_dim")
    return tuple(known.get(n, str(n)) if n > 1 else "1" for n in shape)


def _sort(slot: str, leaf: str, shape: tuple[int, ...]) -> str:
    if leaf == "bias":
        return "bias"
    if "norm" in slot or (len(shape) == 1 and "ln" in slot.split(".")[-1]):
        return "norm"
    return "linear" if leaf == "weight" and len(shape) == 2 else "parameter"


def is_gate_up(draft: Draft, shapes: Mapping[str, dict[str, tuple[int, ...]]]) -> bool:
    """Whether one matrix holds gate and up: it has twice the rows."""
    for slot in ("mlp.gate_up", "mlp.up"):
        if slot in shapes and "mlp.gate" not in shapes:
            shape = shapes[slot]["weight"]
            return len(shape) == 2 and rows_of(shape, draft.sizes["hidden"]) == 2 * draft.sizes["ffn"]
    return False
