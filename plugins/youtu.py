"""Youtu-LLM: DeepSeek-V3's latent attention in dense layers."""

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import GatedMLP, Head, PerLayer

from . import latent
from .deepseek2 import ACTIVATION

ARCHITECTURE = Architecture(
    name="youtu",
    releases=("Youtu-LLM-2B",),
    matches=("YoutuForCausalLM",),
    model_types=("youtu",),
    dims=latent.dims({}),
    block=PerLayer(lambda config, i: latent.block(config, GatedMLP(ACTIVATION))),
    head=Head(tied=Key("tie_word_embeddings", True)),
    names=latent.NAMES,
    fixed={**latent.ONE_KEY_EACH, "mlp_bias": False},
    unused=(*latent.FOLLOWING, "embedding_initializer_range"),
    tiny={**latent.TINY, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    variants={
        "half": {"rope_interleave": False, "q_lora_rank": None, "tie_word_embeddings": False, "attention_bias": True},
    },
)
