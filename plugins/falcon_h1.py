"""Falcon-H1: attention and Mamba 2 side by side in every layer, with multipliers (arXiv:2507.22448)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key, as_float
from llmkit.architecture.kinds import Block, Embedding, GatedMLP, GroupedQuery, Head, RMSNorm, Rope
from llmkit.architecture.mamba import ParallelHybrid, StateSpaceDuality, step_limit
from llmkit.architecture.positions import THETA_KEYS
from llmkit.errors import SpecError

from .bamba import ARCHITECTURE as BAMBA
from .bamba import SLOTS, sizes
from .falcon_h1_gguf import GGUF
from .mamba2 import MIXER

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-5))
_ACT, _BIAS = Key("hidden_act", "silu"), Key("attention_bias", False)


def _inner(config: Mapping[str, Any]) -> int:
    inner = config.get("mamba_d_ssm", 1024)
    inner = int(config.get("mamba_expand", 2) * config["hidden_size"]) if inner is None else inner
    heads, width = config.get("mamba_n_heads", 128), config.get("mamba_d_head", "auto")
    if inner % heads or width not in ("auto", inner // heads):
        raise SpecError(f"config.json: mamba_n_heads {heads} * mamba_d_head {width} is not the {inner} of mamba_d_ssm")
    return int(inner)


def _scale(config: Mapping[str, Any]) -> float:
    """The keys' multiplier, as one of the scores."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return float(as_float(config.get("key_multiplier", 1.0), "key_multiplier") * width**-0.5)


def _floats(config: Mapping[str, Any], key: str, n: int) -> tuple[float, ...] | None:
    stated = config.get(key)
    if stated is None:
        return None
    if not isinstance(stated, list | tuple) or len(stated) != n:
        raise SpecError(f"config.json: {key} is {stated!r:.60}, expected {n} numbers")
    return tuple(as_float(factor, key) for factor in stated)


_TINY = {
    "num_key_value_heads": 2,
    "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "mamba_rms_norm": False, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.2, "key_multiplier": 0.4,
    "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9,
    "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.4, "ssm_multipliers": [0.7, 0.5, 0.6, 0.5, 0.8],
    "mlp_multipliers": [0.9, 0.6], "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURE = Architecture(
    name="falcon_h1",
    releases=("Falcon-H1 0.5B to 34B",),
    matches=("FalconH1ForCausalLM",),
    model_types=("falcon_h1",),
    dims=replace(BAMBA.dims, extra=sizes(Computed(_inner))),
    embedding=Embedding(scale=Key("embedding_multiplier", 1.0)),
    block=Block(
        norm=_NORM,
        attention=ParallelHybrid(
            GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, scale=Computed(_scale)),
            StateSpaceDuality(
                _ACT,
                conv_bias=Key("mamba_conv_bias", True),
                in_bias=Key("mamba_proj_bias", False),
                out_bias=Key("projectors_bias", False),
                norm=Computed(lambda config: _NORM if config.get("mamba_rms_norm", False) else None),
                norm_before_gate=Key("mamba_norm_before_gate", True),
                multipliers=Computed(lambda config: _floats(config, "ssm_multipliers", 5)),
                limit=Computed(step_limit),
            ),
            attention_in=Key("attention_in_multiplier", 1.0),
            attention_out=Key("attention_out_multiplier", 1.0),
            recurrence_in=Key("ssm_in_multiplier", 1.0),
            recurrence_out=Key("ssm_out_multiplier", 1.0),
        ),
        position=Rope(theta=Key(THETA_KEYS, 10000.0)),
        mlp=GatedMLP(
            _ACT,
            bias=Key("mlp_bias", False),
            multipliers=Computed(lambda config: _floats(config, "mlp_multipliers", 2)),
        ),
    ),
    head=Head(tied=Key("tie_word_embeddings", False), scale=Key("lm_head_multiplier", 1.0)),
    unused=(
        "mamba_expand",
        "mamba_chunk_size",
        "mamba_use_mlp",
        "num_logits_to_keep",
        "time_step_*",
        "layer*_type*",
        "attn_*",
    ),
    gguf=GGUF,
    unadapted=("out_proj",),
    names=replace(
        BAMBA.names, slots={**SLOTS, **{f"attn.ssm.{slot}": f"mamba.{name}" for slot, name in MIXER.items()}}
    ),
    tiny=_TINY,
    variants={
        "norm": {"mamba_rms_norm": True, "mamba_n_heads": 4, "mamba_n_groups": 1},
        "norm-after": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_multipliers": None}
        | {"mlp_multipliers": None, "mamba_conv_bias": False},
    },
)
