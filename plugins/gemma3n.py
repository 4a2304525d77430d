"""Gemma 3n's text models: four streams of hidden states, per-layer embeddings, shared keys, sparse activations."""

from dataclasses import replace

from llmkit.architecture.altup import AltUpNorm
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Embedding, Head, PerLayer

from .gemma import DIMS as GEMMA_DIMS
from .gemma import EMBEDDING, TINY
from .gemma2 import NAMES, cap
from .gemma3n_gguf import GGUF
from .gemma3n_layers import INPUTS, STREAMS, block, of_layer
from .gemma4 import IN_SHARED_LAYERS, OUTER, SLOTS
from .gemma4_layers import EPS

_STREAM_NAMES = {
    f"{part}.stream.{i}": f"model.{name}.{i - 1}"
    for i in range(1, 64)
    for part, name in (("beside", "altup_projections"), ("final_norm", "altup_unembed_projections"))
}
ARCHITECTURE = Architecture(
    name="gemma3n",
    releases=("Gemma 3n E2B", "Gemma 3n E4B"),
    matches=("Gemma3nForCausalLM", "Gemma3nTextModel"),
    model_types=("gemma3n_text",),
    dims=replace(
        GEMMA_DIMS,
        kv_heads=Key("num_key_value_heads", 2),
        ffn=Computed(lambda config: int(of_layer(config, "intermediate_size", 0, 16384))),
    ),
    embedding=Embedding(scale=EMBEDDING.scale, beside=INPUTS),
    block=PerLayer(block),
    final_norm=AltUpNorm(eps=EPS, streams=STREAMS),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", 30.0)),
    gguf=GGUF,
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **SLOTS,
            "altup.router": "altup.modality_router",
            "altup.router_norm": "altup.router_norm",
            "altup.predict": "altup.prediction_coefs",
            "altup.correct": "altup.correction_coefs",
            "altup.scale": "altup.correct_output_scale",
            "laurel.left": "laurel.linear_left",
            "laurel.right": "laurel.linear_right",
            "laurel.norm": "laurel.post_laurel_norm",
        },
        outer={**OUTER, **_STREAM_NAMES},
        ignored=(*NAMES.ignored, *IN_SHARED_LAYERS),
    ),
    unused=("altup_coef_clip", "sliding_window", "rope_parameters.*_attention", "rope_local_base_freq", "rope_theta"),
    tiny={
        **TINY,
        "num_hidden_layers": 4, "intermediate_size": [48, 40, 48, 48], "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90, "num_kv_shared_layers": 1,
        "laurel_rank": 4, "altup_num_inputs": 4, "activation_sparsity_pattern": [0.7, 0.5, 0.0, 0.0],
        "layer_types": [f"{s}_attention" for s in ("sliding", "full") * 2],
        "sliding_window": 7, "rope_theta": 1000000.0, "rope_local_base_freq": 300.0,
    },
    variants={
        "defaults": {
            "intermediate_size": 48, "activation_sparsity_pattern": None, "layer_types": None, "rope_theta": None,
            "num_kv_shared_layers": 0, "rope_local_base_freq": None, "sliding_window": None,
        },
        "streams": {
            "num_kv_shared_layers": 2, "altup_num_inputs": 3, "altup_active_idx": 1, "altup_correct_scale": False,
        },
        "released": {  # what llama.cpp knows by heart
            "num_hidden_layers": 2, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": None, "laurel_rank": None, "intermediate_size": 256,
            "activation_sparsity_pattern": [0.95, 0.95],
        },
        "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "transformers-5": {
            "rope_theta": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
)  # fmt: skip
