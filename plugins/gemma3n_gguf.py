"""Gemma 3n in GGUF files: llama.cpp knows the numbers of its streams, keys and sparse layers by heart."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from llmkit.architecture.altup import AltUpBlock, GaussianTopK
from llmkit.architecture.gguf import Form, GgufFamily, Metadata
from llmkit.architecture.kinds import GatedMLP
from llmkit.architecture.model import Model
from llmkit.architecture.scaling import NoScaling

from . import layer_inputs_gguf as inputs

_STREAMS, _RANK, _WIDTH = 4, 64, 256
_WITH_KEYS, _SPARSE, _SPARSITY = 20, 10, 0.95
_CAP = 30.0
_MATRICES = {"beside": "altup_proj", "final_norm": "altup_unembd_proj"}


def _sparsity(block: AltUpBlock) -> float:
    act = block.mlp.act if isinstance(block.mlp, GatedMLP) else None
    return float(act.sparsity) if isinstance(act, GaussianTopK) else 0.0  # type: ignore[arg-type]


def _blocks(model: Model) -> list[AltUpBlock]:
    return [block for block in model.blocks if isinstance(block, AltUpBlock)]


def _read(metadata: Metadata) -> dict[str, Any]:
    n_layers = metadata["block_count"]
    scales = metadata.get("activation_sparsity_scale")
    usual = [_SPARSITY] * min(_SPARSE, n_layers) + [0.0] * (n_layers - _SPARSE)
    return {
        "layer_types": inputs.types_of(metadata, 5),
        "intermediate_size": metadata["feed_forward_length"],
        "activation_sparsity_pattern": [round(NormalDist().cdf(scale), 6) for scale in scales] if scales else usual,
    }


def _write(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    acts = [NormalDist().inv_cdf(s) if (s := _sparsity(block)) else float("-inf") for block in _blocks(model)]
    return {
        **inputs.metadata(model),
        "attention.key_length": model.dims.head_dim,
        "attention.value_length": model.dims.head_dim,
        "altup.num_inputs": _STREAMS,
        "altup.active_idx": 0,
        "activation_sparsity_scale": acts,
    }


def _refuses(model: Model) -> str | None:
    blocks = _blocks(model)
    first, n_layers, n_shared = blocks[0], len(blocks), len(inputs.shared(model))
    sparse = [_sparsity(block) for block in blocks]
    if (first.streams, first.index, first.scales_output) != (_STREAMS, 0, True):
        return f"it knows {_STREAMS} streams, of which it computes the first and scales what the gate sees"
    if (first.rank, inputs.inputs_of(model).width) != (_RANK, _WIDTH):
        return f"it knows a LAuReL branch of rank {_RANK} and inputs of {_WIDTH} numbers for each layer"
    if n_layers - n_shared != min(n_layers, _WITH_KEYS):
        return f"it gives keys to the first {_WITH_KEYS} layers"
    if any(s != (_SPARSITY if i < _SPARSE else 0.0) for i, s in enumerate(sparse)):
        return f"it knows a sparsity of {_SPARSITY} of the first {_SPARSE} layers"
    if len({block.mlp.width for block in blocks if isinstance(block.mlp, GatedMLP)}) > 1:
        return "it reads one width for all layers"
    if model.head.softcap != _CAP:
        return f"it caps logits at {_CAP:g}"
    if any(not isinstance(block.position.bound_scaling, NoScaling) for block in blocks):  # type: ignore[union-attr]
        return "it scales the rotary positions of layers with a window, too"
    return inputs.needs_sources(model) or inputs.needs_rows(model)


def _repeats(model: Model) -> dict[str, str]:
    """Layers that take keys of others must have some of their own all the same."""
    return {
        f"blk.{i}.{leaf}": f"blk.{source}.{leaf}" for i, source in inputs.shared(model).items() for leaf in inputs.OWN
    }


GGUF = GgufFamily(
    "gemma3n",
    slots={
        **inputs.INPUT_SLOTS,
        "altup.router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "altup.predict": "altup_predict_coef",
        "altup.correct": "altup_correct_coef",
        "altup.scale": "altup_correct_scale.weight",
        "laurel.left": "laurel_l",
        "laurel.right": "laurel_r",
        "laurel.norm": "laurel_post_norm",
    },
    outer={
        **inputs.TABLES,
        **{f"{part}.stream.{i}": f"{name}.{i - 1}" for part, name in _MATRICES.items() for i in range(1, _STREAMS)},
    },
    stacked=tuple(_MATRICES.values()),
    repeats=_repeats,
    forms={"beside.table.weight": Form(rows_in_all="vocab")},
    keys={
        **inputs.KEYS,
        "rope.freq_base_swa": "rope_local_base_freq",
        "altup.num_inputs": "altup_num_inputs",
        "altup.active_idx": "altup_active_idx",
    },
    config={"hidden_activation": "gelu_pytorch_tanh", "laurel_rank": _RANK, "final_logit_softcapping": _CAP},
    ignored=inputs.IN_ANY,
    read=_read,
    write=_write,
    noted=("vocab_size_per_layer_input",),
    refuses=_refuses,
    has_windows=True,
)
