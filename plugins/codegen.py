"""CodeGen (Nijkamp et al. 2022), and MOSS (Fudan 2023), which was trained from it: GPT-J's layers with q, v, k as one.

The rows of that matrix lie as four machines had them: in each quarter those of q, then of v, then of k. transformers
has no class of MOSS; its outputs are recorded in tests/golden. Source: modeling_moss.py (OpenMOSS/MOSS).
"""

from __future__ import annotations

from dataclasses import replace

from llmkit.architecture.architecture import NOT_IN_GGUF
from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.architecture.names import Fused

from .gpt2 import HIDDEN
from .gptj import ARCHITECTURE as GPTJ
from .gptj import BLOCK, HEAD_DIM

_SHARE = Computed(lambda config: lookup(Key("rotary_dim", 64), config) / lookup(HEAD_DIM, config))

ARCHITECTURE = replace(
    GPTJ,
    name="codegen",
    releases=("CodeGen", "CodeGen2"),
    matches=("CodeGenForCausalLM", "CodeGenModel"),
    model_types=("codegen",),
    dims=replace(
        GPTJ.dims, extra={"shards": Computed(lambda config: lookup(HIDDEN, config) // (lookup(HIDDEN, config) // 4))}
    ),
    block=replace(BLOCK, position=replace(BLOCK.position, share=_SHARE)),
    unused=("gradient_checkpointing", "scale_attn_weights"),
    names=replace(
        GPTJ.names,
        slots={
            "attn_norm": "ln_1",
            "attn.qkv": Fused("attn.qkv_proj", ("q", "v", "k"), rows="per_group", groups="shards"),
            "attn.o": "attn.out_proj",
            "mlp.up": "mlp.fc_in",
            "mlp.down": "mlp.fc_out",
        },
        ignored=("*.attn.causal_mask",),
    ),
    no_gguf=NOT_IN_GGUF,
    tiny={**GPTJ.tiny, "architectures": ["CodeGenForCausalLM"], "model_type": "codegen", "n_embd": 32},
    variants={"wide-heads": {"n_embd": 64, "rotary_dim": 16, "n_inner": 48}},
)

MOSS = replace(
    ARCHITECTURE,
    name="moss",
    releases=("MOSS-003",),
    matches=("MossForCausalLM",),
    model_types=("moss",),
    described_as=lambda config: {**config, "architectures": ["CodeGenForCausalLM"], "model_type": "codegen"},
    fixed={"wbits": 32},
    unused=(*ARCHITECTURE.unused, "groupsize"),
    tiny={**ARCHITECTURE.tiny, "architectures": ["MossForCausalLM"], "model_type": "moss", "wbits": 32},
    variants={},
)
