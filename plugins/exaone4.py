"""EXAONE 4.0: norms after attention and MLP, not before, and on each head of queries and keys.

The larger model has a window on three layers of four, and no positions on the fourth.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import NULL, Architecture
from llmkit.architecture.gguf import GgufFamily, Metadata
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Block, GatedMLP, GroupedQuery, NoPositions, OutputNorm, PerLayer, RMSNorm, Rope
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.model import Model

from .gemma2 import has_window, usual_windows
from .llama import DIMS, TINY
from .olmo2 import NAMES

_NORM = RMSNorm(eps=Key("rms_norm_eps", 1e-5))
_PATTERN = 4
_WITH_WINDOWS = 64  # the number of layers by which llama.cpp knows the model that has them


def _pattern(config: Mapping[str, Any]) -> int:
    stated = config.get("sliding_window_pattern")  # 4, or LLLG: three local layers, one global
    return len(stated) if isinstance(stated, str) else stated or _PATTERN


def _from_gguf(metadata: Metadata) -> dict[str, Any]:
    """Without a window transformers' class wants the types of layers."""
    width = metadata.get("attention.sliding_window")
    types = {} if width else {"layer_types": ["full_attention"] * metadata["block_count"]}
    return {"sliding_window": width, **types}


def _block(config: Mapping[str, Any], i: int) -> Block:
    width = window_of(config, 4096)
    is_local = width is not None and is_sliding(config, i, lambda i: bool((i + 1) % _pattern(config)))
    return Block(
        norm=_NORM,
        attention=GroupedQuery(qk_norm=replace(_NORM, width="head_dim"), window=width if is_local else None),
        position=Rope() if is_local or width is None else NoPositions(),
        mlp=GatedMLP(Key("hidden_act", "silu")),
        residual=OutputNorm(),
    )


def _refused(model: Model) -> str | None:
    windows = [has_window(block) for block in model.blocks]
    expected = usual_windows(len(windows), _PATTERN) if len(windows) == _WITH_WINDOWS else [False] * len(windows)
    return None if windows == expected else f"it gives windows to the model of {_WITH_WINDOWS} layers, and to no other"


ARCHITECTURE = Architecture(
    name="exaone4",
    releases=("EXAONE 4.0 1.2B", "EXAONE 4.0 32B"),
    matches=("Exaone4ForCausalLM",),
    model_types=("exaone4",),
    dims=DIMS,
    block=PerLayer(_block),
    unused=("sliding_window_pattern", "layer_types"),  # where no layer has a window
    names=NAMES,
    gguf=GgufFamily(
        "exaone4",
        config={"hidden_act": "silu"},
        has_windows=True,
        refuses=_refused,
        read=_from_gguf,
    ),
    tiny={
        **TINY,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "sliding_window_pattern": "LLLG",
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "pad_token_id": 0,
    },
    variants={"1.2b": {"sliding_window": NULL, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 4}},
)
