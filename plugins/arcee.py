"""Arcee's foundation models: Llama's attention, an MLP without a gate whose activation is the square of ReLU."""

from dataclasses import replace

from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GroupedQuery, PlainMLP, RMSNorm, Rope
from llmkit.architecture.model import Model

from .llama import ARCHITECTURE as LLAMA
from .llama import GGUF, NAMES, TINY

_BIAS = Key("attention_bias", False)


def _refuses(model: Model) -> str | None:
    return "it reads no biases" if any(slot.kind == "bias" for slot in model.slots.values()) else None


ARCHITECTURE = replace(
    LLAMA,
    name="arcee",
    releases=("AFM-4.5B",),
    matches=("ArceeForCausalLM",),
    model_types=("arcee",),
    block=Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS),
        position=Rope(),
        mlp=PlainMLP(Key("hidden_act", "relu2"), bias=Key("mlp_bias", False)),
    ),
    names=replace(NAMES, slots=NAMES.without("mlp.gate")),
    tokenizer=None,
    optimum_reads={"arcee": ("kv_heads",)},
    gguf=replace(GGUF, arch="arcee", config={"hidden_act": "relu2"}, flags={}, refuses=_refuses),
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "hidden_act": "relu2",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    variants={
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        "yarn": {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    },
)
