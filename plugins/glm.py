"""GLM-4-9B (and ChatGLM2/3, converted) in transformers' own layout: rotary pairs side by side on half of each head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, rotary_share
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, RMSNorm, Rope, rotated_share
from llmkit.architecture.model import Model
from llmkit.architecture.names import Fused
from llmkit.architecture.prompts import FORMATS, Prompt

from .chatglm_tokenizers import SENTENCEPIECE
from .llama import DIMS as LLAMA_DIMS
from .llama import NAMES as LLAMA_NAMES

DIMS = replace(LLAMA_DIMS, head_dim=Key("head_dim", 128), kv_heads=Key("num_key_value_heads", 2))
_FUSED = {"mlp.gate_up": Fused("mlp.gate_up_proj", ("gate", "up"))}
NAMES = replace(LLAMA_NAMES, slots=LLAMA_NAMES.without("mlp.gate", "mlp.up") | _FUSED)
BLOCK = Block(
    norm=RMSNorm(eps=Key("rms_norm_eps", 1.5625e-07)),
    attention=GroupedQuery(qkv_bias=Key("attention_bias", True)),
    position=Rope(share=rotated_share(0.5), pairs="interleaved"),
    mlp=GatedMLP(Key("hidden_act", "silu")),
)
TINY = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
VARIANTS: dict[str, Mapping[str, Any]] = {
    "theta": {"rope_theta": 5000000.0},
    "no-biases": {"attention_bias": False},
    "whole-heads": {"partial_rotary_factor": 1.0},
    "defaults": dict.fromkeys(
        ("head_dim", "attention_bias", "partial_rotary_factor", "rms_norm_eps", "num_key_value_heads")
    ),
    "tied": {"tie_word_embeddings": True},
    "transformers-5": {
        "rope_theta": None,
        "partial_rotary_factor": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.25},
    },
}

GLM_4_VOCAB = 151552
CHATGLM2_LENGTH = 32768


def release_prompt(config: Mapping[str, Any], vocab: Any, length: Any) -> Prompt:
    """The chat format of ChatGLM2, ChatGLM3 or GLM-4, whose configs are alike.

    By the number of tokens, then by the name of the repository, then by the length that only ChatGLM2-6B states.
    """
    name = str(config.get("_name_or_path", "")).lower()
    if vocab == GLM_4_VOCAB:
        return FORMATS["glm-4"]
    is_second = "chatglm2" in name or ("chatglm3" not in name and length == CHATGLM2_LENGTH)
    return FORMATS["chatglm2" if is_second else "chatglm3"]


def has_odd_heads(model: Model) -> str | None:
    """Why llama.cpp cannot run a model: it takes the output of attention to be as wide as the hidden states."""
    width = model.dims.heads * model.dims.head_dim
    return None if width == model.dims.hidden else f"its heads are {width} wide together, not {model.dims.hidden}"


GGUF = GgufFamily(
    "chatglm",
    tokenizer_pre="chatglm-bpe",
    pairs="interleaved",
    slots={"mlp.gate_up": Fused("ffn_up", ("gate", "up"))},
    config={"hidden_act": "silu"},
    flags={"attention_bias": "blk.0.attn_q.bias"},
    refuses=has_odd_heads,
    read=lambda metadata: {
        "partial_rotary_factor": rotary_share(metadata),
        "head_dim": metadata.get("attention.key_length")
        or metadata["embedding_length"] // metadata["attention.head_count"],
    },
)

ARCHITECTURE = Architecture(
    name="glm",
    releases=("GLM-4-9B (in transformers' layout)",),
    matches=("GlmForCausalLM",),
    model_types=("glm",),
    dims=DIMS,
    block=BLOCK,
    names=NAMES,
    gguf=replace(GGUF, claims=lambda _, names: "blk.0.attn_q.weight" in names),
    prompt=Computed(lambda c: release_prompt(c, c.get("vocab_size"), c.get("max_position_embeddings"))),
    tokenizer=SENTENCEPIECE,
    optimum_reads={"glm": ("kv_heads",)},
    tiny={**TINY, "head_dim": 8},
    variants={
        **VARIANTS,
        "wide-heads": {"head_dim": 16},
        "chatglm2-6b-32k": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "glm-4-9b-chat-1m": {"rope_theta": 100000000.0, "num_key_value_heads": 4},
    },
)
