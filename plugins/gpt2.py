"""GPT-2 (Radford et al. 2019), Cerebras-GPT, and other models in that layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GroupedQuery,
    Head,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    PerLayer,
    PlainMLP,
)
from llmkit.architecture.names import Fused, Names, Transposed

# Where a config has both names, transformers takes the common one.
HIDDEN = Key(("hidden_size", "n_embd"))
HEADS = Key(("num_attention_heads", "n_head"))

DIMS = Dims(
    hidden=HIDDEN,
    layers=Key(("num_hidden_layers", "n_layer")),
    heads=HEADS,
    kv_heads=DERIVED,
    head_dim=DERIVED,
    ffn=Computed(lambda config: config.get("n_inner") or 4 * lookup(HIDDEN, config)),
    context=Key(("max_position_embeddings", "n_positions", "n_ctx"), 1024),
)
TINY = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None, "layer_norm_epsilon": 1e-5,
    "bos_token_id": 95, "eos_token_id": 95,
}  # fmt: skip
GGUF_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "",
    "feed_forward_length": "n_inner",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


def _block(config: Mapping[str, Any], layer: int) -> Block:
    """Scores may be left unscaled, and divided by the number of the layer."""
    scale = 1.0
    if lookup(Key("scale_attn_weights", True), config):
        scale = (lookup(HIDDEN, config) // lookup(HEADS, config)) ** -0.5
    if lookup(Key("scale_attn_by_inverse_layer_idx", False), config):
        scale /= layer + 1
    return Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(qkv_bias=True, out_bias=True, scale=scale),
        position=NoPositions(),
        mlp=PlainMLP(Key("activation_function", "gelu_new")),
    )


ARCHITECTURE = Architecture(
    name="gpt2",
    releases=("GPT-2", "Cerebras-GPT"),
    matches=("GPT2LMHeadModel", "GPT2Model"),
    model_types=("gpt2",),
    dims=DIMS,
    embedding=Embedding(positions=LearnedPositions()),
    block=PerLayer(_block),
    unused=("reorder_and_upcast_attn",),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm": "ln_1",
            "attn.qkv": Transposed(Fused("attn.c_attn", ("q", "k", "v"))),
            "attn.o": Transposed("attn.c_proj"),
            "mlp_norm": "ln_2",
            "mlp.up": Transposed("mlp.c_fc"),
            "mlp.down": Transposed("mlp.c_proj"),
        },
        outer={"positions": "transformer.wpe"},
        ignored=("*.attn.bias", "*.attn.masked_bias"),
    ),
    gguf=GgufFamily(
        "gpt2",
        slots={"attn.qkv": QKV},
        keys=GGUF_KEYS,
        config={"activation_function": "gelu_new"},
        noted=("activation_function",),
    ),
    tiny={**TINY, "activation_function": "gelu_new"},
    variants={
        # Cerebras-GPT states no `architectures`; its activation is the exact one.
        "cerebras": {"architectures": None, "activation_function": "gelu", "n_inner": 128},
        "narrow-mlp": {"n_inner": 48},
        "by-layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        "unscaled": {"scale_attn_weights": False},
        "untied": {"tie_word_embeddings": False},
    },
)
