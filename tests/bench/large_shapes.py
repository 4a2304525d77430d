"""Folders with the shapes of large published models, as sparse files: what planning takes in time and memory.

Norms are ones, all other weights zeros.

    python tests/bench/large_shapes.py FOLDER [MODEL …]      # makes FOLDER/MODEL
    python tests/bench/large_runs.py FOLDER plans MODEL …    # plans every verb
"""

from __future__ import annotations

import json
import struct
import sys
from math import prod
from pathlib import Path
from typing import Any

from llmkit.architecture.registry import require
from llmkit.formats.container import shard_names

_SHARD_NBYTES = 5_000_000_000
_SHARDED = "model.safetensors"
_ONE = bytes([0x80, 0x3F])  # bfloat16
_QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960,
    "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_hidden_layers": 48,
    },
    "qwen3-235b-a22b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
    },
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the model with that config."""
    return {slot.name: slot.shape for slot in require(config, "the model").bind(config).slots.values()}


def write(folder: Path, config: dict[str, Any]) -> None:
    """A folder of the model with that config: true headers, and files without data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_files(folder, shapes_of(config))


def write_files(
    folder: Path, tensors: dict[str, tuple[int, ...]], *, norms: bytes = _ONE, name: str = _SHARDED
) -> None:
    """Files of bfloat16 tensors, called as `name` is; norms are `norms`, all else is holes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for tensor, shape in tensors.items():
        if size > _SHARD_NBYTES and name == _SHARDED:
            shards.append({})
            size = 0
        shards[-1][tensor] = shape
        size += 2 * prod(shape)
    files: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = shard_names(name, len(shards))[i]
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, shape in shard.items():
            n = 2 * prod(shape)
            entries[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
            at += n
            files[tensor] = file
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + at)
            for tensor, shape in shard.items():
                if "norm" in tensor:
                    out.seek(8 + len(header) + entries[tensor]["data_offsets"][0])
                    out.write(norms * shape[0])
    if len(shards) > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


if __name__ == "__main__":
    for model in sys.argv[2:] or MODELS:
        write(Path(sys.argv[1]) / model, MODELS[model])
