"""What families with latent attention share: sizes, layers, names of tensors and metadata of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from llmkit.architecture.architecture import DERIVED, Dims
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Block, Kind, RMSNorm, Rope
from llmkit.architecture.latent import LatentAttention, latent_sizes
from llmkit.architecture.model import Model
from llmkit.architecture.names import Entry, Fused

from .llama import DIMS as LLAMA_DIMS
from .llama import NAMES as LLAMA_NAMES

# The head of every key is made of rows of its own in kv_b.
ONE_KEY_EACH = {"num_key_value_heads": Key("num_attention_heads")}
# What transformers writes beside the sizes that they follow from.
FOLLOWING = ("head_dim", "qk_head_dim")
_SLOTS: dict[str, Entry] = {
    "attn.q_a": "self_attn.q_a_proj",
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b": "self_attn.q_b_proj",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b": Fused("self_attn.kv_b_proj", ("k_b", "v_b"), rows="per_group"),
}
NAMES = replace(LLAMA_NAMES, slots=LLAMA_NAMES.without("attn.k", "attn.v") | _SLOTS)
TINY: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


def dims(extra: Mapping[str, Key | Computed], rope: int = 64, **defaults: Any) -> Dims:
    """The sizes, with the defaults of the config's class."""
    latent = latent_sizes(rope=rope, **defaults)
    return replace(LLAMA_DIMS, kv_heads=DERIVED, head_dim=Key("qk_rope_head_dim", rope), extra={**latent, **extra})


def pairs(config: Mapping[str, Any]) -> Literal["half", "interleaved"]:
    """Which rotated dims turn together; DeepSeek-V2's class knows one order only."""
    return "interleaved" if config.get("rope_interleave", True) else "half"


def block(config: Mapping[str, Any], mlp: Kind, eps: float = 1e-6) -> Block:
    """A layer with latent attention."""
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", eps)),
        attention=LatentAttention(bias=Key("attention_bias", False)),
        position=Rope(pairs=pairs(config)),
        mlp=mlp,
    )


def sizes_in_file(metadata: Metadata) -> dict[str, Any]:
    """The sizes of config.json that follow from those of a head in a file."""
    is_split = "attention.key_length_mla" in metadata
    width, value = (metadata.get(f"attention.{of}_length" + "_mla" * is_split) for of in ("key", "value"))
    value = value or metadata["embedding_length"] // metadata["attention.head_count"]
    rank = metadata.get("attention.q_lora_rank") or None
    return {"q_lora_rank": rank, "qk_nope_head_dim": width - metadata["rope.dimension_count"], "v_head_dim": value}


def _metadata(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    sizes = model.dims.extra
    return {
        "attention.q_lora_rank": sizes["q_rank"] or None,
        "attention.kv_lora_rank": sizes["kv_rank"],
        "attention.key_length": sizes["qk_width"],
        "attention.value_length": sizes["v_width"],
    }


# Names and metadata: ggml-org/llama.cpp, gguf-py/gguf/constants.py and conversion/.
GGUF = GgufFamily(
    "deepseek2",
    slots={
        "attn.q_a": "attn_q_a",
        "attn.q_a_norm": "attn_q_a_norm",
        "attn.q_b": "attn_q_b",
        "attn.kv_a": "attn_kv_a_mqa",
        "attn.kv_a_norm": "attn_kv_a_norm",
        "attn.kv_b": Fused("attn_kv_b", ("k_b", "v_b"), rows="per_group"),
    },
    keys={
        "attention.key_length": "",
        "attention.kv_lora_rank": "kv_lora_rank",
        "rope.dimension_count": "qk_rope_head_dim",
    },
    config={"hidden_act": "silu"},
    read=sizes_in_file,
    write=_metadata,
)
