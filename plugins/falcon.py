"""Falcon 7B, 40B, 180B, 11B and the RefinedWeb models (TII 2023), in the keys of 2023 and in today's."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture, Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup, respelled
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
from llmkit.architecture.scaling import Scaling, scaling_of

from .gpt_neox import megatron

_HIDDEN = Key(("hidden_size", "n_embed"))
_LAYERS = Key(("num_hidden_layers", "n_layer"))
_HEADS = Key(("num_attention_heads", "n_head"))
_KV_HEADS = Key(("num_kv_heads", "n_head_kv"), None)
_BIAS = Key("bias", False)
CONTEXT = 2048  # tokens the models were trained with, and transformers' default; the published configs state none


def _is_new(config: Mapping[str, Any]) -> bool:
    """Grouped heads, parallel: the files of 2023 do not say it, but only those of this kind count key/value heads."""
    stated = config.get("new_decoder_architecture")
    return bool(stated) if stated is not None else config.get("n_head_kv") is not None


def _is_parallel(config: Mapping[str, Any]) -> bool:
    return _is_new(config) or bool(lookup(Key("parallel_attn", True), config))


def _has_two_norms(config: Mapping[str, Any]) -> bool:
    return _is_new(config) and lookup(Key("num_ln_in_parallel_attn", 2), config) == 2


def _kv_heads(config: Mapping[str, Any]) -> Any:
    if _is_new(config):
        return lookup(_KV_HEADS, config)
    return 1 if lookup(Key("multi_query", True), config) else None


def _today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of 2023 in the keys of today's class."""
    names = {key.spellings[1]: key.spellings[0] for key in (_HIDDEN, _LAYERS, _HEADS, _KV_HEADS)}
    return respelled(config, "FalconForCausalLM", "falcon", names, new_decoder_architecture=_is_new(config))


def _scaling(config: Mapping[str, Any]) -> Scaling:
    params = config.get("rope_scaling") or config.get("rope_parameters")
    return scaling_of(params, ChainMap(config, {"max_position_embeddings": CONTEXT}))  # type: ignore[arg-type]


_ROPE = Rope(scaling=Computed(_scaling))


def _residual(config: Mapping[str, Any]) -> Kind:
    if not _is_parallel(config):
        return PreNorm()
    return Parallel() if _has_two_norms(config) else SharedParallel()


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
_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False} | {
    "hidden_size": 64,
    "num_attention_heads": 16,
    "num_kv_heads": 16,
}


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Multi-query where there is one key/value head; a number between marks the decoder of 40B and 11B."""
    kv, heads = metadata.get("attention.head_count_kv", 1), metadata["attention.head_count"]
    is_new = 1 < kv < heads
    config = {"multi_query": kv == 1, "parallel_attn": True, "bias": False, "alibi": False}
    return config | {"new_decoder_architecture": is_new, **({"num_ln_in_parallel_attn": 1} if is_new else {})}


GGUF = GgufFamily(
    "falcon",
    slots={"attn.qkv": QKV},
    keys={
        "attention.head_count_kv": "num_kv_heads",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "feed_forward_length": "ffn_hidden_size",
    },
    is_robust=True,
    read=_from_gguf,
    write=lambda model, _: {"context_length": model.dims.context or CONTEXT, "tensor_data_layout": "jploski"},
    config={"activation": "gelu"},
    noted=("activation",),
)

ARCHITECTURE = Architecture(
    name="falcon",
    releases=("Falcon-RW-1B", "Falcon-7B", "Falcon-11B"),
    matches=("FalconForCausalLM", "RWForCausalLM", "FalconModel", "RWModel"),
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    when=lambda config: not _has_two_norms(config),
    dims=Dims(
        hidden=_HIDDEN,
        layers=_LAYERS,
        heads=_HEADS,
        kv_heads=Computed(_kv_heads),
        ffn=Computed(lambda config: config.get("ffn_hidden_size") or 4 * lookup(_HIDDEN, config)),
    ),
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
    reference_config=_today,
)

FALCON_40B = replace(
    ARCHITECTURE,
    name="falcon40b",
    releases=("Falcon-40B", "Falcon-180B"),
    when=_has_two_norms,
    names=replace(_NAMES, slots={**_NAMES.slots, "attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}),
    # Two norms side by side: llama.cpp's first is the MLP's.
    gguf=replace(
        GGUF,
        slots={"attn.qkv": QKV, "attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"},
        read=lambda metadata: {**_from_gguf(metadata), "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        claims=lambda _, names: "blk.0.attn_norm_2.weight" in names,
    ),
    tiny={**_TINY, "new_decoder_architecture": True, "num_kv_heads": 2},
    variants={
        "180b": {"tie_word_embeddings": False},
        "40b-2023": _OF_2023 | {"model_type": "RefinedWeb", "n_head_kv": 2},
    },
)
