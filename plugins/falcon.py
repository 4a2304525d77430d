"""Falcon 7B, 40B, 180B, 11B and the RefinedWeb models (TII 2023), in the keys of 2023 and in today's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import READ_SINCE_5, Architecture
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import (
    Block,
    GroupedQuery,
    Head,
    Kind,
    LayerNorm,
    Parallel,
    PlainMLP,
    PreNorm,
    Rope,
    SharedParallel,
)
from llmkit.architecture.names import Names
from llmkit.architecture.positions import CoarseAlibi

from .falcon_spellings import DIMS, GGUF, GGUF_40B, has_two_norms, is_parallel, scaling, today
from .gpt_neox import megatron

_BIAS = Key("bias", False)
_ROPE = Rope(scaling=Computed(scaling))


def _residual(config: Mapping[str, Any]) -> Kind:
    if not is_parallel(config):
        return PreNorm()
    return Parallel() if has_two_norms(config) else SharedParallel()


_NAMES = Names(
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    head="lm_head",
    block="transformer.h.{i}.",
    slots=megatron("self_attention"),
    ignored=("*.rotary_emb.inv_freq", "*.rotary.inv_freq"),
)
_TINY = {
    "num_kv_heads": 4, "layer_norm_epsilon": 1e-5, "bias": False, "multi_query": True, "parallel_attn": True,
    "new_decoder_architecture": False, "alibi": False, "bos_token_id": 11, "eos_token_id": 11,
}  # fmt: skip
_OF_2023 = {
    "architectures": ["RWForCausalLM"], "num_hidden_layers": None, "num_attention_heads": None, "num_kv_heads": None,
    "new_decoder_architecture": None, "n_layer": 2, "n_head": 4,
}  # fmt: skip
# Sixteen heads: the slopes of four are powers of two, which rounding leaves as they are.
_RW = {
    "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "hidden_size": 64,
    "num_attention_heads": 16, "num_kv_heads": 16,
}  # fmt: skip

# FalconLinear, which is not nn.Linear itself.
_LIMITS = {"weight_scale": READ_SINCE_5.format("codes")} | dict.fromkeys(
    ("absmax", "SCB"), "transformers 5 does not read codes of this class from bitsandbytes: transformers 4 does"
)

ARCHITECTURE = Architecture(
    name="falcon",
    releases=("Falcon-RW-1B", "Falcon-7B", "Falcon-11B"),
    matches=("FalconForCausalLM", "RWForCausalLM", "FalconModel", "RWModel"),
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    when=lambda config: not has_two_norms(config),
    dims=DIMS,
    block=Block(
        norm=LayerNorm(eps=Key("layer_norm_epsilon", 1e-5)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=Computed(lambda config: CoarseAlibi() if config.get("alibi") else _ROPE),
        mlp=PlainMLP(Key("activation", "gelu"), bias=_BIAS),
        residual=Computed(_residual),
    ),
    # Of several keys for the same, those that the others leave without a meaning; ALiBi needs none of the rotary ones.
    unused=("num_kv_heads", "n_head_kv", "multi_query", "parallel_attn", "num_ln_in_parallel_attn", "rope_*"),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=_NAMES,
    gguf=GGUF,
    loader_limits=_LIMITS,
    optimum_reads={"falcon": ("kv_heads",)},
    tiny=_TINY,
    variants={
        "rw-1b": _RW,
        "rw-twelve-heads": _RW | {"hidden_size": 48, "num_attention_heads": 12, "num_kv_heads": 12},
        "11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "multi-head": {"multi_query": False},
        "sequential": {"parallel_attn": False, "ffn_hidden_size": 48},
        "untied": {"tie_word_embeddings": False},
        "theta": {"rope_theta": 500000.0},
        "7b-2023": _OF_2023 | {"model_type": "RefinedWebModel"},
        "rw-1b-2023": _RW | _OF_2023 | {"model_type": "RefinedWebModel", "n_head": 16},
    },
    reference_attention="sdpa",  # with eager attention transformers adds ALiBi twice
    reference_config=today,
)

FALCON_40B = replace(
    ARCHITECTURE,
    name="falcon40b",
    releases=("Falcon-40B", "Falcon-180B"),
    when=has_two_norms,
    names=replace(_NAMES, slots={**_NAMES.slots, "attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}),
    gguf=GGUF_40B,
    tiny={**_TINY, "new_decoder_architecture": True, "num_kv_heads": 2},
    variants={
        "180b": {"tie_word_embeddings": False},
        "40b-2023": _OF_2023 | {"model_type": "RefinedWeb", "n_head_kv": 2},
    },
)
