"""Random configs of a family: its tiny ones with sizes, kinds and numbers drawn anew."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Set
from functools import cache
from typing import Any

import transformers

from llmkit.architecture.activations import ACTIVATIONS
from reliability.against_transformers import PLUGINS
from reliability.class_keys import keys_read

__all__ = ["random_config"]

Draw = Callable[[random.Random], Any]
_NAMES = ("gelu_new", "gelu_fast", "swish", *ACTIVATIONS)


def random_config(name: str, draw: random.Random) -> dict[str, Any]:
    """A config of the family: its tiny one with sizes, kinds and numbers drawn anew."""
    more = _more_keys(name)
    config = PLUGINS[name].tiny_config(draw.choice([None, None, *PLUGINS[name].variants]))
    config |= _sizes(config.keys() | ({"head_dim", "ffn_hidden_size"} & more if draw.random() < 0.3 else set()), draw)
    known = config.keys() | more
    for key, sample in _KNOBS.items():
        if key in known and draw.random() < 0.5:
            config[key] = sample(draw)
    config |= _experts(config, draw)
    if any(k in known for k in ("rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base")):
        config |= _rope(config, draw)
    if "layer_types" in config or (name in _WITH_TYPES and draw.random() < 0.5):
        layers = config["num_hidden_layers"]
        config["layer_types"] = [draw.choice(_layer_sorts(name)) for _ in range(layers)]
    if "mlp_layer_types" in config:
        config["mlp_layer_types"] = [draw.choice(["dense", "sparse"]) for _ in range(config["num_hidden_layers"])]
    if "indexer_types" in config:
        others = [draw.choice(["full", "shared"]) for _ in range(config["num_hidden_layers"] - 1)]
        config["indexer_types"] = ["full", *others]
    for key, value in _FITTING.get(name, {}).items():
        config[key] = value(config, draw)
    return {k: v for k, v in config.items() if v is not None}


@cache
def _more_keys(name: str) -> set[str]:
    """What the class reads beside the keys of the tiny config, and is not computed at one value only."""
    more = {"tie_word_embeddings", *_MORE.get(name, ())}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    stated = PLUGINS[name].tiny["model_type"]
    if stated not in known:  # another class stands for remote code, which has its own keys
        return more
    spelled = {mine for mine, theirs in known[stated].attribute_map.items() if mine != theirs}
    return (keys_read(name).keys() | more) - PLUGINS[name].fixed.keys() - spelled


def _layer_sorts(name: str) -> list[str]:
    """The sorts of layers that the tiny configs of a family have."""
    tiny = (PLUGINS[name].tiny_config(variant) for variant in (None, *PLUGINS[name].variants))
    found = sorted({sort for config in tiny for sort in config.get("layer_types") or ()})
    return found if len(found) > 1 else ["full_attention", "sliding_attention"]


def _sizes(keys: Set[str], draw: random.Random) -> dict[str, Any]:
    heads, head_dim = draw.choice([1, 2, 3, 4, 6, 8]), draw.choice([4, 8, 10, 16, 24, 32])
    kv_heads = draw.choice([k for k in range(1, heads + 1) if heads % k == 0])
    hidden = heads * head_dim
    if "head_dim" in keys:
        hidden = draw.choice([hidden, 20, 36, 64])
    sizes = {
        "hidden_size": hidden, "n_embd": hidden, "n_embed": hidden, "head_dim": head_dim,
        "num_attention_heads": heads, "n_head": heads, "num_key_value_heads": kv_heads, "num_kv_heads": kv_heads,
        "n_head_kv": kv_heads, "num_hidden_layers": (layers := draw.randint(1, 4)), "n_layer": layers,
        "intermediate_size": (ffn := draw.randint(5, 90)), "ffn_dim": ffn, "n_inner": ffn, "ffn_hidden_size": ffn,
        "vocab_size": draw.randint(40, 140),
        "max_position_embeddings": (context := draw.choice([25, 32, 64, 200])), "n_positions": context,
        "seq_length": context, "context_length": context,
        "num_heads": heads, "n_heads": heads, "attention_heads": heads, "d_model": hidden,
        "num_layers": layers, "n_layers": layers,
        "word_embed_proj_dim": draw.choice([hidden, hidden // 2 or 1]), "attention_hidden_size": hidden,
    }  # fmt: skip
    ids = {k: draw.randint(0, 39) for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in keys}
    return {k: v for k, v in sizes.items() if k in keys} | ids


_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def _experts(config: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """How many experts there are, in which groups, and how many of them are chosen; what the tiny config has of it."""
    count = next((config[key] for key in _COUNTS if config.get(key)), 0)
    if count < 2 or draw.random() < 0.2:
        return {}
    has_groups = any(config.get(key) is not None for key in ("n_group", "num_expert_group"))
    groups = draw.choice([1, 1, 2, 3]) if has_groups else 1
    each = draw.randint(2, 4) if groups > 1 else draw.randint(2, 9)
    chosen_groups = draw.randint(1, groups)
    top = draw.randint(1, chosen_groups * each)
    drawn = dict.fromkeys(_COUNTS, groups * each) | dict.fromkeys(_CHOSEN, top)
    drawn |= {"n_group": groups, "num_expert_group": groups, "topk_group": chosen_groups}
    return {key: value for key, value in drawn.items() if config.get(key)}


def _rope(config: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """Rotary positions as transformers 4 or 5 writes them, scaled by one of the published methods or not."""
    if draw.random() < 0.3 or "full_attention" in (config.get("rope_parameters") or {}):
        return {}
    theta, original = draw.choice([100.0, 10000.0, 500000.0]), draw.choice([8, 16, 30])
    factor = draw.choice([1.5, 2.0, 4.0, 8.0])
    methods: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": factor},
        {"rope_type": "dynamic", "factor": factor},
        {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": draw.choice([2.0, 4.0]),
         "original_max_position_embeddings": original},
        {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
         **draw.choice([{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.3}, {"truncate": False},
                        {"mscale": 1.0, "mscale_all_dim": 0.7}])},
    ]  # fmt: skip
    chosen = draw.choice(methods)
    without = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None, "rotary_emb_base": None,
               "rope_local_base_freq": None}  # fmt: skip
    if "rope_parameters" in config and "rope_local_base_freq" not in config:
        share = config["rope_parameters"].get("partial_rotary_factor")
        nested = {**chosen, "rope_theta": theta} | ({"partial_rotary_factor": share} if share else {})
        return without | {"rope_parameters": nested}
    key = "rotary_emb_base" if "rotary_emb_base" in config else "rope_theta"
    scaling = None if chosen["rope_type"] == "default" else chosen
    local = {"rope_local_base_freq": config.get("rope_local_base_freq")}
    return without | local | {key: theta, "rope_scaling": scaling}


def _number(low: float, high: float) -> Draw:
    return lambda draw: low * (high / low) ** draw.random()


def _one_of(*values: Any) -> Draw:
    return lambda draw: draw.choice(values)


_WIDTH = _one_of(4, 9, 24, 60)
_SCALE = _number(0.2, 5.0)
_FLAG, _EPS, _ACT = _one_of(False, True), _number(1e-7, 1e-1), _one_of(*_NAMES)
_KNOBS: dict[str, Draw] = {
    "hidden_act": _ACT, "hidden_activation": _ACT, "activation_function": _ACT, "activation": _ACT,
    "rms_norm_eps": _EPS, "layer_norm_eps": _EPS, "layer_norm_epsilon": _EPS,
    "tie_word_embeddings": _FLAG, "attention_bias": _FLAG, "mlp_bias": _FLAG, "bias": _FLAG, "use_qkv_bias": _FLAG,
    "use_parallel_residual": _FLAG, "qk_layernorm": _FLAG, "enable_bias": _FLAG, "do_layer_norm_before": _FLAG,
    "layer_norm_elementwise_affine": _FLAG, "_remove_final_layer_norm": _FLAG, "alibi": _FLAG, "multi_query": _FLAG,
    "parallel_attn": _FLAG, "new_decoder_architecture": _FLAG, "num_ln_in_parallel_attn": _one_of(None, 1, 2),
    "scale_attn_weights": _FLAG, "scale_attn_by_inverse_layer_idx": _FLAG, "reorder_and_upcast_attn": _FLAG,
    "apply_residual_connection_post_layernorm": _FLAG, "use_sliding_window": _FLAG,
    "sliding_window": _one_of(1, 2, 5, 11, 23, 24, 100), "max_window_layers": _one_of(0, 1, 2, 9),
    "sliding_window_pattern": _one_of(2, 3, 6), "attn_logit_softcapping": _one_of(None, 2.0, 50.0),
    "final_logit_softcapping": _one_of(None, 1.5, 30.0), "query_pre_attn_scalar": _one_of(5, 16, 256),
    "qkv_bias": _FLAG, "partial_rotary_factor": _one_of(0.25, 0.5, 1.0), "rotary_pct": _one_of(0.25, 0.5, 1.0),
    "scale_emb": _one_of(1, 12, 0.5), "scale_depth": _one_of(1, 1.4), "dim_model_base": _one_of(1, 16, 256),
    "scale_embedding": _FLAG, "window_size": _one_of(1, 2, 5, 23, 100),
    "use_bias": _FLAG, "use_qk_norm": _FLAG, "attention_out_bias": _FLAG, "norm_epsilon": _EPS,
    "clip_qkv": _one_of(None, 0.3, 2.0), "attention_multiplier": _number(0.05, 1.0), "logit_scale": _number(0.05, 2.0),
    "residual_multiplier": _number(0.1, 1.0), "embedding_multiplier": _number(1.0, 12.0),
    "logits_scaling": _number(0.5, 16.0), "rotary_dim": _one_of(2, 4),
    "linear_num_key_heads": _one_of(1, 2), "linear_num_value_heads": _one_of(2, 4, 6),
    "linear_key_head_dim": _one_of(8, 16, 20), "linear_value_head_dim": _one_of(8, 12, 24),
    "linear_conv_kernel_dim": _one_of(2, 3, 4, 5), "linear_num_heads": _one_of(1, 2, 4),
    "linear_head_dim": _one_of(8, 12, 20),
    "index_topk": _one_of(1, 3, 9, 23, 100), "attention_chunk_size": _one_of(1, 5, 11, 24, 100),
    "floor_scale": _one_of(1, 4, 30),
    "interleave_moe_layer_step": _one_of(1, 2), "attn_temperature_tuning": _FLAG, "attn_scale": _number(0.05, 1.0),
    "rescale_every": _one_of(0, 1, 2, 6), "rope_local_base_freq": _one_of(100.0, 10000.0),
    "norm_eps": _EPS, "mixer_rms_eps": _EPS, "lm_head_bias": _FLAG, "norm_topk_prob": _FLAG, "moe_renormalize": _FLAG,
    "rope_interleave": _FLAG, "use_expert_bias": _FLAG, "routed_scaling_factor": _number(0.3, 8.0),
    "moe_intermediate_size": _WIDTH, "shared_expert_intermediate_size": _WIDTH, "shared_intermediate_size": _WIDTH,
    "intermediate_size_mlp": _WIDTH, "n_shared_experts": _one_of(1, 2, 3), "num_shared_experts": _one_of(1, 2, 3),
    "moe_num_shared_experts": _one_of(0, 1, 2), "first_k_dense_replace": _one_of(0, 1, 2, 9),
    "num_dense_layers": _one_of(0, 1, 2, 9), "decoder_sparse_step": _one_of(1, 2, 3),
    "mlp_only_layers": _one_of([], [0], [1, 2]), "moe_layer_interval": _one_of(1, 2, 3),
    "moe_layer_start_index": _one_of(0, 1, 2), "swiglu_alpha": _number(0.5, 3.0), "swiglu_limit": _number(0.3, 9.0),
    "kv_lora_rank": _one_of(3, 8, 20), "q_lora_rank": _one_of(5, 16, 40), "qk_nope_head_dim": _one_of(2, 5, 12, 24),
    "qk_rope_head_dim": _one_of(2, 4, 8, 16), "v_head_dim": _one_of(3, 8, 20), "index_n_heads": _one_of(1, 2, 5),
    "state_size": _one_of(2, 5, 12, 16), "conv_kernel": _one_of(2, 3, 4, 6), "conv_L_cache": _one_of(2, 3, 5),
    "time_step_rank": _one_of(1, 2, 7), "mamba_dt_rank": _one_of(1, 2, 7), "mamba_d_conv": _one_of(2, 3, 4, 6),
    "mamba_d_state": _one_of(2, 5, 8, 12), "mamba_expand": _one_of(1, 2, 3), "conv_bias": _FLAG, "use_conv_bias": _FLAG,
    "mamba_conv_bias": _FLAG, "mamba_proj_bias": _FLAG, "mamba_rms_norm": _FLAG, "mamba_norm_before_gate": _FLAG,
    "projectors_bias": _FLAG, "attention_in_multiplier": _SCALE, "attention_out_multiplier": _SCALE,
    "key_multiplier": _SCALE, "lm_head_multiplier": _SCALE, "ssm_in_multiplier": _SCALE, "ssm_out_multiplier": _SCALE,
    "time_step_limit": _one_of([0.0, math.inf], [0.01, 0.5], [0.5, 2.0]),
    "attn_layer_period": _one_of(1, 2, 3), "expert_layer_period": _one_of(1, 2, 3),
    "hidden_size_per_layer_input": _one_of(4, 8, 12),
}  # fmt: skip
# What is drawn beside the keys of the tiny configs and those that the class reads.
_MORE: dict[str, tuple[str, ...]] = {
    "opt": ("_remove_final_layer_norm",),
    "falcon": ("activation", "num_ln_in_parallel_attn"),
    "falcon40b": ("activation", "num_ln_in_parallel_attn", "ffn_hidden_size", "rope_theta"),
    "dots1": ("max_window_layers",),
    "recurrent_gemma": ("rope_theta",),
    "gemma": ("attention_bias",),
    "mpt": ("layer_norm_epsilon",),
    "aquila": ("hidden_act",),
    "internlm": ("hidden_act", "rms_norm_eps"),
    "internlm3": ("hidden_act",),
    "minicpm": ("hidden_act",),
    "skywork": ("hidden_act",),
    "xverse": ("hidden_act",),
}
_WITH_TYPES = ("gemma2", "gemma3", "olmo3", "cohere2", "dots1")


def _shared_layers(config: Mapping[str, Any], draw: random.Random) -> int:
    """How many of the last layers take keys of others: before them are layers of every sort that there is."""
    types = config.get("layer_types")
    if types is None:
        return 0
    types = [*types[:-1], "full_attention"] if config["model_type"] == "gemma4_text" else types
    fitting = [n for n in range(len(types)) if set(types[: len(types) - n]) == set(types)]
    return draw.choice(fitting)


def _long_rope(config: Mapping[str, Any], draw: random.Random) -> Any:
    """Phi-3's class takes no other method than LongRoPE, with a factor for each pair that turns."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    pairs = int(head_dim * config.get("partial_rotary_factor", 1.0)) // 2
    if draw.random() < 0.4 or not pairs:
        return None
    short, long = ([round(draw.uniform(1, 9), 2) for _ in range(pairs)] for _ in range(2))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


