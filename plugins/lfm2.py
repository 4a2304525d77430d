"""LFM2: gated short convolutions, and attention in a few layers (Liquid AI 2025)."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.gguf import GgufFamily, Metadata, heads_of_layers, needs_both_sorts
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, NoPositions, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import layer_type
from llmkit.architecture.mamba import ShortConvolution
from llmkit.architecture.names import Names, linears
from llmkit.architecture.positions import THETA_KEYS

_NORM = RMSNorm(eps=Key("norm_eps", 1e-5))
_SORTS = ("conv", "full_attention")


def _ffn(config: Mapping[str, Any]) -> int:
    """`block_ff_dim` of the original's configs wins; it is cut to two thirds, and rounded up."""
    width = config.get("block_ff_dim") or config.get("intermediate_size", 12288)
    if not config.get("block_auto_adjust_ff_dim", True):
        return int(width)
    width, factor = int(2 * width / 3), config.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width
    multiple = config.get("block_multiple_of", 256)
    return int(multiple * ((int(factor * width) + multiple - 1) // multiple))


def block(config: Mapping[str, Any], i: int) -> Block:
    """Layer `i`."""
    places = config.get("full_attn_idxs")
    is_attention = layer_type(config, i, _SORTS, lambda i: _SORTS[places is None or i in places]) != "conv"
    return Block(
        norm=_NORM,
        attention=GroupedQuery(qk_norm=RMSNorm(eps=Key("norm_eps", 1e-5), width="head_dim"))
        if is_attention
        else ShortConvolution(bias=Key("conv_bias", False)),
        position=Rope(theta=Key(THETA_KEYS, 1000000.0)) if is_attention else NoPositions(),
        mlp=GatedMLP("silu"),
    )


def _read(metadata: Metadata) -> dict[str, Any]:
    """Which layers have attention: those with key heads."""
    heads = metadata["attention.head_count_kv"]
    return {"layer_types": [_SORTS[n > 0] for n in heads], "num_key_value_heads": max(heads)}


_TINY = {
    "num_key_value_heads": 2, "intermediate_size": 48, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3,
    "conv_bias": False, "norm_eps": 1e-5, "layer_types": ["conv", "full_attention"], "rope_theta": 1000000.0,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip

_ADJUSTED = {
    "block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.5, "layer_types": None,
    "full_attn_idxs": [0], "rope_theta": None,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="lfm2",
    releases=("LFM2-350M, 700M, 1.2B, 2.6B",),
    matches=("Lfm2ForCausalLM",),
    model_types=("lfm2",),
    dims=Dims(
        hidden=Key("hidden_size", 2560),
        layers=Key("num_hidden_layers", 32),
        heads=Key("num_attention_heads", 32),
        kv_heads=Key("num_key_value_heads", 8),
        ffn=Computed(_ffn),
        vocab=Key("vocab_size", 65536),
        extra={"kernel": Key("conv_L_cache", 3)},
    ),
    block=PerLayer(block),
    final_norm=_NORM,
    unused=("block_*", "conv_*", "full_attn_idxs", "intermediate_size", "num_heads", "use_pos_enc", "theta"),
    head=Head(tied=Key(("tie_embedding", "tie_word_embeddings"), True)),
    gguf=GgufFamily(
        "lfm2",
        slots={"attn.in": "shortconv.in_proj", "attn.conv": "shortconv.conv", "attn.out": "shortconv.out_proj"},
        outer={"final_norm": "token_embd_norm"},
        keys={
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "attention.head_count_kv": "",
            "shortconv.l_cache": "conv_L_cache",
        },
        config={"block_auto_adjust_ff_dim": False},
        read=_read,
        write=lambda model, _: {
            "attention.head_count_kv": heads_of_layers(model),
            "shortconv.l_cache": model.dims.evaluate("kernel"),
        },
        refuses=needs_both_sorts,
    ),
    names=Names(
        embed="model.embed_tokens",
        final_norm="model.embedding_norm",
        head="lm_head",
        block="model.layers.{i}.",
        slots={
            "attn_norm": "operator_norm",
            **linears("attn", "self_attn", "qkv"),
            "attn.o": "self_attn.out_proj",
            "attn.q_norm": "self_attn.q_layernorm",
            "attn.k_norm": "self_attn.k_layernorm",
            "attn.in": "conv.in_proj",
            "attn.conv": "conv.conv",
            "attn.out": "conv.out_proj",
            "mlp_norm": "ffn_norm",
            "mlp.gate": "feed_forward.w1",
            "mlp.up": "feed_forward.w3",
            "mlp.down": "feed_forward.w2",
        },
    ),
    tiny=_TINY,
    variants={
        "adjusted": _ADJUSTED,
        "biases": {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False},
    },
)
