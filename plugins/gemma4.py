"""Gemma 4's text models: heads of two sizes, normed values, and in the small ones per-layer embeddings and shared keys.

The last layers of the small ones take keys and values of the last layer of their sort that has its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.beside_experts import BesideExperts, OpenSandwich, ScaledRouter
from llmkit.architecture.carried import (
    CarryingBlock,
    HiddenNorm,
    InputGate,
    LayerInputs,
    Lending,
    NormedValues,
    SharedKeys,
    count_in,
    lending,
)
from llmkit.architecture.experts import Experts
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import (
    Embedding,
    GatedMLP,
    Head,
    Kind,
    NoNorm,
    PerLayer,
    RMSNorm,
    Rope,
    Sandwich,
    UnitRMS,
)
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.names import Stacked

from .gemma import BIAS, EMBEDDING, TINY
from .gemma import DIMS as GEMMA_DIMS
from .gemma2 import ACTIVATION, NAMES, cap

_EPS = Key("rms_norm_eps", 1e-6)
_NORM = RMSNorm(eps=_EPS)
DIMS = replace(GEMMA_DIMS, kv_heads=Key("num_key_value_heads", 4))


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


def _lending(config: Mapping[str, Any]) -> Lending:
    layers = range(config["num_hidden_layers"])
    widths = [2 * size * kv_heads for size, kv_heads in (_head_sizes(config, i) for i in layers)]
    at = len(layers) * count_in(config, "hidden_size_per_layer_input", 256)
    return lending([_is_local(config, i) for i in layers], count_in(config, "num_kv_shared_layers", 0), at, widths)


def _block(config: Mapping[str, Any], i: int) -> CarryingBlock:
    is_local, lent = _is_local(config, i), _lending(config)
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
    attention: Kind = NormedValues(**common, v_norm=UnitRMS(_EPS), from_keys=from_keys, lends_at=lent.columns.get(i))
    if is_shared := i in lent.sources:
        attention = SharedKeys(**common, source=lent.sources[i], at=lent.columns[lent.sources[i]])
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
        router = ScaledRouter("num_experts", "top_k_experts", UnitRMS(_EPS))
        mlp, residual = BesideExperts(_NORM, mlp, Experts(ACTIVATION, router=router, width=expert)), OpenSandwich()
    return CarryingBlock(
        norm=_NORM,
        attention=attention,
        position=rope,
        mlp=mlp,
        residual=residual,
        gate=InputGate(ACTIVATION, width, i * width, _NORM) if width else NoNorm(),
        scaled=True,
    )


_INPUTS = LayerInputs(
    rows=Key("vocab_size_per_layer_input", 262144),
    layers=Key("num_hidden_layers"),
    width=Key("hidden_size_per_layer_input", 256),
    norm=Computed(lambda config: RMSNorm(_EPS, width=str(count_in(config, "hidden_size_per_layer_input", 256)))),
    room=Computed(lambda config: _lending(config).room),
)
_LARGE = {
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": None,
}  # fmt: skip
SLOTS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "input.gate": "per_layer_input_gate",
    "input.out": "per_layer_projection",
    "input.norm": "post_per_layer_input_norm",
}
OUTER = {
    "beside.table": "model.embed_tokens_per_layer",
    "beside.project": "model.per_layer_model_projection",
    "beside.norm": "model.per_layer_projection_norm",
}
# Published files have these in layers that take the keys of others, too.
IN_SHARED_LAYERS = tuple(f"model.layers.*.self_attn.{x}.weight" for x in ("k_proj", "v_proj", "k_norm", "v_norm"))
# What no layer reads where none is of the sort.
_OF_SOME = (
    "per_layer_config.*", "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "use_double_wide_mlp",
    "sliding_window", "rope_parameters.*_attention",
)  # fmt: skip
ARCHITECTURE = Architecture(
    name="gemma4",
    releases=("Gemma 4 E2B", "Gemma 4 E4B", "Gemma 4 31B", "Gemma 4 26B-A4B"),
    matches=("Gemma4ForCausalLM", "Gemma4TextModel"),
    model_types=("gemma4_text",),
    dims=DIMS,
    embedding=Embedding(scale=EMBEDDING.scale, beside=_INPUTS),
    block=PerLayer(_block),
    final_norm=HiddenNorm(eps=_EPS),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", None)),
    no_gguf="not written yet: llama.cpp has it, with a width and a window for each layer",
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **SLOTS,
            "input.scalar": "layer_scalar",
            "mlp.dense_post_norm": "post_feedforward_layernorm_1",
            "mlp.experts_norm": "pre_feedforward_layernorm_2",
            "mlp.experts_post_norm": "post_feedforward_layernorm_2",
            "mlp.router": "router.proj",
            "mlp.router.scale": "router.scale",
            "mlp.router.expert_scale": "router.per_expert_scale",
            "mlp.experts.gate_up": Stacked("experts.gate_up_proj", ("gate", "up")),
            "mlp.experts.down": Stacked("experts.down_proj", ("down",)),
        },
        outer=OUTER,
        ignored=(*NAMES.ignored, *IN_SHARED_LAYERS),
    ),
    fixed={"use_bidirectional_attention": "vision"},  # between tokens of images
    unused=("num_experts", "top_k_experts", "moe_intermediate_size", *_OF_SOME),
    tiny={
        **TINY,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 7,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 2, "final_logit_softcapping": 20.0,
        "layer_types": [f"{s}_attention" for s in ("sliding", "full") * 2],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    variants={
        "e2b": {"num_key_value_heads": 1, "use_double_wide_mlp": True, "num_kv_shared_layers": 1},
        "31b": _LARGE,
        "26b-a4b": {
            **_LARGE, "num_hidden_layers": 3, "layer_types": None, "enable_moe_block": True,
            "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16,
        },
        "defaults": {
            "layer_types": None, "rope_parameters": None, "num_hidden_layers": 3,
            "num_kv_shared_layers": None, "final_logit_softcapping": None, "sliding_window": None,
        },
        "per-layer": {
            "global_head_dim": None,
            "per_layer_config": {i: {"head_dim": 24, "num_key_value_heads": 1} for i in ("1", "3")},
        },
    },
)  # fmt: skip
