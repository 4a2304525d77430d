"""ChatGLM2's config in other words: of transformers' GLM, and of GGUF files.

`rope_ratio` divides positions in ChatGLM2-6B-32K and multiplies the base of the frequencies elsewhere, and only the
name of the repository says which.
"""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.gguf import QKV, GgufFamily
from llmkit.architecture.keys import respelled
from llmkit.architecture.names import Fused
from llmkit.architecture.scaling import LinearScaling, NoScaling, Scaling

from .glm import has_odd_heads

# Keys that all releases have with these values.
USUAL = {
    "multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False,
    "original_rope": True, "apply_residual_connection_post_layernorm": False,
}  # fmt: skip


def _divides(config: Mapping[str, Any]) -> bool:
    """True where `rope_ratio` divides positions (ChatGLM2-6B-32K)."""
    return "chatglm2" in str(config.get("_name_or_path", "")).lower()


def theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies."""
    return 10000.0 * (1.0 if _divides(config) else float(config.get("rope_ratio") or 1))


def scaling(config: Mapping[str, Any]) -> Scaling:
    """That of positions, where `rope_ratio` divides them."""
    ratio = float(config.get("rope_ratio") or 1)
    return LinearScaling(ratio) if _divides(config) and ratio != 1 else NoScaling()


def kv_heads(config: Mapping[str, Any]) -> Any:
    """Key and value heads; None for as many as queries."""
    return config.get("multi_query_group_num") if config.get("multi_query_attention") else None


_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "use_cache", "transformers_version",
         "_name_or_path", "hidden_size", "num_attention_heads")  # fmt: skip
_IN_GLM = {"kv_channels": "head_dim", "ffn_hidden_size": "intermediate_size", "seq_length": "max_position_embeddings",
           "num_layers": "num_hidden_layers", "padded_vocab_size": "vocab_size"}  # fmt: skip


def as_glm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers' own class."""
    linear = scaling(config)
    return respelled(
        {key: config[key] for key in (*_KEPT, *_IN_GLM) if key in config},
        "GlmForCausalLM",
        "glm",
        _IN_GLM,
        attention_bias=bool(config.get("add_qkv_bias", False)),
        hidden_act="silu",
        num_key_value_heads=kv_heads(config) or config["num_attention_heads"],
        partial_rotary_factor=0.5,
        rms_norm_eps=config.get("layernorm_epsilon", 1e-5),
        rope_theta=theta(config),
        rope_scaling={"type": "linear", "factor": linear.factor} if isinstance(linear, LinearScaling) else None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


_KEYS = {
    "context_length": "seq_length", "block_count": "num_layers", "feed_forward_length": "ffn_hidden_size",
    "attention.head_count_kv": "multi_query_group_num", "attention.layer_norm_rms_epsilon": "layernorm_epsilon",
    "attention.key_length": "kv_channels", "rope.freq_base": "",
}  # fmt: skip


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_ratio`; and the repository's name where it divides positions, which only that name says."""
    head_dim = metadata["embedding_length"] // metadata["attention.head_count"]
    config: dict[str, Any] = {"kv_channels": metadata.get("attention.key_length", head_dim)}
    if metadata.get("rope.scaling.type") == "linear":
        return config | {"rope_ratio": metadata["rope.scaling.factor"], "_name_or_path": "THUDM/chatglm2-6b-32k"}
    ratio = metadata.get("rope.freq_base", 10000.0) / 10000.0
    return config | {"rope_ratio": int(ratio) if ratio == int(ratio) else ratio}


GGUF = GgufFamily(
    "chatglm",
    tokenizer_pre="chatglm-spm",
    pairs="interleaved",
    slots={"attn.qkv": QKV, "mlp.gate_up": Fused("ffn_up", ("gate", "up"))},
    keys=_KEYS,
    config=USUAL,
    flags={"add_qkv_bias": "blk.0.attn_qkv.bias"},
    read=_from_gguf,
    refuses=has_odd_heads,
    claims=lambda _, names: "blk.0.attn_qkv.weight" in names,
)
