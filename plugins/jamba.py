"""Jamba: Mamba in most layers, attention without positions in a few, experts in every other (arXiv:2403.19887)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, NoPositions, PerLayer, RMSNorm
from llmkit.architecture.mamba import SelectiveScan, scan_sizes
from llmkit.architecture.names import linears

from .bamba import ARCHITECTURE as BAMBA
from .bamba import SLOTS
from .jamba_gguf import GGUF

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-6))
_ACT, _BIAS = Key("hidden_act", "silu"), Key("mamba_proj_bias", False)


def _inner(config: Mapping[str, Any]) -> int:
    return int(config.get("mamba_expand", 2) * config["hidden_size"])


def _is_at(config: Mapping[str, Any], i: int, of: str, period: int, offset: int) -> bool:
    """Whether layer `i` is one of those that come round every `OF_layer_period` layers."""
    at: bool = i % config.get(f"{of}_layer_period", period) == config.get(f"{of}_layer_offset", offset)
    return at


def _block(config: Mapping[str, Any], i: int) -> Block:
    has_experts = _is_at(config, i, "expert", 2, 1) and config.get("num_experts", 16) > 1
    mixer = SelectiveScan(_ACT, conv_bias=Key("mamba_conv_bias", True), in_bias=_BIAS, out_bias=_BIAS, norm=_NORM)
    experts = Experts(_ACT, router=Router(Key("num_experts", 16), Key("num_experts_per_tok", 2)), width="ffn")
    return Block(
        norm=_NORM,
        attention=GroupedQuery() if _is_at(config, i, "attn", 8, 4) else mixer,
        position=NoPositions(),
        mlp=experts if has_experts else GatedMLP(_ACT),
    )


_TINY = {
    "num_key_value_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
    "num_experts": 4, "num_experts_per_tok": 2,
    "mamba_d_state": 8, "mamba_dt_rank": 3, "use_mamba_kernels": False, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="jamba",
    releases=("Jamba v0.1, 1.5, 1.6, Reasoning 3B",),
    matches=("JambaForCausalLM",),
    model_types=("jamba",),
    dims=replace(
        BAMBA.dims,
        vocab=Key("vocab_size", 65536),
        extra=scan_sizes(
            Computed(_inner), rank="mamba_dt_rank", state=Key("mamba_d_state", 16), kernel=Key("mamba_d_conv", 4)
        ),
    ),
    block=PerLayer(_block),
    unused=(
        *("use_mamba*", "use_associative_scan", "num_logits_to_keep", "calc_logits_for_entire_prompt", "layer*_type*"),
        *("output_router_logits", "num_experts*", "mamba_*"),
    ),
    gguf=GGUF,
    names=replace(
        BAMBA.names,
        slots={
            **SLOTS,
            **linears("attn", "mamba", ("in", "x", "dt", "out")),
            **{f"attn.{part}_norm": f"mamba.{part}_layernorm" for part in ("dt", "b", "c")},
            "attn.conv": "mamba.conv1d",
            "attn.a_log": "mamba.A_log",
            "attn.d": "mamba.D",
            "mlp.router": "feed_forward.router",
            **linears("mlp.experts.{e}", "feed_forward.experts.{e}"),
        },
    ),
    tiny=_TINY,
    variants={
        "dense": {"num_experts": 1, "mamba_dt_rank": None, "mamba_conv_bias": False, "tie_word_embeddings": True}
    },
)
