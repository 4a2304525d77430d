"""GLM-4 of April 2025 (GLM-4-9B-0414, GLM-4-32B-0414): GLM with a second pair of norms."""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.kinds import Sandwich

from .glm import BLOCK, DIMS, GGUF, NAMES, TINY, VARIANTS

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}

ARCHITECTURE = Architecture(
    name="glm4",
    releases=("GLM-4-9B-0414", "GLM-4-32B-0414"),
    matches=("Glm4ForCausalLM",),
    model_types=("glm4",),
    dims=DIMS,
    block=replace(BLOCK, residual=Sandwich()),
    names=replace(NAMES, slots={**NAMES.slots, **_NORMS}),
    gguf=replace(GGUF, arch="glm4", refuses=None, tokenizer_pre="glm4"),
    tiny={**TINY, "rms_norm_eps": 1e-5},
    variants={
        **VARIANTS,
        "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    },
)
