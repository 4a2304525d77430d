"""A plugin drafted from headers and config: names and shapes right by construction, mathematics a guess to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.drafting.dims import find_sizes, is_attention_decoder
from llmkit.drafting.entries import is_gate_up, name_entries
from llmkit.drafting.layout import read_layout
from llmkit.drafting.record import Draft, Line
from llmkit.drafting.sizes import Config
from llmkit.drafting.slots import assign_inner, assign_outer
from llmkit.errors import InputError, listing
from llmkit.tensors.spec import TensorSpec

__all__ = ["make_draft"]

_RESIDUALS = {
    frozenset({"attn_norm", "mlp_norm"}): "PreNorm",
    frozenset({"attn_norm"}): "SharedParallel",
    frozenset({"attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"}): "Sandwich",
}


def make_draft(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], label: str, *, is_plain: bool = True
) -> Draft:
    """Draft an architecture.

    Args:
        is_plain: try a block of the core's kinds; otherwise one of the draft's own, with every tensor named.

    Raises:
        InputError: names without layer numbers, or no embedding.
    """
    layout = read_layout(specs, label)
    draft = Draft(label, Config(config), layout)
    inner, outer = assign_inner(layout.inner), assign_outer(layout)
    _outside(draft, outer)
    find_sizes(draft, inner)
    norm = _norm(draft, inner)
    _positions(draft)
    if is_plain and is_attention_decoder(inner):
        _block(draft, inner, norm)
    else:
        draft.is_plain = False
        draft.parts.setdefault("final_norm", norm)
    name_entries(draft, inner)
    draft.remarks += [f"not the same in all layers: {text}" for text in layout.irregular]
    return draft


def _outside(draft: Draft, outer: Mapping[str, str]) -> None:
    by_slot = {slot: stem for stem, slot in outer.items()}
    tensors = draft.layout.outer
    if "embed" not in by_slot:
        raise InputError(
            f"{draft.label}: no embedding among the tensors outside the layers ({listing(tensors) or 'none'}): "
            "a plugin cannot be drafted from that"
        )
    draft.outer = by_slot
    rows, width = tensors[by_slot["embed"]]["weight"]
    hidden = width
    if "final_norm" in by_slot:
        hidden = next(iter(tensors[by_slot["final_norm"]].values()))[0]
    elif "embed_proj" in by_slot:
        hidden = tensors[by_slot["embed_proj"]]["weight"][0]
    draft.sizes |= {"hidden": hidden, "vocab": rows}
    if width != hidden:
        draft.embedding.append(f'width="{width}"')
        draft.sizes["width"] = width
    stored = tensors.get(by_slot.get("head", ""), {})
    key = draft.config.find("tied")
    default = "head" not in by_slot
    draft.head.append(f'tied=Key("{key}", {default})' if key else f"tied={default}")
    if "bias" in stored:
        draft.head.append("bias=True")
    head_width = stored["weight"][1] if stored else width
    if head_width != hidden:
        draft.head.append(f'width="{head_width}"')
    known = set(by_slot.values())
    rest = [f"{stem}.{leaf}".rstrip(".") for stem in tensors if stem not in known for leaf in tensors[stem]]
    if rest:
        draft.special.append(f"tensors outside the layers that no slot takes: {listing(rest)}")


def _norm(draft: Draft, inner: Mapping[str, str]) -> Line:
    key = draft.config.find("eps")
    eps = f'Key("{key}")' if key else "1e-5"
    check = None if key else "config.json has no eps"
    if "final_norm" in draft.outer:
        has_bias = "bias" in draft.layout.outer[draft.outer["final_norm"]]
    else:
        has_bias = any("bias" in draft.layout.inner[s] for s, slot in inner.items() if slot == "attn_norm")
        draft.parts["final_norm"] = Line("NoNorm()", "no norm before the head")
    if not has_bias:
        check = f"{f'{check}; ' if check else ''}offset=1.0 where files store weight - 1; LayerNorm(…, bias=False)?"
    line = Line(f"LayerNorm(eps={eps})" if has_bias else f"RMSNorm(eps={eps})", check)
    if "embed_norm" in draft.outer:
        draft.embedding.append(f"norm={line.code}")
    draft.parts["norm"] = line
    mixed = [
        stem
        for stem, slot in inner.items()
        if slot.endswith("_norm") and "attn." not in slot and ("bias" in draft.layout.inner[stem]) != has_bias
    ]
    if mixed:
        draft.special.append(f"norms with and without bias: {listing(mixed)}")
    return line


def _positions(draft: Draft) -> None:
    config = draft.config
    if "positions" in draft.outer:
        rows = draft.layout.outer[draft.outer["positions"]]["weight"][0]
        context = draft.sizes.get("context")
        if context is not None and 0 <= rows - context <= 16:
            offset = rows - context
            rows_text = f'rows="{rows}", ' if offset else ""
            more = f"{rows_text}offset={offset}" if offset else ""
        else:
            more = f'rows="{rows}"'
        draft.embedding.append(f"positions=LearnedPositions({more})")
        draft.parts["position"] = Line("NoPositions()")
        return
    if config.has("alibi"):
        draft.parts["position"] = Line("Alibi()")
        return
    fields = []
    for name in ("rope_scaling", "rope_parameters"):  # `Rope` reads them by itself
        if config.values.get(name):
            config.used[name] = name
    theta = config.find("theta")
    if theta and theta != "rope_theta":
        fields.append(f'theta=Key("{theta}", 10000.0)')
    share = config.find("share")
    dims = config.find("rotary_dim")
    if share:
        fields.append(f'share=Key("{share}", 1.0)')
    elif dims and isinstance(config.values[dims], int):
        fields.append(f'share=Computed(lambda config: config["{dims}"] / {draft.sizes["head_dim"]})')
    is_said = theta or share or dims or config.has("rope", "rotary")
    check = (
        'pairs="interleaved" where neighbouring dims turn together'
        if is_said
        else "config.json does not say how positions are told: Rope(), Alibi() or NoPositions()"
    )
    draft.parts["position"] = Line(f"Rope({', '.join(fields)})", check)


def _block(draft: Draft, inner: Mapping[str, str], norm: Line) -> None:
    shapes = {slot: draft.layout.inner[stem] for stem, slot in inner.items()}
    norms = frozenset(s for s in shapes if s.endswith("_norm") and "." not in s)
    residual = _RESIDUALS.get(norms)
    if residual is None:
        draft.is_plain = False
        draft.parts.setdefault("final_norm", norm)
        draft.special.append(f"a block with the norms {listing(sorted(norms)) or '(none)'}")
        return
    is_parallel = draft.config.has("parallel")
    if residual == "PreNorm" and is_parallel:
        residual = "Parallel"
    check = {
        "PreNorm": "PostNorm() where the norms come after the sums",
        "SharedParallel": "one norm for attention and MLP",
    }.get(residual)
    draft.parts["residual"] = Line(f"{residual}()", check)
    fields = []
    first = shapes.get("attn.qkv") or shapes["attn.q"]
    fields += _bias(draft, "qkv_bias", "bias" in first)
    fields += _bias(draft, "out_bias", "bias" in shapes["attn.o"])
    if "attn.q_norm" in shapes and "attn.k_norm" in shapes:
        width = shapes["attn.q_norm"]["weight"]
        if width == (draft.sizes["head_dim"],):
            fields.append(f"qk_norm={norm.code[:-1]}, width={chr(34)}head_dim{chr(34)})")
        else:
            draft.special.append(f"norms of queries and keys of width {list(width)}, not one head")
    draft.parts["attention"] = Line(f"GroupedQuery({', '.join(fields)})")
    act = draft.config.find("act")
    is_gated = "mlp.gate" in shapes or is_gate_up(draft, shapes)
    default = "silu" if is_gated else "gelu"
    value = f'Key("{act}")' if act else f'"{default}"'
    kind = "GatedMLP" if is_gated else "PlainMLP"
    code = f"{kind}({', '.join([value, *_bias(draft, 'bias', 'bias' in shapes['mlp.down'], default=not is_gated)])})"
    draft.parts["mlp"] = Line(code, None if act else "config.json names no activation")


def _bias(draft: Draft, name: str, has_bias: bool, *, default: bool = False) -> list[str]:
    """The field for a bias: from a key of config.json that says the same, else as it is."""
    words = {"qkv_bias": ("attention_bias", "use_qkv_bias", "add_qkv_bias", "qkv_bias"),
             "out_bias": ("attention_bias",), "bias": ("mlp_bias",)}[name]  # fmt: skip
    key = next((k for k in words if draft.config.values.get(k) is has_bias), None)
    if key is not None:
        draft.config.used[name] = key
        return [f'{name}=Key("{key}", {has_bias})']
    return [] if has_bias == default else [f"{name}={has_bias}"]
