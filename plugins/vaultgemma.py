"""VaultGemma: Gemma 2 without the norms after attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import NOT_IN_GGUF
from llmkit.architecture.kinds import Block, PerLayer, PreNorm

from .gemma2 import ARCHITECTURE as GEMMA2
from .gemma2 import NAMES, gemma2_block


def _block(config: Mapping[str, Any], i: int) -> Block:
    return replace(gemma2_block(config, i), residual=PreNorm())


ARCHITECTURE = replace(
    GEMMA2,
    name="vaultgemma",
    releases=("VaultGemma 1B",),
    matches=("VaultGemmaForCausalLM",),
    model_types=("vaultgemma",),
    block=PerLayer(_block),
    names=replace(NAMES, slots=NAMES.without("attn_post_norm", "mlp_post_norm")),
    fixed={},
    unused=(*GEMMA2.unused, "use_bidirectional_attention"),
    gguf=None,
    no_gguf=NOT_IN_GGUF,
    tiny={k: v for k, v in GEMMA2.tiny.items() if k not in ("architectures", "model_type")},
)
