"""Llama 4 in GGUF files: llama.cpp knows chunks, layers without positions and the temperature by heart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.experts import Experts
from llmkit.architecture.gguf import GgufFamily, Metadata, needs_experts
from llmkit.architecture.model import Model

_WITHOUT_NORMS = 128  # experts of the model whose queries and keys llama.cpp does not norm


def _read(metadata: Metadata) -> dict[str, Any]:
    return {"use_qk_norm": metadata["expert_count"] != _WITHOUT_NORMS}


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    mixtures = [i for i, block in enumerate(model.blocks) if isinstance(getattr(block, "mlp", None), Experts)]
    return {"interleave_moe_layer_step": mixtures[0] + 1, "expert_shared_feed_forward_length": None}


GGUF = GgufFamily(
    "llama4",
    pairs="interleaved",
    keys={
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "expert_count": "num_local_experts",
        "expert_shared_feed_forward_length": "",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    config={"hidden_act": "silu"},
    flags={"attention_bias": "blk.0.attn_q.bias"},
    read=_read,
    write=_write,
    refuses=needs_experts,
    tokenizer_pre="llama4",
)
