"""Gemma 4's text models: heads of two sizes, normed values, and in the small ones per-layer embeddings and shared keys.

The last layers of the small ones take keys and values of the last layer of their sort that has its own.
"""

from dataclasses import replace

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Embedding, Head, PerLayer
from llmkit.architecture.layer_inputs import HiddenNorm
from llmkit.architecture.names import Stacked

from .gemma import DIMS as GEMMA_DIMS
from .gemma import EMBEDDING, TINY
from .gemma2 import NAMES, cap
from .gemma4_gguf import GGUF
from .gemma4_layers import EPS, INPUTS, block

_LARGE = {
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": None,
}  # fmt: skip
SLOTS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "input.gate": "per_layer_input_gate",
    "input.out": "per_layer_projection",
    "input.norm": "post_per_layer_input_norm",
}
OUTER = {
    "beside.table": "model.embed_tokens_per_layer",
    "beside.project": "model.per_layer_model_projection",
    "beside.norm": "model.per_layer_projection_norm",
}
# Published files have these in layers that take the keys of others, too.
IN_SHARED_LAYERS = tuple(f"model.layers.*.self_attn.{x}.weight" for x in ("k_proj", "v_proj", "k_norm", "v_norm"))
# What no layer reads where none is of the sort.
_OF_SOME = (
    "per_layer_config.*", "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "use_double_wide_mlp",
    "sliding_window", "rope_parameters.*_attention",
)  # fmt: skip
ARCHITECTURE = Architecture(
    name="gemma4",
    releases=("Gemma 4 E2B", "Gemma 4 E4B", "Gemma 4 31B", "Gemma 4 26B-A4B"),
    matches=("Gemma4ForCausalLM", "Gemma4TextModel"),
    model_types=("gemma4_text",),
    dims=replace(GEMMA_DIMS, kv_heads=Key("num_key_value_heads", 4)),
    embedding=Embedding(scale=EMBEDDING.scale, beside=INPUTS),
    block=PerLayer(block),
    final_norm=HiddenNorm(eps=EPS),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", None)),
    gguf=GGUF,
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **SLOTS,
            "input.scalar": "layer_scalar",
            "mlp.dense_post_norm": "post_feedforward_layernorm_1",
            "mlp.experts_norm": "pre_feedforward_layernorm_2",
            "mlp.experts_post_norm": "post_feedforward_layernorm_2",
            "mlp.router": "router.proj",
            "mlp.router.scale": "router.scale",
            "mlp.router.expert_scale": "router.per_expert_scale",
            "mlp.experts.gate_up": Stacked("experts.gate_up_proj", ("gate", "up")),
            "mlp.experts.down": Stacked("experts.down_proj", ("down",)),
        },
        outer=OUTER,
        ignored=(*NAMES.ignored, *IN_SHARED_LAYERS),
    ),
    fixed={"use_bidirectional_attention": "vision"},  # between tokens of images
    unused=("num_experts", "top_k_experts", "moe_intermediate_size", *_OF_SOME),
    tiny={
        **TINY,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 7,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 2, "final_logit_softcapping": 20.0,
        "layer_types": [f"{s}_attention" for s in ("sliding", "full") * 2],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    variants={
        "e2b": {"num_key_value_heads": 1, "use_double_wide_mlp": True},
        "31b": _LARGE,
        "26b-a4b": {
            **_LARGE, "num_hidden_layers": 3, "layer_types": None, "enable_moe_block": True,
            "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16,
        },
        "defaults": {
            "layer_types": None, "rope_parameters": None, "num_hidden_layers": 3,
            "num_kv_shared_layers": None, "final_logit_softcapping": None, "sliding_window": None,
        },
        "per-layer": {
            "global_head_dim": None, "num_kv_shared_layers": 1,
            "per_layer_config": {i: {"head_dim": 24, "num_key_value_heads": 1} for i in ("1", "3")},
        },
    },
)  # fmt: skip
