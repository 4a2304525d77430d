"""DeepSeek-V3, R1, Moonlight and Kimi K2: V2 with experts chosen by sigmoids and a correction of them."""

from dataclasses import replace

from llmkit.architecture.experts import Router
from llmkit.architecture.keys import Key

from . import latent
from .deepseek2 import ARCHITECTURE as V2
from .deepseek2 import NAMES, TINY, YARN, blocks
from .deepseek_gguf import GGUF_V3

ROUTER = Router(
    count=Key("n_routed_experts", 256),
    top_k=Key("num_experts_per_tok", 8),
    scores="sigmoid",
    is_normalized=Key("norm_topk_prob", True),
    epsilon=1e-20,
    scale=Key("routed_scaling_factor", 2.5),
    correction=True,
    groups=Key("n_group", 8),
    top_groups=Key("topk_group", 4),
    group_score="top2",
    is_single=True,
)

ARCHITECTURE = replace(
    V2,
    name="deepseek3",
    releases=("DeepSeek-V3", "DeepSeek-R1", "Moonlight", "Kimi K2"),
    matches=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3", "kimi_k2"),
    dims=latent.dims({"expert_ffn": Key("moe_intermediate_size", 2048)}),
    block=blocks(ROUTER, n_dense=3),
    # The layers after the last, which guess further tokens.
    names=replace(NAMES, ignored=(*NAMES.ignored, "model.layers.61.*")),
    gguf=GGUF_V3,
    fixed={**latent.ONE_KEY_EACH, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    tiny={
        **TINY, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,

    },
    variants={
        "plain-queries": {"q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False, "n_shared_experts": 1},
        "no-groups": {"n_group": 1, "topk_group": 1},
        "yarn": YARN,
    },
)  # fmt: skip
