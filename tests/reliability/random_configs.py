"""Random configs of every family that transformers knows: llmkit's decoder against transformers' class, or a reason.

    python tests/reliability/random_configs.py [FAMILY …] [--count 20] [--seed 0] [--verbose]

Each config follows from the family, the seed and its number, and is printed where it goes wrong. Exit code 1 then, or
where a config is refused for another reason than those that llmkit states it cannot compute (`STATED`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from llmkit.architecture.activations import ACTIVATIONS
from reliability.against_transformers import PLUGINS, Outcome, described, quietly, their_model, try_ours

__all__ = ["FAMILIES", "STATED", "Trial", "trials"]

FAMILIES = [name for name, a in PLUGINS.items() if described(a, a.tiny_config()) is not None]
STATED = (r"rotary positions would turn \d+ of the \d+ dims",)
Draw = Callable[[random.Random], Any]
_NAMES = ("gelu_new", "gelu_fast", "swish", *ACTIVATIONS)


@dataclass(frozen=True)
class Trial:
    """One config and what came of it."""

    config: Mapping[str, Any]
    outcome: Outcome

    @property
    def verdict(self) -> str:
        if self.outcome.is_equal:
            return "equal"
        if self.outcome.refusal is None:
            return "WRONG"
        return "refused" if any(re.search(s, self.outcome.refusal) for s in STATED) else "refused without need"


def trials(name: str, count: int, seed: int = 0) -> Iterator[Trial]:
    """`count` random configs of a family that transformers itself computes to finite logits."""
    architecture, done, number = PLUGINS[name], 0, 0
    with quietly(), tempfile.TemporaryDirectory() as folder:
        while done < count:
            draw = random.Random(f"{name} {seed} {number}")
            number += 1
            if number > 20 * count:
                raise RuntimeError(f"{name}: transformers takes too few of the configs that are drawn")
            config = random_config(name, draw)
            theirs = described(architecture, config)
            assert theirs is not None
            try:
                wanted = their_model(theirs, architecture.reference_attention, seed=number, is_exact=True)
            except Exception:  # noqa: BLE001 - transformers' own refusal, in whatever form
                continue
            if not torch.isfinite(wanted.logits).all():
                continue
            done += 1
            yield Trial(config, try_ours(wanted, config, Path(folder) / str(number)))


def random_config(name: str, draw: random.Random) -> dict[str, Any]:
    """A config of the family: its tiny one with sizes, kinds and numbers drawn anew."""
    config = PLUGINS[name].tiny_config(draw.choice([None, None, *PLUGINS[name].variants]))
    config |= _sizes(config, draw)
    for key, sample in _KNOBS.items():
        if (key in config or key in _MORE.get(name, ())) and draw.random() < 0.5:
            config[key] = sample(draw)
    if any(k in config for k in ("rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base")):
        config |= _rope(config, draw)
    if "layer_types" in config or (name in _WITH_TYPES and draw.random() < 0.5):
        layers = config["num_hidden_layers"]
        config["layer_types"] = [draw.choice(_layer_sorts(name)) for _ in range(layers)]
    for key, value in _FITTING.get(name, {}).items():
        config[key] = value(config, draw)
    return {k: v for k, v in config.items() if v is not None}


def _layer_sorts(name: str) -> list[str]:
    """The sorts of layers that the tiny configs of a family have."""
    tiny = (PLUGINS[name].tiny_config(variant) for variant in (None, *PLUGINS[name].variants))
    found = sorted({sort for config in tiny for sort in config.get("layer_types") or ()})
    return found if len(found) > 1 else ["full_attention", "sliding_attention"]


def _sizes(config: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    heads, head_dim = draw.choice([1, 2, 3, 4, 6, 8]), draw.choice([4, 8, 10, 16, 24, 32])
    kv_heads = draw.choice([k for k in range(1, heads + 1) if heads % k == 0])
    hidden = heads * head_dim
    if "head_dim" in config:
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
    ids = {k: draw.randint(0, 39) for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
    return {k: v for k, v in sizes.items() if k in config} | ids


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
}  # fmt: skip
_MORE = {
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "mistral": ("hidden_act", "head_dim"),
    "qwen2": ("hidden_act",),
    "qwen3": ("hidden_act",),
    "phi3": ("hidden_act", "partial_rotary_factor"),
    "gemma": ("attention_bias",),
    "gemma2": ("attention_bias",),
    "gemma3": ("attention_bias", "final_logit_softcapping", "attn_logit_softcapping"),
    "glm": ("attention_bias",),
    "glm4": ("attention_bias",),
    "gpt_neox": ("attention_bias",),
    "gpt2": ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings"),
    "gpt_bigcode": ("scale_attn_weights", "tie_word_embeddings"),
    "gpt_neo": ("tie_word_embeddings",),
    "xglm": ("scale_embedding", "tie_word_embeddings"),
    "mpt": ("layer_norm_epsilon", "tie_word_embeddings"),
    "bloom": ("apply_residual_connection_post_layernorm", "tie_word_embeddings"),
    "opt": ("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings", "_remove_final_layer_norm"),
    "falcon": ("activation", "tie_word_embeddings", "num_ln_in_parallel_attn"),
    "granite": ("attention_bias", "mlp_bias", "hidden_act"),
    "seed_oss": ("attention_out_bias", "hidden_act"),
    "smollm3": ("attention_bias", "mlp_bias", "hidden_act"),
    "olmo": ("attention_bias", "hidden_act"),
    "olmo2": ("attention_bias", "hidden_act"),
    "olmo3": ("attention_bias", "hidden_act"),
    "cohere": ("attention_bias", "hidden_act", "use_qk_norm"),
    "cohere2": ("attention_bias", "hidden_act"),
    "falcon40b": ("activation", "tie_word_embeddings"),
    "llama4": ("floor_scale", "attn_scale", "attn_temperature_tuning", "attention_bias", "hidden_act"),
}
_WITH_TYPES = ("gemma2", "gemma3", "olmo3", "cohere2")


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
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    pairs = int(head_dim * config.get("partial_rotary_factor", 1.0)) // 2
    if draw.random() < 0.4 or not pairs:
        return None
    short, long = ([round(draw.uniform(1, 9), 2) for _ in range(pairs)] for _ in range(2))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


def _state_space(config: Mapping[str, Any], draw: random.Random) -> int:
    """A number of heads of Mamba 2 that divides its inner width, twice the hidden size."""
    return draw.choice([n for n in range(1, 9) if 2 * config["hidden_size"] % n == 0])


_MAMBA_2: dict[str, Callable[[Mapping[str, Any], random.Random], Any]] = {
    "mamba_n_heads": _state_space,
    "mamba_d_head": lambda config, draw: "auto",
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


def main() -> int:
    """A line for each family; each config that goes wrong as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--count", type=int, default=20, help="configs of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="every config")
    args = parser.parse_args()
    total: dict[str, int] = {}
    for name in args.family or FAMILIES:
        counts: dict[str, int] = {}
        for trial in trials(name, args.count, args.seed):
            counts[trial.verdict] = counts.get(trial.verdict, 0) + 1
            if args.verbose or trial.verdict in ("WRONG", "refused without need"):
                print(f"{name}: {trial.verdict}: {trial.outcome}\n  {json.dumps(dict(trial.config))}")
        print(f"{name}: {counts}", flush=True)
        total = {k: total.get(k, 0) + counts.get(k, 0) for k in total.keys() | counts.keys()}
    print(f"all: {total}")
    return int(bool(total.keys() & {"WRONG", "refused without need"}))


if __name__ == "__main__":
    sys.exit(main())
