"""Llama 4 (text): chunks of attention, layers without positions, and one or a few experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, NoPositions, PerLayer, RMSNorm, Rope, UnitRMS
from llmkit.architecture.layer_types import layer_type
from llmkit.architecture.names import Stacked, linears
from llmkit.architecture.positions import THETA_KEYS, QueryGrowth
from llmkit.errors import SpecError

from .llama import DIMS, LLAMA_3, NAMES, TINY
from .llama4_gguf import GGUF

_SORTS = ("chunked_attention", "full_attention")
_EPS = Key("rms_norm_eps", 1e-5)
_ACT = Key("hidden_act", "silu")
_BIAS = Key("attention_bias", False)
_EXPERTS = Experts(
    _ACT,
    router=Router(count=Key("num_local_experts", 16), top_k=Key("num_experts_per_tok", 1), scores="chosen_sigmoid"),
    shared="expert_ffn",
    weighs="input",
)


def _has_rope(config: Mapping[str, Any], i: int) -> bool:
    stated = config.get("no_rope_layers")
    if not stated:
        return bool((i + 1) % lookup(Key("no_rope_layer_interval", 4), config))
    if not isinstance(stated, list) or len(stated) <= i:
        raise SpecError(f"config.json: no_rope_layers has no entry for layer {i}: {stated!r:.60}")
    return bool(stated[i])


def _is_mixture(config: Mapping[str, Any], i: int) -> bool:
    step, stated = lookup(Key("interleave_moe_layer_step", 1), config), config.get("moe_layers")
    return not (i + 1) % step if stated is None else i in stated


def _block(config: Mapping[str, Any], i: int) -> Block:
    has_rope, chunk = _has_rope(config, i), config.get("attention_chunk_size", 8192)
    sort = layer_type(config, i, _SORTS, lambda i: _SORTS[not has_rope or chunk is None])
    is_normed = has_rope and lookup(Key("use_qk_norm", True), config)
    is_tuned = not has_rope and lookup(Key("attn_temperature_tuning", True), config)
    growth = QueryGrowth(Key("attn_scale", 0.1), Key("floor_scale", 8192), first=1)
    rope = Rope(theta=Key(THETA_KEYS, 500000.0), pairs="interleaved")
    return Block(
        norm=RMSNorm(eps=_EPS),
        attention=GroupedQuery(
            qkv_bias=_BIAS,
            out_bias=_BIAS,
            chunk=chunk if sort == _SORTS[0] else None,
            qk_norm=UnitRMS(_EPS) if is_normed else None,
            norms_rotated=True,
        ),
        position=rope if has_rope else NoPositions(growth if is_tuned else None),
        mlp=_EXPERTS if _is_mixture(config, i) else GatedMLP(_ACT),
    )


ARCHITECTURE = Architecture(
    name="llama4",
    releases=("Llama 4 Scout", "Llama 4 Maverick"),
    matches=("Llama4ForCausalLM",),
    model_types=("llama4_text",),
    dims=replace(
        DIMS,
        ffn=Key("intermediate_size_mlp", 16384),
        head_dim=Key("head_dim", 128),
        extra={"expert_ffn": Key("intermediate_size", 8192)},
    ),
    block=PerLayer(_block),
    names=replace(
        NAMES,
        slots={
            **NAMES.without("mlp"),
            **linears("mlp", "feed_forward"),
            "mlp.router": "feed_forward.router",
            **linears("mlp.shared", "feed_forward.shared_expert"),
            "mlp.experts.gate_up": Stacked("feed_forward.experts.gate_up_proj", ("gate", "up"), is_transposed=True),
            "mlp.experts.down": Stacked("feed_forward.experts.down_proj", ("down",), is_transposed=True),
        },
        apart=linears("mlp.experts.{e}", "feed_forward.experts.{e}"),
        apart_in=("compressed-tensors", "bitsandbytes"),
    ),
    gguf=GGUF,
    # The first where `no_rope_layers` and `layer_types` state all, or no layer is without positions.
    unused=(
        "attention_chunk_size", "no_rope_layer_interval", "interleave_moe_layer_step", "attn_*", "floor_scale",
        "use_qk_norm", "router_jitter_noise", "output_router_logits", "for_llm_compressor",
    ),
    tiny={
        **TINY, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 24, "intermediate_size_mlp": 40,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192,
        "use_qk_norm": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "chunks": {
            "num_hidden_layers": 3, "attention_chunk_size": 5, "no_rope_layers": [1, 0, 1], "moe_layers": [0, 2],
            "interleave_moe_layer_step": 1, "floor_scale": 4, "attn_scale": 0.3, "num_experts_per_tok": 2,
            "rope_scaling": LLAMA_3,
        },
        "maverick": {"use_qk_norm": False, "num_local_experts": 128},
        "types": {
            "num_hidden_layers": 2, "attention_chunk_size": 7, "layer_types": ["full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0], "attn_temperature_tuning": False, "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
)  # fmt: skip
