"""lit-llama's checkpoints (`lit-llama.pth`): q, k and v in one tensor, rotary pairs interleaved, no description.

Source: Lightning-AI/lit-llama (lit_llama/model.py, scripts/convert_hf_checkpoint.py).
"""

from __future__ import annotations

from llmkit.architecture.names import Fused, Names
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import opened_by_names
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling

NAME = "lit-llama"
SPELLING = Spelling(
    Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={
            "attn_norm.weight": "rms_1.scale",
            "attn.qkv": Fused("attn.c_attn", parts=("q", "k", "v")),
            "attn.o": "attn.c_proj",
            "mlp_norm.weight": "rms_2.scale",
            "mlp.gate": "mlp.c_fc1",
            "mlp.up": "mlp.c_fc2",
            "mlp.down": "mlp.c_proj",
        },
        outer={"final_norm.weight": "transformer.ln_f.scale"},
        ignored=("*.rope_cache", "*.mask_cache"),
    ),
    "interleaved",
)
_MARKS = ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.rms_1.scale")


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a file of lit-llama holds; None for anything else.

    Raises:
        InputError: the tensors are not those of one model.
    """
    if candidate.main is None or not all(mark in candidate.tensors for mark in _MARKS):
        return None
    return opened_by_names(NAME, candidate, candidate.main, candidate.tensors, SPELLING)


LAYOUT = Layout(NAME, find, spellings=(SPELLING,))
