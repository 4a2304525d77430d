"""GLM-5: DeepSeek-V3.2 in other sizes; layers may see what the indexer of a layer before them chose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.indexer import RecordingRope, index_sizes
from llmkit.architecture.keys import Key, lookup
from llmkit.architecture.kinds import Block, PerLayer, RMSNorm
from llmkit.errors import SpecError

from . import latent
from .deepseek2 import mlp_of
from .deepseek3 import ROUTER
from .deepseek_v32 import ARCHITECTURE as V32
from .deepseek_v32 import TINY, VARIANTS, attention
from .indexer_gguf import GGUF_GLM

_ROUTER = replace(ROUTER, groups=Key("n_group", 1), top_groups=Key("topk_group", 1))
_SORTS = {"full": False, "shared": True, "F": False, "S": True}


def _shares(config: Mapping[str, Any], i: int) -> bool:
    """Whether layer `i` sees what one before it chose: by `indexer_types`, a pattern, or every so many layers."""
    stated = config.get("indexer_types") or config.get("index_topk_pattern")
    if stated is None:
        every = max(lookup(Key("index_topk_freq", 1), config), 1)
        return bool(max(i - lookup(Key("index_skip_topk_offset", 2), config) + 1, 0) % every)
    if len(stated) <= i or stated[i] not in _SORTS or (i == 0 and _SORTS[stated[0]]):
        raise SpecError(f"config.json: indexer_types must have full or shared for layer {i}, and full for the first")
    return _SORTS[stated[i]]


def _block(config: Mapping[str, Any], i: int) -> Block:
    return Block(
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        attention=attention(shares=_shares(config, i)),
        position=RecordingRope(pairs="interleaved"),
        mlp=mlp_of(config, i, _ROUTER, n_dense=3),
    )


ARCHITECTURE = replace(
    V32,
    name="glm5",
    releases=("GLM-5", "GLM-5.1"),
    matches=("GlmMoeDsaForCausalLM",),
    model_types=("glm_moe_dsa",),
    dims=latent.dims(
        {"expert_ffn": Key("moe_intermediate_size", 2048), **index_sizes(heads=32)}, nope=192, q_rank=2048, v=256
    ),
    block=PerLayer(_block),
    names=replace(V32.names, ignored=(*V32.names.ignored[:-1], "model.layers.78.*")),
    gguf=GGUF_GLM,
    unused=(*V32.unused, "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern"),
    tiny={
        **TINY, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1,
        "rms_norm_eps": 1e-5,
    },
    variants={
        **VARIANTS,
        "shared": {
            "num_hidden_layers": 4, "index_topk": 5, "indexer_types": ["full", "shared", "full", "shared"],
            "first_k_dense_replace": 2,
        },
    },
)  # fmt: skip
