"""The .pth files that RWKV-4 and RWKV-7 were published in (BlinkDL/rwkv-4-*, rwkv7-g1): weights and nothing else."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.names import Names
from llmkit.errors import InputError
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Layout, Opened, Spelling, commonest_dtype, to_hf

from . import v7_pth

NAME = "RWKV .pth"


def _config(where: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of one of the published .pth files (ChatRWKV computes float32 and bfloat16 without halving)."""
    if len(shapes["blocks.0.att.time_decay"]) != 1:
        raise InputError(
            f"{where}: blocks.0.att.time_decay has more than one dimension: an RWKV of version 5 or later, "
            "which no plugin describes"
        )
    vocab, hidden = shapes["emb.weight"]
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "attention_hidden_size": shapes["blocks.0.att.time_decay"][0],
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        "context_length": 1024,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


_MIXES = {"key": "time_mix_k", "value": "time_mix_v", "receptance": "time_mix_r"}
_MARKS = ("emb.weight", "blocks.0.att.time_decay", "blocks.0.ffn.key.weight")
SPELLING = Spelling(
    Names(
        embed="emb",
        final_norm="ln_out",
        head="head",
        block="blocks.{i}.",
        outer={"embed_norm": "blocks.0.ln0"},
        slots={
            "attn_norm": "ln1",
            "mlp_norm": "ln2",
            **{f"attn.mix_{long}": f"att.{short}" for long, short in _MIXES.items()},
            **{f"mlp.mix_{long}": f"ffn.{short}" for long, short in _MIXES.items() if long != "value"},
            "attn.decay": "att.time_decay",
            "attn.first": "att.time_first",
            "attn.k": "att.key",
            "attn.v": "att.value",
            "attn.r": "att.receptance",
            "attn.o": "att.output",
            "mlp.key": "ffn.key",
            "mlp.value": "ffn.value",
            "mlp.receptance": "ffn.receptance",
        },
    ),
)


def find(candidate: Candidate) -> Opened | None:
    """What such a file holds; None for anything else, and where a config.json lies beside it.

    Raises:
        InputError: the tensors are not those of one model of version 4 or 7.
    """
    if candidate.main is None or "config.json" in candidate.names:
        return None
    tensors, where = candidate.tensors, str(candidate.main)
    if all(mark in tensors for mark in v7_pth.MARKS):
        described, config = v7_pth.opened(tensors)
        config["torch_dtype"] = commonest_dtype(tensors).torch_name
        return Opened(NAME, described, config, notes=(f"read from {NAME}, version 7",))
    if not all(mark in tensors for mark in _MARKS):
        return None
    config = _config(where, {name: lazy.shape for name, lazy in tensors.items()})
    config["torch_dtype"] = commonest_dtype(tensors).torch_name
    return Opened(NAME, to_hf(where, tensors, config, SPELLING), config, notes=(f"read from {NAME}",))


LAYOUT = Layout(NAME, find, spellings=(SPELLING,))
