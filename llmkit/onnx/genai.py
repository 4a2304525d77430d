"""genai_config.json: how ONNX Runtime GenAI runs a folder. Source: onnxruntime-genai 0.18, its config."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.model import Model
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import end_tokens
from llmkit.layouts.onnx_folder import MODEL
from llmkit.lazy_imports import onnx
from llmkit.onnx.context import IN_PLACE
from llmkit.onnx.parts import TOKEN_INPUTS

_CACHE = ("past_key_values.%d.key", "past_key_values.%d.value")


def unfed_inputs(graph: onnx.ModelProto, model: Model) -> list[str]:
    """Inputs that GenAI's decoders would leave empty, those of its cache that the graph does not have, and those of
    another shape than its config can state.

    A folder with any is not for GenAI: its config would let it load the graph, and fail at the first token.
    """
    names = [value.name for value in graph.graph.input]
    cache = [pattern % layer for layer in range(model.dims.layers) for pattern in _CACHE]
    fed = {*TOKEN_INPUTS, *cache}
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.graph.input}
    stated = [model.dims.kv_heads, model.dims.head_dim]
    unlike = [name for name in cache if name in shapes and shapes[name][1::2] != stated]
    return [name for name in names if name not in fed] or [n for n in cache if n not in names] or unlike


def genai_config(ckpt: Checkpoint, model: Model, attention: str, provider: str) -> dict[str, Any]:
    """The contents of genai_config.json.

    The past buffer may be shared with the present one where GroupQueryAttention writes in place; the standard op
    returns a longer cache each time.
    """
    dims, config = model.dims, ckpt.config
    eos_ids = end_tokens(ckpt) or [0]
    inputs = {name: name for name in TOKEN_INPUTS}
    cache = dict(zip(("past_key_names", "past_value_names"), _CACHE, strict=True))
    context = dims.context or 2048
    providers: list[dict[str, Any]] = [] if provider == "cpu" else [{provider: {}}]
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": _id(config.get("bos_token_id"), eos_ids[0]),
            "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
            "pad_token_id": _id(config.get("pad_token_id"), eos_ids[0]),
            "context_length": context,
            "vocab_size": dims.vocab,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "filename": MODEL,
                "head_size": dims.head_dim,
                "hidden_size": dims.hidden,
                "num_attention_heads": dims.heads,
                "num_hidden_layers": dims.layers,
                "num_key_value_heads": dims.kv_heads,
                "inputs": inputs | cache,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": context,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": attention in IN_PLACE,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _id(value: Any, otherwise: int) -> int:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else otherwise
