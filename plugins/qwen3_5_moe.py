"""Qwen3.5 with experts."""

from dataclasses import replace

from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import PerLayer

from .delta_gguf import GGUF_MOE
from .qwen3_5 import ARCHITECTURE as QWEN3_5
from .qwen3_5 import UNUSED, VARIANTS, mixer
from .qwen3_next import MLP, MOE_DIMS, MOE_TINY, experts_of

ARCHITECTURE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    releases=("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"),
    matches=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"),
    model_types=("qwen3_5_moe_text",),
    dims=replace(MOE_DIMS, ffn=Key("moe_intermediate_size", 512)),
    block=PerLayer(lambda config, i: mixer(config, i, experts_of(256, 8, True))),
    names=replace(
        QWEN3_5.names,
        slots={
            **QWEN3_5.names.slots,
            **MLP,
        },
    ),
    gguf=GGUF_MOE,
    unused=(*UNUSED, "output_router_logits"),
    tiny=MOE_TINY,
    variants=VARIANTS,
)
