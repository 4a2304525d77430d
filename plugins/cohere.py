"""Command R, R+ and R7B, Aya, Command A: attention and MLP side by side behind one LayerNorm without bias.

The second generation has a window on three layers of four, and positions on those only.

Inside Aya Vision logits have their scale, too, as in transformers 4.51, with which it was published, and in vLLM; the
class of transformers 4.52 to 5.24 leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import GgufFamily, needs_tied_head
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    GroupedQuery,
    Head,
    HeadNorm,
    LayerNorm,
    NoPositions,
    PerLayer,
    Rope,
    SharedParallel,
)
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model
from llmkit.architecture.positions import THETA_KEYS

from .llama import DIMS, QK_NORMS, TINY
from .llama import NAMES as LLAMA_NAMES

_EPS, _SCALE = Key("layer_norm_eps", 1e-5), Key("logit_scale", 0.0625)
_BIAS = Key("attention_bias", False)
_FROM = 64  # llama.cpp looks for norms of heads in models of this many layers, and in no others


def _head_norm(heads: str) -> Computed:
    return Computed(lambda config: HeadNorm(_EPS, heads) if config.get("use_qk_norm") else None)


_BLOCK = Block(
    norm=LayerNorm(eps=_EPS, bias=False),
    attention=GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=_head_norm("heads"), k_norm=_head_norm("kv_heads")),
    position=Rope(theta=Key(THETA_KEYS, 500000.0), pairs="interleaved"),
    mlp=GatedMLP(Key("hidden_act", "silu")),
    residual=SharedParallel(),
)


def _block(config: Mapping[str, Any], i: int) -> Block:
    pattern = config.get("sliding_window_pattern") or 4
    window = window_of(config, 4096) if is_sliding(config, i, lambda i: bool((i + 1) % pattern)) else None
    attention = GroupedQuery(qkv_bias=_BIAS, out_bias=_BIAS, window=window)
    return replace(_BLOCK, attention=attention, position=NoPositions() if window is None else Rope(pairs="interleaved"))


def _refused(model: Model) -> str | None:
    has_norms = isinstance(model.block, Block) and "attn.q_norm.weight" in model.block.slots()
    if has_norms != (model.dims.layers >= _FROM):
        return f"it reads norms of heads of models from {_FROM} layers on, and of no others"
    return needs_tied_head(model)


_GGUF = GgufFamily(
    "command-r",
    pairs="interleaved",
    keys={"logit_scale": "logit_scale"},
    config={"hidden_act": "silu"},
    flags={"use_qk_norm": "blk.0.attn_q_norm.weight"},
    write=lambda _, config: {"logit_scale": lookup(_SCALE, config)},
    refuses=_refused,
)
_TINY = {
    **TINY, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": False, "tie_word_embeddings": True,
    "pad_token_id": 0,
}  # fmt: skip

COHERE = Architecture(
    name="cohere",
    releases=("Command R", "Command R+", "Aya 23", "Aya Expanse"),
    matches=("CohereForCausalLM",),
    model_types=("cohere",),
    dims=DIMS,
    block=_BLOCK,
    head=Head(tied=Key("tie_word_embeddings", True), scale=_SCALE),
    names=replace(
        LLAMA_NAMES,
        slots=LLAMA_NAMES.without("mlp_norm") | QK_NORMS,
    ),
    gguf=_GGUF,
    optimum_reads={"cohere": ("kv_heads",)},
    tiny=_TINY,
    variants={
        "r-plus": {"use_qk_norm": True},
        "defaults": {"logit_scale": None, "layer_norm_eps": None, "tie_word_embeddings": None},
    },
)

COHERE_2 = replace(
    COHERE,
    name="cohere2",
    releases=("Command R7B", "Command A", "Tiny Aya"),
    matches=("Cohere2ForCausalLM",),
    model_types=("cohere2",),
    block=PerLayer(_block),
    unused=(
        *("sliding_window", "order_of_interleaved_layers"),  # the first where no layer has one
        *("rotary_pct", "position_embedding_type", "use_gated_activation", "use_parallel_*", "use_embedding_sharing"),
    ),
    gguf=replace(_GGUF, arch="cohere2", has_windows=True, flags={}, refuses=needs_tied_head),
    tiny={**{k: v for k, v in _TINY.items() if k != "use_qk_norm"}, "num_hidden_layers": 4, "sliding_window": 7},
    variants={
        "transformers-5": {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }
    },
)