def _state_space(config: Mapping[str, Any], draw: random.Random) -> int:
    """A number of heads of Mamba 2 that divides its inner width, twice the hidden size."""
    return draw.choice([n for n in range(1, 9) if 2 * config["hidden_size"] % n == 0])


def _dividing(key: str) -> Callable[[Mapping[str, Any], random.Random], int]:
    """A number that divides another one."""
    return lambda config, draw: draw.choice([n for n in range(1, config[key] + 1) if config[key] % n == 0])


_MAMBA_2: dict[str, Callable[[Mapping[str, Any], random.Random], Any]] = {
    "mamba_n_heads": _state_space,
    "mamba_expand": lambda config, draw: 2,
    "mamba_n_groups": _dividing("mamba_n_heads"),
    "mamba_d_head": lambda config, draw: draw.choice(["auto", 2 * config["hidden_size"] // config["mamba_n_heads"]]),
    "mamba_conv_bias": lambda config, draw: draw.choice([None, True, False]),
    "mamba_proj_bias": lambda config, draw: draw.choice([None, True, False]),
    "mamba_d_state": lambda config, draw: draw.choice([2, 8, 12]),
}
_FITTING: dict[str, dict[str, Callable[[Mapping[str, Any], random.Random], Any]]] = {
    "bamba": _MAMBA_2,
    "recurrent_gemma": {
        "block_types": lambda config, draw: [
            draw.choice(["recurrent", "attention"]) for _ in range(draw.randint(1, 4))
        ],
        "lru_width": lambda config, draw: draw.choice([None, 2, 5]) and config["num_attention_heads"] * 6,
        "conv1d_width": lambda config, draw: draw.choice([2, 3, 4, 6]),
        "attention_window_size": lambda config, draw: draw.choice([1, 2, 5, 24, 100]),
        "logits_soft_cap": lambda config, draw: draw.choice([None, 1.5, 30.0]),
    },
    "granitehybrid": _MAMBA_2,
    "granitemoehybrid": _MAMBA_2,
    "internlm3": {"bias": lambda config, draw: config["qkv_bias"]},  # transformers has one key for both
    "mamba2": {
        "n_groups": _dividing("num_heads"),
        "head_dim": lambda config, draw: draw.choice([4, 8, 12]),
        "expand": lambda config, draw: draw.choice([1, 2]),
        "hidden_size": lambda config, draw: config["num_heads"] * config["head_dim"] // config["expand"],
    },
    "falcon_h1": {
        "mamba_d_head": lambda config, draw: draw.choice([4, 8, 12]),
        "mamba_d_ssm": lambda config, draw: config["mamba_n_heads"] * config["mamba_d_head"],
        "mamba_n_groups": _dividing("mamba_n_heads"),
    },
    "mpt": {
        "attn_config": lambda config, draw: {
            "alibi": True,
            "clip_qkv": draw.choice([None, 0.5, 6.0]),
            "softmax_scale": draw.choice([None, 0.3]),
        },
    },
    "gpt_neo": {
        "attention_types": lambda config, draw: [
            [[draw.choice(["global", "local"])], 1] for _ in range(config["num_layers"])
        ],
    },
    "kimi_linear": {"num_key_value_heads": lambda config, draw: config["num_attention_heads"]},
    "llama4": {
        "no_rope_layers": lambda config, draw: draw.choice(
            [None, [draw.choice([0, 1]) for _ in range(config["num_hidden_layers"])]]
        ),
        "moe_layers": lambda config, draw: draw.choice([None, [0, config["num_hidden_layers"] - 1]]),
    },
    "phimoe": {"use_sliding_window": lambda config, draw: None},  # transformers 4.57 alone reads it
    "phi3": {
        "rope_parameters": lambda config, draw: None,
        "rope_scaling": _long_rope,
        "original_max_position_embeddings": lambda config, draw: draw.choice([8, 16, 24]),
    },
    "gemma3n": {
        "vocab_size_per_layer_input": lambda config, draw: config["vocab_size"] - draw.choice([0, 7]),
        "hidden_size": lambda config, draw: config["num_attention_heads"] * draw.choice([8, 12, 20]),
        "num_kv_shared_layers": lambda config, draw: _shared_layers(config, draw),
        "intermediate_size": lambda config, draw: [draw.randint(5, 90) for _ in range(config["num_hidden_layers"])],
        "activation_sparsity_pattern": lambda config, draw: [
            draw.choice([0.0, 0.3, 0.95]) for _ in range(config["num_hidden_layers"])
        ],
        "altup_num_inputs": lambda config, draw: draw.choice([2, 3, 4]),
        "altup_active_idx": lambda config, draw: draw.choice([0, 1]),
        "altup_correct_scale": lambda config, draw: draw.random() < 0.5,
        "laurel_rank": lambda config, draw: draw.randint(1, 9),
    },
    "gemma4": {
        "vocab_size_per_layer_input": lambda config, draw: config["vocab_size"],
        "global_head_dim": lambda config, draw: draw.choice([8, 16, 24]),
        "num_global_key_value_heads": lambda config, draw: 1 if config.get("attention_k_eq_v") else None,
        "num_kv_shared_layers": lambda config, draw: _shared_layers(config, draw),
        "use_double_wide_mlp": lambda config, draw: draw.random() < 0.5,
        "per_layer_config": lambda config, draw: None,
    },
    # transformers 5 gives a `rope_theta` of transformers 4 to some layers only, or to scaled ones only.
    "apertus": {"rope_theta": lambda config, draw: config.get("rope_scaling") and config.get("rope_theta")},
    "olmo3": {"rope_theta": lambda config, draw: config.get("rope_theta") and 500000.0},
}
