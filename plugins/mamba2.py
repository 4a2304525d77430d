"""Mamba 2: layers whose heads have one decay each (Dao & Gu 2024, arXiv:2405.21060)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import DERIVED, Architecture, Dims
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, NoPositions, RMSNorm
from llmkit.architecture.mamba import MixerOnly, NoMLP, StateSpaceDuality, duality_sizes, step_limit
from llmkit.errors import SpecError

from . import ssm_gguf
from .mamba import KEYS, MAMBA, TRAINING

MIXER = {
    "in": "in_proj", "conv": "conv1d", "dt_bias": "dt_bias", "a_log": "A_log", "d": "D", "norm": "norm",
    "out": "out_proj",
}  # fmt: skip
_NORM, _BIAS = RMSNorm(eps=Key("layer_norm_epsilon", 1e-5)), Key("use_bias", False)


def _inner(config: Mapping[str, Any]) -> int:
    inner = int(config.get("expand", 2) * config["hidden_size"])
    heads, width = config.get("num_heads", 128), config.get("head_dim", 64)
    if heads * width != inner:
        raise SpecError(f"config.json: num_heads {heads} * head_dim {width} is not hidden_size * expand ({inner})")
    return inner


def _read(metadata: Metadata) -> dict[str, Any]:
    width = metadata["ssm.inner_size"] // metadata["ssm.time_step_rank"]
    return {"head_dim": width, "expand": ssm_gguf.expansion(metadata)}


ARCHITECTURE = Architecture(
    name="mamba2",
    releases=("Mamba 2 130M to 2.7B", "Mamba Codestral 7B"),
    matches=("Mamba2ForCausalLM",),
    model_types=("mamba2",),
    dims=Dims(
        hidden=Key("hidden_size", 4096),
        layers=Key("num_hidden_layers", 64),
        heads=Key((), 1),
        kv_heads=DERIVED,
        head_dim=DERIVED,
        ffn=Computed(_inner),
        vocab=Key("vocab_size", 32768),
        extra=duality_sizes(
            Computed(_inner),
            heads=Key("num_heads", 128),
            groups=Key("n_groups", 8),
            state=Key("state_size", 128),
            kernel=Key("conv_kernel", 4),
        ),
    ),
    block=Block(
        norm=_NORM,
        attention=StateSpaceDuality(
            Key("hidden_act", "silu"),
            conv_bias=Key("use_conv_bias", True),
            in_bias=_BIAS,
            out_bias=_BIAS,
            norm=_NORM,
            limit=Computed(step_limit),
        ),
        position=NoPositions(),
        mlp=NoMLP(),
        residual=MixerOnly(),
    ),
    unused=(*TRAINING, "chunk_size", "norm_before_gate"),
    gguf=GgufFamily(
        "mamba2",
        slots=ssm_gguf.under("attn", ssm_gguf.DUALITY),
        forms=ssm_gguf.duality_forms("attn"),
        keys={**KEYS, "ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups"},
        config={"hidden_act": "silu"},
        read=_read,
        write=lambda model, _: {**ssm_gguf.WITHOUT_ATTENTION, **ssm_gguf.sizes(model)},
    ),
    unadapted=("out_proj",),
    names=replace(
        MAMBA.names, slots={"attn_norm": "norm", **{f"attn.{slot}": f"mixer.{name}" for slot, name in MIXER.items()}}
    ),
    # One group: transformers 4.57 norms all of them together, where the original norms each.
    tiny={
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "state_size": 8,
        "conv_kernel": 4,
        "chunk_size": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    variants={
        "tied": {"num_heads": 2, "expand": 1, "use_conv_bias": False, "conv_kernel": 2, "tie_word_embeddings": True}
    },
)
