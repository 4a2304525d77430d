"""The layers of Gemma 4, and what goes beside their hidden states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import GatedMLP, Kind, NoNorm, RMSNorm, Rope, Sandwich, UnitRMS
from llmkit.architecture.layer_inputs import (
    InputGate,
    KVSharing,
    LayerInputBlock,
    LayerInputs,
    NormedValues,
    SharedKeys,
    count_in,
    kv_sharing,
)
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.parallel_experts import OpenSandwich, ParallelExperts, ScaledRouter

from .gemma import BIAS
from .gemma2 import ACTIVATION

EPS = Key("rms_norm_eps", 1e-6)
_NORM = RMSNorm(eps=EPS)


def _is_local(config: Mapping[str, Any], i: int) -> bool:
    # transformers' config makes the last layer a global one, whatever is stated.
    return is_sliding(config, i, lambda i: bool((i + 1) % 6)) and i != config["num_hidden_layers"] - 1


def _head_sizes(config: Mapping[str, Any], i: int) -> tuple[int, int]:
    """Width of a head and heads of keys of layer `i`: transformers 5 writes what differs layer by layer."""
    of = count_in(config, "head_dim", 256), count_in(config, "num_key_value_heads", 4)
    if (layers := config.get("per_layer_config")) is not None:
        own = layers.get(str(i)) or {}
        return count_in(own, "head_dim", of[0]), count_in(own, "num_key_value_heads", of[1])
    if _is_local(config, i):
        return of
    kv_heads = count_in(config, "num_global_key_value_heads", of[1]) if config.get("attention_k_eq_v") else of[1]
    return count_in(config, "global_head_dim", 512), kv_heads


def _sharing(config: Mapping[str, Any]) -> KVSharing:
    layers = range(config["num_hidden_layers"])
    widths = [2 * size * kv_heads for size, kv_heads in (_head_sizes(config, i) for i in layers)]
    at = len(layers) * count_in(config, "hidden_size_per_layer_input", 256)
    return kv_sharing([_is_local(config, i) for i in layers], count_in(config, "num_kv_shared_layers", 0), at, widths)


def block(config: Mapping[str, Any], i: int) -> LayerInputBlock:
    """Layer `i`."""
    is_local, sharing = _is_local(config, i), _sharing(config)
    size, kv_heads = map(str, _head_sizes(config, i))
    common: dict[str, Any] = {
        "qkv_bias": BIAS,
        "out_bias": BIAS,
        "scale": 1.0,
        "window": window_of(config, 512) if is_local else None,
        "qk_norm": replace(_NORM, width=size),
        "head_dim": size,
        "kv_heads": kv_heads,
    }
    from_keys = bool(config.get("attention_k_eq_v", False)) and not is_local
    attention: Kind = NormedValues(
        **common, v_norm=UnitRMS(EPS), from_keys=from_keys, shared_kv_at=sharing.columns.get(i)
    )
    if is_shared := i in sharing.sources:
        attention = SharedKeys(**common, source=sharing.sources[i], at=sharing.columns[sharing.sources[i]])
    sort = "sliding_attention" if is_local else "full_attention"
    usual = {"rope_type": "default"} if is_local else {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    rope = Rope(
        theta=Key(f"rope_parameters.{sort}.rope_theta", 10000.0 if is_local else 1000000.0),
        scaling=Key(f"rope_parameters.{sort}", usual),
        size=size,
    )
    width = count_in(config, "hidden_size_per_layer_input", 256)
    is_wide = is_shared and bool(config.get("use_double_wide_mlp", False))
    mlp: Kind
    residual: Kind
    mlp, residual = GatedMLP(ACTIVATION, width="2*ffn" if is_wide else "ffn"), Sandwich()
    if config.get("enable_moe_block", False):
        expert = str(count_in(config, "moe_intermediate_size", 0))
        router = ScaledRouter("num_experts", "top_k_experts", UnitRMS(EPS))
        mlp, residual = ParallelExperts(_NORM, mlp, Experts(ACTIVATION, router=router, width=expert)), OpenSandwich()
    return LayerInputBlock(
        norm=_NORM,
        attention=attention,
        position=rope,
        mlp=mlp,
        residual=residual,
        gate=InputGate(ACTIVATION, width, i * width, _NORM) if width else NoNorm(),
        scaled=True,
    )


SIZES_OF_INPUTS: Mapping[str, Any] = {
    "rows": Key("vocab_size_per_layer_input", 262144),
    "layers": Key("num_hidden_layers"),
    "width": Key("hidden_size_per_layer_input", 256),
    "norm": Computed(lambda config: RMSNorm(EPS, width=str(count_in(config, "hidden_size_per_layer_input", 256)))),
}
INPUTS = LayerInputs(**SIZES_OF_INPUTS, room=Computed(lambda config: _sharing(config).room))
