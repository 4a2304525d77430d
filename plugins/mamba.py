"""Mamba, and Falcon Mamba: layers of a selective scan (Gu & Dao 2023, arXiv:2312.00752; arXiv:2410.05355)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import DERIVED, READ_SINCE_5, Architecture, Dims
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, Head, NoPositions, RMSNorm
from llmkit.architecture.mamba import MixerOnly, NoMLP, SelectiveScan, scan_sizes
from llmkit.architecture.names import Names, linears

from . import ssm_gguf


def inner_width(config: Mapping[str, Any]) -> int:
    """As the config class has it: `intermediate_size` where a file states it, else from `expand`."""
    stated = config.get("intermediate_size")
    return int(config.get("expand", 2) * config["hidden_size"] if stated is None else stated)


# How weights begin and which kernels compute them. `residual_in_fp32` keeps the stream wider than the rest.
TRAINING = (
    *("time_step_*", "re*_residual", "residual_in_fp32", "use_*mambapy", "use_associative_scan"),
    *("expand", "intermediate_size"),  # releases state both, and the second counts
    *("d_model", "d_inner", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm", "pad_vocab_size_multiple"),
)
# Of GGUF files.
KEYS = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size", **dict.fromkeys(ssm_gguf.WITHOUT_ATTENTION, ""),
}  # fmt: skip
_BIAS = Key("use_bias", False)
_SCAN = SelectiveScan(Key("hidden_act", "silu"), conv_bias=Key("use_conv_bias", True), in_bias=_BIAS, out_bias=_BIAS)
_BLOCK = Block(
    norm=RMSNorm(eps=Key("layer_norm_epsilon", 1e-5)),
    attention=_SCAN,
    position=NoPositions(),
    mlp=NoMLP(),
    residual=MixerOnly(),
)


def _read(metadata: Metadata) -> dict[str, Any]:
    return {"intermediate_size": metadata["ssm.inner_size"], "expand": ssm_gguf.expansion(metadata)}


_GGUF = GgufFamily(
    "mamba",
    slots=ssm_gguf.under("attn", ssm_gguf.SCAN),
    forms=ssm_gguf.SCAN_FORMS,
    keys={**KEYS, "ssm.time_step_rank": "time_step_rank"},
    config={"hidden_act": "silu"},
    read=_read,
    write=lambda model, _: {**ssm_gguf.WITHOUT_ATTENTION, **ssm_gguf.sizes(model)},
    refuses=ssm_gguf.needs_twice,
)

_TINY = {
    "state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 3, "use_bias": False, "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip

MAMBA = Architecture(
    name="mamba",
    releases=("Mamba 130M to 2.8B",),
    matches=("MambaForCausalLM",),
    model_types=("mamba",),
    dims=Dims(
        hidden=Key("hidden_size", 768),
        layers=Key("num_hidden_layers", 32),
        heads=Key((), 1),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(inner_width),
        vocab=Key("vocab_size", 50280),
        extra=scan_sizes(
            Computed(inner_width), rank="time_step_rank", state=Key("state_size", 16), kernel=Key("conv_kernel", 4)
        ),
    ),
    block=_BLOCK,
    head=Head(tied=Key("tie_word_embeddings", True)),
    unused=TRAINING,
    gguf=_GGUF,
    unadapted=("out_proj",),
    names=Names(
        embed="backbone.embeddings",
        final_norm="backbone.norm_f",
        head="lm_head",
        block="backbone.layers.{i}.",
        slots={
            "attn_norm": "norm",
            **linears("attn", "mixer", ("in", "x", "dt", "out")),
            "attn.conv": "mixer.conv1d",
            "attn.a_log": "mixer.A_log",
            "attn.d": "mixer.D",
        },
    ),
    tiny=_TINY,
    variants={
        "defaults": {"state_size": None, "time_step_rank": None, "expand": 1, "tie_word_embeddings": None},
        "untied": {"conv_kernel": 2, "use_conv_bias": False, "tie_word_embeddings": False},
    },
)

FALCON_MAMBA = replace(
    MAMBA,
    name="falcon_mamba",
    releases=("Falcon Mamba 7B",),
    matches=("FalconMambaForCausalLM",),
    model_types=("falcon_mamba",),
    block=replace(_BLOCK, attention=replace(_SCAN, norm=RMSNorm(eps=Key("mixer_rms_eps", 1e-6)), weighted=False)),
    gguf=replace(  # llama.cpp norms dt, B and C with the epsilon of the layers
        _GGUF,
        write=lambda model, _: {**ssm_gguf.WITHOUT_ATTENTION, **ssm_gguf.sizes(model), "ssm.dt_b_c_rms": True},
        noted=("mixer_rms_eps",),
        claims=lambda metadata, _: bool(metadata.get("ssm.dt_b_c_rms")),
    ),
    loader_limits={"weight_packed": READ_SINCE_5.format("packed integers")},
    tiny={**MAMBA.tiny, "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"},
)
