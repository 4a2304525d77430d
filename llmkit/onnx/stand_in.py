"""A config.json from which Optimum gets the sizes of the empty past, and which claims nothing else.

Optimum knows the shapes of the first call's keys and values by the config's `model_type`: heads of hidden / heads dims
and as many key heads as heads, unless the type is one of those below. A model of other sizes gets a config with a type
of which it reads both head_dim and key heads; its `architectures` stay the model's own, and a key says what the file
is for. Source: optimum-onnx 0.1.0, onnxruntime/modeling_decoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.registry import model_type_of
from llmkit.architecture.sizes import Sizes

_HEAD_DIM_IS_READ = frozenset({"gemma", "gemma3_text", "gpt_oss", "nemotron"})
_KEY_HEADS_ARE_READ = frozenset(
    {
        "arcee", "cohere", "falcon", "gemma", "gemma3_text", "glm", "gpt_oss", "granite", "helium", "llama", "mistral",
        "nemotron", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
    }
)  # fmt: skip
_STAND_IN_TYPE = "gemma"
_PURPOSE = "sizes of keys and values, which Optimum takes by model_type; the model's own config is beside it"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


def has_sizes(config: Mapping[str, Any], dims: Sizes) -> bool:
    """Whether Optimum gets the sizes of keys and values from a config that transformers knows."""
    kind = model_type_of(config)
    head_dim = dims.head_dim if kind in _HEAD_DIM_IS_READ else dims.hidden // dims.heads
    kv_heads = dims.kv_heads if kind in _KEY_HEADS_ARE_READ else dims.heads
    return (head_dim, kv_heads) == (dims.head_dim, dims.kv_heads)


def stand_in(config: Mapping[str, Any], dims: Sizes) -> dict[str, Any]:
    """The sizes of a model and its special tokens in the words of a type of which Optimum reads all sizes."""
    sizes = {
        "model_type": _STAND_IN_TYPE,
        "head_dim": dims.head_dim,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "max_position_embeddings": dims.context or 2048,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "vocab_size": dims.vocab,
        **{key: config[key] for key in _KEPT if key in config},
    }
    return sizes_only(sizes, config)


def sizes_only(sizes: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that holds for its sizes: with the `architectures` of the model's own config, and saying so."""
    classes = {"architectures": config["architectures"]} if config.get("architectures") else {}
    return {**classes, **{k: v for k, v in sizes.items() if k != "architectures"}, "_purpose": _PURPOSE}
