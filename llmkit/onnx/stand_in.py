"""A config.json from which Optimum gets the sizes of the empty past, and which claims nothing else.

Optimum knows the shapes of the first call's keys and values by the config's `model_type`: heads of hidden / heads dims
and as many key heads as heads, except for types of which it reads them (`Architecture.optimum_reads`). A model of other
sizes gets a config with a type of which it reads both; its `architectures` stay the model's own, and a key says what
the file is for. Source: optimum-onnx 0.1.0, onnxruntime/modeling_decoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.sizes import Sizes

_STAND_IN_TYPE = "gemma"
_PURPOSE = "sizes of keys and values, which Optimum takes by model_type; the model's own config is beside it"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


def has_sizes(config: Mapping[str, Any], dims: Sizes) -> bool:
    """Whether Optimum gets the sizes of keys and values from a config that transformers knows."""
    architecture = registry.find({**config, "architectures": None})
    read = architecture.optimum_reads.get(registry.model_type_of(config), ()) if architecture is not None else ()
    head_dim = dims.head_dim if "head_dim" in read else dims.hidden // dims.heads
    kv_heads = dims.kv_heads if "kv_heads" in read else dims.heads
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
