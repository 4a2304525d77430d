"""Falcon's config in other words: of 2023, of today, and of GGUF files."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Dims
from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import Computed, Key, lookup, respelled
from llmkit.architecture.scaling import Scaling, scaling_of

_HIDDEN = Key(("hidden_size", "n_embed"))
_LAYERS = Key(("num_hidden_layers", "n_layer"))
_HEADS = Key(("num_attention_heads", "n_head"))
_KV_HEADS = Key(("num_kv_heads", "n_head_kv"), None)
_CONTEXT = 2048  # tokens the models were trained with, and transformers' default; the published configs state none


def _is_new(config: Mapping[str, Any]) -> bool:
    """Grouped heads, parallel: the files of 2023 do not say it, but only those of this kind count key/value heads."""
    stated = config.get("new_decoder_architecture")
    return bool(stated) if stated is not None else config.get("n_head_kv") is not None


def is_parallel(config: Mapping[str, Any]) -> bool:
    """Attention and MLP side by side."""
    return _is_new(config) or bool(lookup(Key("parallel_attn", True, null=False), config))


def has_two_norms(config: Mapping[str, Any]) -> bool:
    """A norm for attention, and one for the MLP beside it."""
    return _is_new(config) and lookup(Key("num_ln_in_parallel_attn", 2), config) == 2


def _n_kv_heads(config: Mapping[str, Any]) -> Any:
    if _is_new(config):
        return lookup(_KV_HEADS, config)
    return 1 if lookup(Key("multi_query", True, null=False), config) else None


def _ffn(config: Mapping[str, Any]) -> Any:
    return config.get("ffn_hidden_size") or 4 * lookup(_HIDDEN, config)


DIMS = Dims(hidden=_HIDDEN, layers=_LAYERS, heads=_HEADS, kv_heads=Computed(_n_kv_heads), ffn=Computed(_ffn))


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of 2023 in the keys of today's class."""
    names = {key.spellings[1]: key.spellings[0] for key in (_HIDDEN, _LAYERS, _HEADS, _KV_HEADS)}
    return respelled(config, "FalconForCausalLM", "falcon", names, new_decoder_architecture=_is_new(config))


def scaling(config: Mapping[str, Any]) -> Scaling:
    """That of positions, for a context that the config need not state."""
    params = config.get("rope_scaling") or config.get("rope_parameters")
    return scaling_of(params, ChainMap(config, {"max_position_embeddings": _CONTEXT}))  # type: ignore[arg-type]


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
    write=lambda model, _: {"context_length": model.dims.context or _CONTEXT, "tensor_data_layout": "jploski"},
    config={"activation": "gelu"},
    noted=("activation",),
)
# Two norms side by side: llama.cpp's first is the MLP's.
GGUF_40B = replace(
    GGUF,
    slots={"attn.qkv": QKV, "attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"},
    read=lambda metadata: {**_from_gguf(metadata), "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    claims=lambda _, names: "blk.0.attn_norm_2.weight" in names,
)
