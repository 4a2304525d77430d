"""Which slot a stem names, by the words that published decoders use."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.drafting.layout import Layout, Tensors

__all__ = ["assign_inner", "assign_outer"]

_NORMS = {
    "attn_norm": ("input_layernorm", "ln_1", "ln1", "attention_norm", "ln_attn", "self_attn_layer_norm", "norm_1",
                  "norm1", "attn_norm", "input_norm", "pre_attention_layernorm"),
    "mlp_norm": ("post_attention_layernorm", "ln_2", "ln2", "ffn_norm", "ln_mlp", "final_layer_norm", "norm_2",
                 "norm2", "mlp_norm", "pre_feedforward_layernorm", "pre_mlp_layernorm"),
    "attn_post_norm": ("post_self_attn_layernorm", "attn_post_norm", "post_attention_norm"),
    "mlp_post_norm": ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp_post_norm", "post_mlp_norm"),
}  # fmt: skip
_ATTENTION = {
    "attn.q": ("q_proj", "query", "wq", "q", "q_lin", "to_q"),
    "attn.k": ("k_proj", "key", "wk", "k", "k_lin", "to_k"),
    "attn.v": ("v_proj", "value", "wv", "v", "v_lin", "to_v"),
    "attn.o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out", "out_lin", "to_out", "proj", "output"),
    "attn.qkv": ("query_key_value", "qkv_proj", "w_pack", "c_attn", "qkv", "wqkv", "in_proj", "attn"),
    "attn.q_norm": ("q_norm", "q_layernorm", "query_norm", "q_ln"),
    "attn.k_norm": ("k_norm", "k_layernorm", "key_norm", "k_ln"),
}
_MLP = {
    "mlp.gate": ("gate_proj", "w1", "gate", "w_gate", "linear_gate"),
    "mlp.up": ("up_proj", "w3", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "up", "w_up", "linear_in", "wi"),
    "mlp.down": ("down_proj", "w2", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "down", "w_down", "linear_out", "wo"),
    "mlp.gate_up": ("gate_up_proj", "gate_up", "up_gate_proj", "gate_and_up"),
}
_OUTER = {
    "embed": ("embed_tokens", "word_embeddings", "wte", "embed_in", "embeddings", "tok_embeddings", "token_embedding",
              "embed", "emb", "tok_emb", "token"),
    "positions": ("wpe", "embed_positions", "position_embeddings", "pos_emb", "position_embedding"),
    "head": ("lm_head", "embed_out", "output_layer", "output", "head"),
    "final_norm": ("norm", "ln_f", "final_layernorm", "final_layer_norm", "ln_out", "final_norm", "norm_f",
                   "out_norm"),
    "embed_norm": ("word_embeddings_layernorm", "embed_norm", "embedding_norm", "pre_ln", "ln0", "emb_norm"),
    "embed_proj": ("project_in",),
    "head_proj": ("project_out",),
}  # fmt: skip


def assign_inner(tensors: Tensors) -> dict[str, str]:
    """Stem in a block -> slot; what no word fits is left out."""
    found: dict[str, str] = {}
    lasts = {stem.rpartition(".")[2].lower() for stem in tensors}
    for stem, leaves in tensors.items():
        slot = _inner_slot(stem, leaves, lasts)
        if slot is not None and slot not in found.values():
            found[stem] = slot
    return found


def _inner_slot(stem: str, leaves: Mapping[str, tuple[int, ...]], lasts: set[str]) -> str | None:
    *parents, last = stem.lower().split(".")
    is_vector = all(len(shape) <= 1 for shape in leaves.values())
    if is_vector and not parents:
        if last == "post_attention_layernorm" and lasts & {"pre_feedforward_layernorm", "pre_mlp_layernorm"}:
            return "attn_post_norm"
        return _lookup(_NORMS, last)
    if any("attn" in p or "attention" in p for p in parents):
        return _lookup(_ATTENTION, last)
    if any(p in ("mlp", "ffn", "feed_forward", "ff", "feedforward") for p in parents):
        if last == "w1" and "w3" not in lasts:
            return "mlp.up"
        return _lookup(_MLP, last)
    if not parents:
        return _lookup({k: v for k, v in _MLP.items() if k != "mlp.gate_up"}, last) or _lookup(_ATTENTION, last)
    return None


def assign_outer(layout: Layout) -> dict[str, str]:
    """Stem outside the blocks -> slot; the embedding is the widest table where no word fits."""
    found: dict[str, str] = {}
    names = list(layout.outer)
    for slot in _OUTER:
        for stem in names:
            if stem not in found and stem.lower().rpartition(".")[2] in _OUTER[slot]:
                found[stem] = slot
                break
    for stem in layout.first_only:
        if _lookup(_OUTER, stem.lower().rpartition(".")[2]) == "embed_norm":
            found[layout.block.format(i=0) + stem] = "embed_norm"
    tables = [s for s in names if s not in found and len(layout.outer[s].get("weight", ())) == 2]
    if "embed" not in found.values() and tables:
        found[max(tables, key=lambda s: layout.outer[s]["weight"][0])] = "embed"
    norms = [s for s in names if s not in found and len(layout.outer[s].get("weight", ())) == 1]
    if "final_norm" not in found.values() and norms:
        found[norms[-1]] = "final_norm"
    return found


def _lookup(table: Mapping[str, tuple[str, ...]], word: str) -> str | None:
    return next((slot for slot, words in table.items() if word in words), None)
