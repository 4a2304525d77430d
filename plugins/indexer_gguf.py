"""DeepSeek-V3.2 and GLM-5 in GGUF files: V3's, and what the indexer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.indexer import IndexedAttention
from llmkit.architecture.model import Model

from .deepseek_gguf import GGUF_V3, read, refuses, write

_WIDTH = 64  # llama.cpp turns heads of the indexer by Hadamard matrices of no fewer dims
_TYPES = "attention.indexer.types"
_LONG, _OF_LONG = 2**20, {"index_topk_freq": 4, "index_skip_topk_offset": 3}  # GLM-5.2, where a file does not say


def _read(metadata: Metadata) -> dict[str, Any]:
    return read(metadata, takes_both=False)


def _read_shared(metadata: Metadata) -> dict[str, Any]:
    types = metadata.get(_TYPES)
    if types is not None:
        return {**_read(metadata), "indexer_types": ["full" if is_full else "shared" for is_full in types]}
    return {**_read(metadata), **(_OF_LONG if metadata["context_length"] >= _LONG else {})}


def _write(model: Model, _: Mapping[str, Any]) -> dict[str, Any]:
    sizes, attention = model.dims.extra, getattr(model.block, "attention", None)
    assert isinstance(attention, IndexedAttention)  # noqa: S101
    return {
        **write(model, takes_both=False),
        "attention.indexer.head_count": sizes["index_heads"],
        "attention.indexer.key_length": sizes["index_dim"],
        "attention.indexer.top_k": attention.n_seen,
    }


def _write_shared(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    attentions = [getattr(block, "attention", None) for block in model.blocks]
    return {**_write(model, config), _TYPES: [isinstance(a, IndexedAttention) and not a.shares for a in attentions]}


def _refuses(model: Model) -> str | None:
    width = model.dims.extra["index_dim"]
    return f"heads of its indexer are {width} wide, no multiple of {_WIDTH}" if width % _WIDTH else refuses(model)


GGUF: GgufFamily = replace(
    GGUF_V3,
    arch="deepseek32",
    slots={
        **GGUF_V3.slots,
        "attn.index_q": "indexer.attn_q_b",
        "attn.index_k": "indexer.attn_k",
        "attn.index_k_norm": "indexer.k_norm",
        "attn.index_weights": "indexer.proj",
    },
    keys={
        **GGUF_V3.keys,
        "attention.indexer.head_count": "index_n_heads",
        "attention.indexer.key_length": "index_head_dim",
        "attention.indexer.top_k": "index_topk",
    },
    ignored=("blk.61.*",),
    read=_read,
    write=_write,
    refuses=_refuses,
    claims=None,
    older=None,
)
GGUF_GLM = replace(GGUF, arch="glm-dsa", ignored=("blk.78.*",), read=_read_shared, write=_write_shared)
