"""Qwen2, Qwen2.5 and what is stored in that layout: Llama's with biases on q, k and v; a window on upper layers."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of

from .llama import DIMS, NAMES, TINY

WINDOW_KEYS = ("sliding_window", "max_window_layers", "layer_types")  # where `use_sliding_window` is false


def window(config: Mapping[str, Any], i: int) -> int | None:
    """The window of layer `i`: the upper layers have one, where the config asks for any."""
    if not config.get("use_sliding_window"):
        return None
    is_windowed = is_sliding(config, i, lambda i: i >= config.get("max_window_layers", 28))
    return window_of(config, 4096) if is_windowed else None


def _block(config: Mapping[str, Any], i: int) -> Block:
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-6)),
        attention=GroupedQuery(qkv_bias=True, window=window(config, i)),
        position=Rope(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
    )


ARCHITECTURE = Architecture(
    name="qwen2",
    releases=("Qwen2", "Qwen2.5"),
    matches=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    dims=DIMS,
    block=PerLayer(_block),
    unused=WINDOW_KEYS,
    names=NAMES,
    gguf=GgufFamily("qwen2", config={"use_sliding_window": False}),
    optimum_reads={"qwen2": ("kv_heads",)},
    tiny={
        **TINY,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 7,
        "use_sliding_window": False,
        "eos_token_id": 2,
    },
    variants={
        "tied": {"tie_word_embeddings": True},
        "window-above": {"use_sliding_window": True},
        "window-layer-types": {
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_window_layers": None,
        },
        "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        "transformers-5": {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
)
