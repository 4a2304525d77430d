"""Gemma 2: Gemma with norms around attention and MLP, capped scores and logits, and a window on every other layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, Kind, PerLayer, Rope, Sandwich
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model

from .gemma import BIAS, DIMS, EMBEDDING, GGUF, NORM, TINY
from .llama import NAMES as LLAMA_NAMES

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
NAMES = replace(LLAMA_NAMES, slots={**LLAMA_NAMES.slots, **_NORMS})


def cap(key: str, default: float | None) -> Computed:
    """A softcap: null is none, absent the default."""
    return Computed(lambda config: config.get(key, default))


SCALE = Computed(lambda config: config.get("query_pre_attn_scalar", 256) ** -0.5)
ACTIVATION = Key("hidden_activation", "gelu_pytorch_tanh")


def gemma2_block(config: Mapping[str, Any], i: int) -> Block:
    """A layer: every second one has a window."""
    return Block(
        norm=NORM,
        attention=GroupedQuery(
            qkv_bias=BIAS,
            out_bias=BIAS,
            scale=SCALE,
            softcap=cap("attn_logit_softcapping", 50.0),
            window=window_of(config, 4096) if is_sliding(config, i, lambda i: i % 2 == 0) else None,
        ),
        position=Rope(),
        mlp=GatedMLP(ACTIVATION),
        residual=Sandwich(),
    )


def from_gguf(layers_of_27b: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What follows from metadata in a way of its own: the scale of the scores, and which layers have a window.

    The scale is not stated: llama.cpp knows the largest model by its number of layers.
    """

    def read(metadata: Mapping[str, Any]) -> dict[str, Any]:
        by_width = metadata["embedding_length"] // metadata["attention.head_count"]
        is_27b = metadata["block_count"] == layers_of_27b
        config = {"query_pre_attn_scalar": by_width if is_27b else metadata.get("attention.key_length", by_width)}
        pattern = metadata.get("attention.sliding_window_pattern")
        if pattern is None:
            return config
        windows = pattern if isinstance(pattern, list) else usual_windows(metadata["block_count"], pattern)
        return config | {"layer_types": ["sliding_attention" if w else "full_attention" for w in windows]}

    return read


def usual_windows(layers: int, pattern: int) -> list[bool]:
    """Which layers have a window: the last of every `pattern` has none."""
    return [bool((i + 1) % pattern) for i in range(layers)]


def has_window(block: Kind) -> bool:
    """Whether a layer sees its last tokens only."""
    attention = block.attention if isinstance(block, Block) else None
    return isinstance(attention, GroupedQuery) and attention.window is not None


def to_gguf(model: Model, pattern: int) -> dict[str, Any]:
    """Which layers have a window, where it is not as llama.cpp takes it for the family."""
    windows = [has_window(block) for block in model.blocks]
    is_usual = not any(windows) or windows == usual_windows(len(windows), pattern)
    return {} if is_usual else {"attention.sliding_window_pattern": windows}


_OWN = ("attn_logit_softcapping", "final_logit_softcapping", "hidden_activation", "query_pre_attn_scalar",
        "sliding_window")  # fmt: skip
_TINY = {
    **TINY, "num_hidden_layers": 3, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16,
    "rope_theta": 10000.0, "sliding_window": 7,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma2",
    releases=("Gemma 2 2B", "Gemma 2 9B", "Gemma 2 27B"),
    matches=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    dims=DIMS,
    embedding=EMBEDDING,
    block=PerLayer(gemma2_block),
    fixed={"use_bidirectional_attention": False},
    unused=("hidden_act",),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", 30.0)),
    names=NAMES,
    gguf=replace(GGUF, arch="gemma2", has_windows=True, read=from_gguf(46), write=lambda model, _: to_gguf(model, 2)),
    tiny=_TINY,
    variants={
        "other-scale": {"query_pre_attn_scalar": 24},
        "defaults": dict.fromkeys(_OWN),
        "exact-gelu": {"hidden_activation": "gelu"},
        "untied": {"tie_word_embeddings": False},
        "transformers-5": {
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
)
