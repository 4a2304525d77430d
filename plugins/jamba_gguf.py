"""Jamba in GGUF files: of each layer its key heads, and experts where a layer has a router."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmkit.architecture.gguf import GgufFamily, Metadata, heads_of_layers, needs_both_sorts, needs_experts
from llmkit.architecture.model import Model
from llmkit.errors import InputError, listing

from . import ssm_gguf


def _rhythm(of: str, has: Sequence[bool]) -> dict[str, int]:
    """Period and offset of the layers that are of a sort.

    Raises:
        InputError: they do not come round regularly.
    """
    n = len(has)
    for period in range(1, n + 2):
        for offset in range(period):
            if [i % period == offset for i in range(n)] == list(has):
                return {f"{of}_layer_period": period, f"{of}_layer_offset": offset}
    raise InputError(f"the layers with {of} do not come round regularly, as Jamba's do: {listing(map(str, has), 8)}")


def _read(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    heads = metadata["attention.head_count_kv"]
    has_experts = [f"blk.{i}.ffn_gate_inp.weight" in names for i in range(len(heads))]
    return {
        "num_key_value_heads": max(heads),
        "mamba_expand": ssm_gguf.expansion(metadata),
        **_rhythm("attn", [n > 0 for n in heads]),
        **_rhythm("expert", has_experts),
    }


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"attention.head_count_kv": heads_of_layers(model), "expert_feed_forward_length": None}
    is_dense = needs_experts(model) is not None
    return metadata | ssm_gguf.sizes(model) | ({"expert_count": 1, "expert_used_count": 1} if is_dense else {})


GGUF = GgufFamily(
    "jamba",
    slots=ssm_gguf.under("attn", ssm_gguf.SCAN),
    forms=ssm_gguf.SCAN_FORMS,
    keys={
        "attention.head_count_kv": "",
        "expert_feed_forward_length": "",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.time_step_rank": "mamba_dt_rank",
    },
    config={"hidden_act": "silu"},
    read_names=_read,
    write=_write,
    refuses=lambda model: ssm_gguf.needs_twice(model) or needs_both_sorts(model),
)
