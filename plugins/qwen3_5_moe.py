"""Qwen3.5 with experts, whose matrices files hold in three dimensions."""

from dataclasses import replace

from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import PerLayer
from llmkit.architecture.names import Stacked

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
            **{slot: entry for slot, entry in MLP.items() if "{e}" not in slot},
            "mlp.experts.gate_up": Stacked("mlp.experts.gate_up_proj", ("gate", "up")),
            "mlp.experts.down": Stacked("mlp.experts.down_proj", ("down",)),
        },
    ),
    unused=(*UNUSED, "output_router_logits"),
    tiny=MOE_TINY,
    variants=VARIANTS,
)
