"""DeepSeek-V2 and V3 in GGUF files: each head's half of kv_b for keys is transposed, and apart from that for values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llmkit.architecture.gguf import Form, GgufFamily, Metadata, needs_experts
from llmkit.architecture.gguf_experts import DENSE_FIRST_KEYS, dense_first_metadata, needs_pairs_of_groups
from llmkit.architecture.gguf_yarn import needs_yarn_to_stretch, yarn_config, yarn_metadata
from llmkit.architecture.model import Model

from . import latent

_SOFTMAX, _SIGMOID = 1, 2
_PLAIN_QUERIES = (26, 27)  # llama.cpp knows models whose queries are not compressed by their layers


def is_whole(_: Metadata, names: Collection[str]) -> bool:
    """Whether a file has kv_b as one tensor, as before llama.cpp cached what is compressed."""
    return any(name.endswith(".attn_kv_b.weight") for name in names)


def split(family: GgufFamily) -> GgufFamily:
    """The family with two halves of kv_b; files that have it whole are read."""
    halves = {"attn.k_b": "attn_k_b", "attn.v_b": "attn_v_b"}
    slots = {slot: entry for slot, entry in family.slots.items() if slot != "attn.kv_b"}
    forms = {
        "attn.k_b.weight": Form(("heads", "nope", "kv_rank"), is_transposed=True),
        "attn.v_b.weight": Form(("heads", "v_width", "kv_rank")),
    }
    keys = {"attention.head_count_kv": "", "attention.key_length": "", "attention.kv_lora_rank": "kv_lora_rank"}
    return replace(
        family,
        slots={**slots, **halves},
        forms={**family.forms, **forms},
        keys={**family.keys, **keys},
        older=replace(family, claims=is_whole, keys={**family.keys, **keys}),
    )


def compressed(model: Model) -> dict[str, Any]:
    """What llama.cpp caches of a token: one key head of all that is compressed, and what a head makes of it."""
    sizes = model.dims.extra
    return {
        "rope.dimension_count": model.dims.head_dim,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": sizes["q_rank"],
        "attention.kv_lora_rank": sizes["kv_rank"],
        "attention.key_length": sizes["cache_width"],
        "attention.value_length": sizes["kv_rank"],
        "attention.key_length_mla": sizes["qk_width"],
        "attention.value_length_mla": sizes["v_width"],
    }


def read(metadata: Metadata, *, takes_both: bool = True) -> dict[str, Any]:
    """What latent attention adds, and YaRN; files by llama.cpp count the layers that predict further tokens."""
    n_layers = metadata["block_count"] - metadata.get("nextn_predict_layers", 0)
    return {
        "num_hidden_layers": n_layers,
        "num_key_value_heads": metadata["attention.head_count"],  # of transformers' classes; there it is what is cached
        **latent.sizes_in_file(metadata),
        **yarn_config(metadata, takes_both=takes_both),
    }


def write(model: Model, *, takes_both: bool = True) -> dict[str, Any]:
    """The same as metadata, and those of experts."""
    return {**compressed(model), **dense_first_metadata(model), **yarn_metadata(model, takes_both=takes_both)}


def needs_known_queries(model: Model) -> str | None:
    """Why llama.cpp cannot run a model with compressed queries of so many layers."""
    if model.dims.layers in _PLAIN_QUERIES and model.dims.extra["q_rank"]:
        return f"it takes queries of models of {model.dims.layers} layers for ones that are not compressed"
    return None


def refuses(model: Model) -> str | None:
    """Why llama.cpp cannot run a model."""
    needs = (needs_known_queries, needs_experts, needs_pairs_of_groups, needs_yarn_to_stretch)
    return next((reason for need in needs if (reason := need(model))), None)


def _read_v2(metadata: Metadata) -> dict[str, Any]:
    has_groups = "expert_group_count" in metadata
    return {**read(metadata), "topk_method": "group_limited_greedy" if has_groups else "greedy"}


def _scores(metadata: Metadata, names: Collection[str]) -> int:
    """How experts are scored; files of GLM-4.7-Flash may only have the correction that goes with sigmoids."""
    is_corrected = any(name.endswith(".exp_probs_b.bias") for name in names)
    return int(metadata.get("expert_gating_func", _SIGMOID if is_corrected else _SOFTMAX))


GGUF: GgufFamily = split(
    replace(
        latent.GGUF,
        keys={**latent.GGUF.keys, **DENSE_FIRST_KEYS},
        pairs="interleaved",
        read=_read_v2,
        write=lambda model, _: write(model),
        refuses=refuses,
        claims=lambda metadata, names: _scores(metadata, names) == _SOFTMAX,
    )
)
_V3 = {"config": {**GGUF.config, "n_group": 1, "topk_group": 1}, "noted": ("rope_interleave", "n_group", "topk_group")}


def of_v3(family: GgufFamily, **changes: Any) -> GgufFamily:
    """A family like V3 in its router, with these changes to both of its forms."""
    both = {**_V3, "read": read, **changes}
    assert family.older is not None  # noqa: S101
    return replace(family, **both, older=replace(family.older, **{**both, "claims": is_whole}))


# The layer after the last (61 of V3, 47 of GLM-4.7-Flash) guesses further tokens: nothing reads it.
GGUF_V3 = of_v3(
    GGUF, ignored=("blk.61.*", "blk.47.*"), claims=lambda metadata, names: _scores(metadata, names) == _SIGMOID
)
