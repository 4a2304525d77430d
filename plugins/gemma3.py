"""Gemma 3's text models: Gemma 2 with norms on heads instead of caps on scores, and one layer in six without a window.

The windowed layers have rotary positions of their own: another base, never scaled.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, Head, PerLayer, Rope, Sandwich
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model

from .gemma import BIAS, DIMS, EMBEDDING, GGUF, NORM, TINY
from .gemma2 import ACTIVATION, NAMES, SCALE, cap, from_gguf, has_window, to_gguf

_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
LOCAL = Rope(
    theta=Key(("rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"), 10000.0),
    scaling=Key("rope_parameters.sliding_attention", None),
)
GLOBAL = Rope(
    theta=Key(("rope_scaling.rope_theta", "rope_parameters.full_attention.rope_theta", "rope_theta"), 1000000.0),
    scaling=Key(("rope_scaling", "rope_parameters.full_attention"), None),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    pattern = config.get("sliding_window_pattern") or 6
    is_local = is_sliding(config, i, lambda i: bool((i + 1) % pattern))
    return Block(
        norm=NORM,
        attention=GroupedQuery(
            qkv_bias=BIAS,
            out_bias=BIAS,
            scale=SCALE,
            window=window_of(config, 4096) if is_local else None,
            qk_norm=replace(NORM, width="head_dim"),
        ),
        position=LOCAL if is_local else GLOBAL,
        mlp=GatedMLP(ACTIVATION),
        residual=Sandwich(),
    )


def _local_base(model: Model) -> float | None:
    positions = [block.position for block in model.blocks if isinstance(block, Block) and has_window(block)]
    return next((position.base for position in positions if isinstance(position, Rope)), None)


ARCHITECTURE = Architecture(
    name="gemma3",
    releases=("Gemma 3 270M", "Gemma 3 1B"),
    matches=("Gemma3ForCausalLM", "Gemma3TextModel"),
    model_types=("gemma3_text",),
    dims=DIMS,
    embedding=EMBEDDING,
    block=PerLayer(_block),
    unused=("hidden_act",),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", None)),
    names=replace(NAMES, slots={**NAMES.slots, **_NORMS}),
    fixed={"use_bidirectional_attention": False},  # EmbeddingGemma's
    gguf=replace(
        GGUF,
        arch="gemma3",
        has_windows=True,
        keys={"rope.freq_base_swa": "rope_local_base_freq"},
        read=from_gguf(62),
        write=lambda model, _: {"rope.freq_base_swa": _local_base(model), **to_gguf(model, 6)},
    ),
    optimum_reads={"gemma3_text": ("head_dim", "kv_heads")},
    tiny={
        **TINY,
        "num_hidden_layers": 3,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
    },
    variants={
        "other-scale": {"query_pre_attn_scalar": 24},
        "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "local-theta": {"rope_local_base_freq": 500.0, "rope_theta": 2000.0},
        "defaults": {
            "hidden_activation": None,
            "query_pre_attn_scalar": None,
            "rope_local_base_freq": None,
            "rope_theta": None,
            "sliding_window_pattern": None,
            "num_hidden_layers": 6,
        },
        "cap": {"final_logit_softcapping": 20.0},
        "transformers-5": {
            "rope_theta": None,
            "rope_local_base_freq": None,
            "sliding_window_pattern": None,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
)
