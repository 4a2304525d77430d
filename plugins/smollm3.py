"""SmolLM3: Llama's layers, every fourth one without positions (Yang et al. 2025, arXiv:2501.18795)."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, NoPositions, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.positions import THETA_KEYS
from llmkit.errors import SpecError

from .llama import DIMS, GGUF, NAMES, TINY

_BIAS = Key("attention_bias", False)


def _is_rotary(config: Mapping[str, Any], i: int) -> bool:
    stated = config.get("no_rope_layers")  # 1 for a layer that has them, whatever the name says
    if stated is None:
        return bool((i + 1) % (config.get("no_rope_layer_interval") or 4))
    if not isinstance(stated, list) or len(stated) <= i:
        raise SpecError(f"config.json: no_rope_layers has no entry for layer {i}")
    return bool(stated[i])


def _block(config: Mapping[str, Any], i: int) -> Block:
    is_rotary = _is_rotary(config, i)
    width = window_of(config, None) if config.get("use_sliding_window") else None
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            window=width if is_sliding(config, i, lambda i: not is_rotary) else None,
        ),
        position=Rope(theta=Key(THETA_KEYS, 2000000.0)) if is_rotary else NoPositions(),
        mlp=GatedMLP(Key("hidden_act", "silu"), bias=Key("mlp_bias", False)),
    )


ARCHITECTURE = Architecture(
    name="smollm3",
    releases=("SmolLM3-3B",),
    matches=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    dims=DIMS,
    block=PerLayer(_block),
    unused=("no_rope_layer_interval", "sliding_window", "max_window_layers"),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=NAMES,
    gguf=GgufFamily("smollm3", pairs=GGUF.pairs, config={"hidden_act": "silu"}),
    optimum_reads={"smollm3": ("kv_heads",)},
    tiny={
        **TINY,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "pad_token_id": 0,
    },
    variants={
        "defaults": {"no_rope_layers": None, "rope_theta": None, "tie_word_embeddings": None},
        "window": {
            "num_hidden_layers": 2,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 7,
            "attention_bias": True,
        },
    },
)
