"""RecurrentGemma: two layers with a gated linear recurrence, then one with local attention (arXiv:2404.07839)."""

import struct
from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import READ_SINCE_5, Architecture, Dims
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import (
    Block,
    Embedding,
    GatedMLP,
    GroupedQuery,
    Head,
    NoPositions,
    PerLayer,
    RMSNorm,
    Rope,
    rotated_share,
)
from llmkit.architecture.names import Names, linears
from llmkit.errors import SpecError

from .kind import GatedRecurrence

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-6), offset=1.0)
_ACT = Key("hidden_activation", "gelu_pytorch_tanh")
_SORTS = ("recurrent", "attention")


def _scale(config: Mapping[str, Any]) -> float:
    """The root of the hidden size, which the class keeps in bfloat16."""
    (bits,) = struct.unpack("<I", struct.pack("<f", config["hidden_size"] ** 0.5))
    rounded: float = struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]
    return rounded


def _lru(config: Mapping[str, Any]) -> int:
    return int(config.get("lru_width") or config["hidden_size"])


def _part(config: Mapping[str, Any]) -> int:
    width, heads = _lru(config), config.get("num_attention_heads", 10)
    if width % heads and "recurrent" in _types(config):
        raise SpecError(f"config.json: lru_width {width} is not a multiple of num_attention_heads {heads}")
    return int(width // heads)


def _types(config: Mapping[str, Any]) -> list[str]:
    types = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    if not isinstance(types, list | tuple) or not set(types) <= set(_SORTS):
        raise SpecError(f"config.json: block_types is {types!r:.60}, expected a list of {' and '.join(_SORTS)}")
    return list(types)


def _block(config: Mapping[str, Any], i: int) -> Block:
    types = _types(config)
    is_attention = types[i % len(types)] == "attention"
    attention = GroupedQuery(
        qkv_bias=Key("attention_bias", False), out_bias=True, window=Key("attention_window_size", 2048)
    )
    return Block(
        norm=_NORM,
        attention=attention if is_attention else GatedRecurrence(_ACT),
        position=Rope(share=rotated_share(0.5)) if is_attention else NoPositions(),
        mlp=GatedMLP(_ACT, bias=True),
    )


_MIXER, _LRU = "temporal_block.", "temporal_block.rg_lru."

ARCHITECTURE = Architecture(
    name="recurrent_gemma",
    releases=("RecurrentGemma 2B", "RecurrentGemma 9B"),
    matches=("RecurrentGemmaForCausalLM",),
    model_types=("recurrent_gemma",),
    dims=Dims(
        hidden=Key("hidden_size", 2560),
        layers=Key("num_hidden_layers", 26),
        heads=Key("num_attention_heads", 10),
        ffn=Computed(lambda config: config.get("intermediate_size", 7680) // 2),
        vocab=Key("vocab_size", 256000),
        extra={"lru": Computed(_lru), "lru_part": Computed(_part), "kernel": Key("conv1d_width", 4)},
    ),
    embedding=Embedding(scale=Computed(_scale)),
    block=PerLayer(_block),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=Key("logits_soft_cap", 30.0)),
    unused=(
        *("*w_init_variance_scale", "rope_*", "partial_rotary_factor", "attention_bias", "_block_types"),
        *("attention_window_size", "embeddings_scale_by_sqrt_dim"),
    ),
    names=Names(
        embed="model.embed_tokens",
        final_norm="model.final_norm",
        head="lm_head",
        block="model.layers.{i}.",
        slots={
            "attn_norm": "temporal_pre_norm",
            **linears("attn", "temporal_block", "qkvo"),
            **{f"attn.{part}": f"{_MIXER}linear_{part}" for part in ("x", "y", "out")},
            "attn.conv": f"{_MIXER}conv_1d",
            "attn.rate": f"{_LRU}recurrent_param",
            **{f"attn.{part}_gate": f"{_LRU}{part}_gate_weight" for part in ("input", "recurrent")},
            **{f"attn.{part}_gate_bias": f"{_LRU}{part}_gate_bias" for part in ("input", "recurrent")},
            "mlp_norm": "channel_pre_norm",
            **linears("mlp", "mlp_block"),
        },
    ),
    loader_limits={"weight_scale": READ_SINCE_5.format("codes")},
    tiny={
        "intermediate_size": 96, "num_key_value_heads": 1, "block_types": ["recurrent", "attention"],
        "attention_window_size": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bos_token_id": 2,
        "eos_token_id": 1, "pad_token_id": 0,
    },
    variants={
        "defaults": {"num_hidden_layers": 3, "block_types": None, "num_key_value_heads": None, "conv1d_width": 2},
        "wide": {
            "lru_width": 48, "head_dim": 16, "attention_bias": True, "logits_soft_cap": 5.0,
            "tie_word_embeddings": False,
        },
    },
)  # fmt: skip
