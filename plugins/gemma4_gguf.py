"""Gemma 4 in GGUF files: heads of two widths, with a window and without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmkit.architecture.gguf import Form, GgufFamily, Metadata
from llmkit.architecture.kinds import GatedMLP, GroupedQuery, Rope
from llmkit.architecture.layer_inputs import LayerInputBlock
from llmkit.architecture.model import Model
from llmkit.architecture.names import Stacked
from llmkit.architecture.parallel_experts import ParallelExperts
from llmkit.architecture.scaling import NoScaling, Proportional

from . import layer_inputs_gguf as inputs
from .gemma2 import has_window


def _read(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    types, widths = inputs.types_of(metadata), metadata["feed_forward_length"]
    heads = metadata["attention.head_count_kv"]
    by_layer = heads if isinstance(heads, list) else [heads] * len(types)
    widths = widths if isinstance(widths, list) else [widths]
    of_sort = dict(zip(types, by_layer, strict=True))
    keys, values = ({i for i in range(len(types)) if f"blk.{i}.attn_{x}.weight" in names} for x in "kv")
    return {
        "layer_types": types,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": max(widths) > widths[0],
        "num_key_value_heads": of_sort.get(inputs.SORTS[True], by_layer[0]),
        "num_global_key_value_heads": of_sort.get(inputs.SORTS[False]),
        "attention_k_eq_v": bool(keys - values),
        "enable_moe_block": bool(metadata.get("expert_count")),
        "final_logit_softcapping": metadata.get("final_logit_softcapping") or None,
    }


def _layers(model: Model) -> list[tuple[bool, GroupedQuery, Rope, int]]:
    """Of each layer whether it has a window, its attention and positions, and the width of its dense MLP."""
    found = []
    for block in model.blocks:
        assert isinstance(block, LayerInputBlock) and isinstance(block.position, Rope)  # noqa: S101, PT018
        mlp = block.mlp.dense if isinstance(block.mlp, ParallelExperts) else block.mlp
        assert isinstance(block.attention, GroupedQuery) and isinstance(mlp, GatedMLP)  # noqa: S101, PT018
        found.append((has_window(block), block.attention, block.position, model.dims.evaluate(mlp.width)))
    return found


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, size = _layers(model), model.dims.evaluate
    heads, widths = [size(attention.kv_heads) for _, attention, _, _ in layers], [width for *_, width in layers]
    local = next(size(attention.head_dim) for has_window, attention, _, _ in layers if has_window)
    whole = next(size(attention.head_dim) for has_window, attention, _, _ in layers if not has_window)
    return {
        **inputs.metadata(model),
        "feed_forward_length": widths if len(set(widths)) > 1 else widths[0],
        "attention.head_count_kv": heads if len(set(heads)) > 1 else heads[0],
        **{f"attention.{part}_length": whole for part in ("key", "value")},
        **{f"attention.{part}_length_swa": local for part in ("key", "value")},
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": local,
        "expert_shared_feed_forward_length": None,
        "final_logit_softcapping": model.head.softcap or 0.0,  # without the key llama.cpp takes Gemma 2's
    }


def _refuses(model: Model) -> str | None:
    sizes: dict[bool, set[tuple[str, str]]] = {False: set(), True: set()}
    for has_window_, attention, position, _ in _layers(model):
        sizes[has_window_].add((attention.head_dim, attention.kv_heads))
        scaling = position.bound_scaling
        if not isinstance(scaling, NoScaling if has_window_ else Proportional) or position.share != 1.0:
            return "it has proportional rotary positions where there is no window, and plain ones where there is one"
    if any(len(each) > 1 for each in sizes.values()):
        return "it reads one width of heads with a window, and one without"
    return inputs.needs_sources(model) or inputs.needs_rows(model)


GGUF = GgufFamily(
    "gemma4",
    slots={
        **inputs.INPUT_SLOTS,
        "input.scalar": "layer_output_scale.weight",
        "mlp.dense_post_norm": "post_ffw_norm_1",
        "mlp.experts_norm": "pre_ffw_norm_2",
        "mlp.experts_post_norm": "post_ffw_norm_2",
        "mlp.router.expert_scale": "ffn_down_exps.scale",
        "mlp.experts.gate_up": Stacked("ffn_gate_up_exps", ("gate", "up"), weight=".weight", bias=".bias"),
    },
    outer=inputs.TABLES,
    forms={"beside.table.weight": Form(rows_in_all="vocab")},
    keys={
        **inputs.KEYS,
        "attention.head_count_kv": "",
        "attention.key_length": "global_head_dim",
        "attention.key_length_swa": "head_dim",
        "rope.freq_base": "rope_parameters.full_attention.rope_theta",
        "rope.freq_base_swa": "rope_parameters.sliding_attention.rope_theta",
        "expert_count": "num_experts",
        "expert_used_count": "top_k_experts",
    },
    scaling="rope_parameters.full_attention",
    config={
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    ignored=inputs.IN_ANY,
    read_names=_read,
    write=_write,
    noted=("vocab_size_per_layer_input",),
    refuses=_refuses,
    has_windows=True,
)
