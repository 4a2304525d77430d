"""MPT-7B, MPT-30B and StoryWriter (MosaicML 2023).

transformers' class leaves out three things that the original computes: the steepness of ALiBi (`alibi_bias_max`, 16 in
StoryWriter), the width of the MLP (`expansion_ratio`) and the scale of the logits. Outputs of the original with all of
them are recorded in tests/golden. Source: modeling_mpt.py, attention.py (mosaicml/llm-foundry).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, as_float, lookup
from llmkit.architecture.kinds import Alibi, Block, Embedding, GroupedQuery, Head, LayerNorm, PlainMLP
from llmkit.architecture.names import Fused, Names

# Where a config has both names, transformers takes the common one.
_HIDDEN = Key(("hidden_size", "d_model"))
_STEEPNESS = Key("attn_config.alibi_bias_max", 8)
_CLIP = Key("attn_config.clip_qkv", None)


def _ffn(config: Mapping[str, Any]) -> int:
    return int(as_float(lookup(Key("expansion_ratio", 4), config)) * lookup(_HIDDEN, config))


def _logit_scale(config: Mapping[str, Any]) -> Any:
    scale = config.get("logit_scale")
    return lookup(_HIDDEN, config) ** -0.5 if scale == "inv_sqrt_d_model" else scale


def _norm_type(config: Mapping[str, Any]) -> str:
    """Of the norms that differ in their rounding only, whichever the config has."""
    stated = str(config.get("norm_type"))
    return stated if stated in ("layernorm", "low_precision_layernorm") else "low_precision_layernorm"


def _whole(value: float) -> float:
    """As an integer, where it is one: transformers' class takes no other steepness."""
    return int(value) if value == int(value) else value


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    attention = {"alibi": True, "alibi_bias_max": _whole(metadata.get("attention.max_alibi_bias", 8))}
    if "attention.clamp_kqv" in metadata:
        attention["clip_qkv"] = metadata["attention.clamp_kqv"]
    ratio = metadata["feed_forward_length"] / metadata["embedding_length"]
    return {"attn_config": attention, "expansion_ratio": _whole(ratio)}


_UNUSED = (
    "learned_pos_emb", "embedding_fraction", "init_config", "init_device", "verbose", "attn_config.attn_impl",
    "attn_config.attn_uses_sequence_id", "attn_config.model_type",
)  # fmt: skip
_TINY = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 4, "max_seq_len": 128,
    "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None}, "no_bias": True,
    "norm_type": "low_precision_layernorm",
}  # fmt: skip
_KEYS = {
    "context_length": "max_seq_len", "embedding_length": "d_model", "block_count": "n_layers",
    "attention.head_count": "n_heads", "attention.head_count_kv": "", "feed_forward_length": "",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="mpt",
    releases=("MPT-7B", "MPT-30B", "MPT-7B-StoryWriter"),
    matches=("MptForCausalLM",),  # upper and lower case do not matter: MPTForCausalLM is the original's
    model_types=("mpt",),
    dims=Dims(
        hidden=_HIDDEN,
        layers=Key(("num_hidden_layers", "n_layers")),
        heads=Key(("num_attention_heads", "n_heads")),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(_ffn),
        context=Key("max_seq_len", 2048),
    ),
    embedding=Embedding(),
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5), bias=False),
        attention=GroupedQuery(scale=Key("attn_config.softmax_scale", None), clip=_CLIP),
        position=Alibi(steepness=_STEEPNESS),
        mlp=PlainMLP("gelu", bias=False),
    ),
    fixed={
        "attn_config.alibi": True,
        "attn_config.attn_type": "multihead_attention",
        "attn_config.prefix_lm": False,
        "attn_config.qk_ln": False,
        "no_bias": True,
        "norm_type": Computed(_norm_type),
    },
    # ALiBi makes the first needless; the others say how the original is trained and run.
    unused=_UNUSED,
    head=Head(tied=Key("tie_word_embeddings", True), scale=Computed(_logit_scale)),
    names=Names(
        embed="transformer.wte",
        final_norm="transformer.norm_f",
        head="lm_head",
        block="transformer.blocks.{i}.",
        slots={
            "attn_norm": "norm_1",
            "attn.qkv": Fused("attn.Wqkv", ("q", "k", "v")),
            "attn.o": "attn.out_proj",
            "mlp_norm": "norm_2",
            "mlp.up": "ffn.up_proj",
            "mlp.down": "ffn.down_proj",
        },
    ),
    gguf=GgufFamily(
        "mpt",
        slots={"attn.qkv": QKV},
        keys=_KEYS,
        read=_from_gguf,
    ),
    tiny=_TINY,
    variants={
        "clipped": {"n_heads": 6, "d_model": 48, "attn_config": {"alibi": True, "clip_qkv": 1.0}},
        "scaled": {"attn_config": {"alibi": True, "softmax_scale": 0.5}, "tie_word_embeddings": False},
    },
)
