"""OPT (Zhang et al. 2022) and Galactica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GroupedQuery,
    Head,
    Kind,
    LayerNorm,
    LearnedPositions,
    NoNorm,
    NoPositions,
    PlainMLP,
    PostNorm,
    PreNorm,
)
from llmkit.architecture.names import Names

_BIAS = Key("enable_bias", True)
_IS_PRE = Key("do_layer_norm_before", True)
_HIDDEN = Key("hidden_size")
_NORM = LayerNorm(eps=1e-5, affine=Key("layer_norm_elementwise_affine", True))
_OFFSET = 2  # the rows before the first position stood for padding


def _final_norm(config: Mapping[str, Any]) -> Kind:
    """The 350M model has none, nor have tunings of before transformers 4.20.1."""
    has_one = lookup(_IS_PRE, config) and not lookup(Key("_remove_final_layer_norm", False), config)
    return _NORM if has_one else NoNorm()


def _width(config: Mapping[str, Any]) -> str:
    """Embeddings narrower than the hidden states are projected in and out (the 350M model)."""
    hidden = lookup(_HIDDEN, config)
    return "hidden" if lookup(Key("word_embed_proj_dim", hidden), config) == hidden else "embed_width"


ARCHITECTURE = Architecture(
    name="opt",
    releases=("OPT",),
    matches=("OPTForCausalLM", "OPTModel"),
    model_types=("opt",),
    dims=Dims(
        hidden=_HIDDEN,
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn="ffn_dim",
        context="max_position_embeddings",
        extra={
            "embed_width": Computed(lambda config: config.get("word_embed_proj_dim") or lookup(_HIDDEN, config)),
            "position_rows": Computed(lambda config: lookup(Key("max_position_embeddings"), config) + _OFFSET),
        },
    ),
    embedding=Embedding(width=Computed(_width), positions=LearnedPositions(rows="position_rows", offset=_OFFSET)),
    block=Block(
        norm=_NORM,
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=NoPositions(),
        mlp=PlainMLP(Key("activation_function", "relu"), bias=_BIAS),
        residual=Computed(lambda config: PreNorm() if lookup(_IS_PRE, config) else PostNorm()),
    ),
    final_norm=Computed(_final_norm),
    unused=("learned_embeddings",),
    head=Head(tied=Key("tie_word_embeddings", True), width=Computed(_width)),
    names=Names(
        embed="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        block="model.decoder.layers.{i}.",
        slots={
            "attn_norm": "self_attn_layer_norm",
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        outer={
            "positions": "model.decoder.embed_positions",
            "embed_proj": "model.decoder.project_in",
            "head_proj": "model.decoder.project_out",
        },
        ignored=("*decoder.version",),
    ),
    tiny={
        "ffn_dim": 128,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    variants={
        "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "no-final-norm": {"_remove_final_layer_norm": True},
        "galactica": {"enable_bias": False, "activation_function": "gelu"},
        "bare-norms": {"layer_norm_elementwise_affine": False},
        "untied": {"tie_word_embeddings": False},
    },
)
