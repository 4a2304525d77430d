"""The .pth files that RWKV was published in (BlinkDL/rwkv-4-*, rwkv-5-world, rwkv-6-world, rwkv7-g1): weights alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.names import Names, stem_of
from llmkit.errors import InputError
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling, commonest_dtype, to_hf

from . import ARCHITECTURE as RWKV_4
from . import v7_pth
from .v5 import RWKV_5, RWKV_6

NAME = "RWKV .pth"


_SHORT = {
    "rwkv.": "", "blocks.0.pre_ln": "blocks.0.ln0", "embeddings": "emb", "attention.": "att.", "feed_forward.": "ffn.",
    "time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r",
    "time_mix_gate": "time_mix_g",
}  # fmt: skip
_MARKS = ("emb.weight", "blocks.0.att.time_decay", "blocks.0.ffn.key.weight")


def _published(names: Names) -> Names:
    """How BlinkDL's files spell what transformers' users know by these names."""

    def short(name: str) -> str:
        for long, written in _SHORT.items():
            name = name.replace(long, written)
        return name

    return replace(
        names,
        embed=short(names.embed),
        final_norm=short(names.final_norm),
        block=short(names.block),
        outer={slot: short(name) for slot, name in names.outer.items()},
        slots={slot: short(stem_of(entry)) for slot, entry in names.slots.items()},
    )


SPELLINGS = {architecture.name: Spelling(_published(architecture.names)) for architecture in (RWKV_4, RWKV_5, RWKV_6)}


def _config(where: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of one of the published .pth files (ChatRWKV computes float32 and bfloat16 without halving).

    Raises:
        InputError: it is of a version between 4 and 5.2.
    """
    att = {name.removeprefix("blocks.0.att."): shape for name, shape in shapes.items()}
    own: dict[str, Any] = {}
    if "time_maa_x" in att:
        architecture, own["time_mix_extra_dim"] = RWKV_6, att.get("time_maa_w1", (0, 0))[1] // 5
        own["time_decay_extra_dim"] = att.get("time_decay_w1", (0, 0))[1]
    else:
        architecture = RWKV_5 if "time_faaaa" in att else RWKV_4
    if architecture is RWKV_4 and ("ln_x.weight" in att or len(att["time_decay"]) != 1):
        raise InputError(f"{where}: an RWKV of version 5.0 or 5.1, which no plugin describes; 4, 5.2, 6 and 7 are")
    vocab, hidden = shapes["emb.weight"]
    if architecture is not RWKV_4:
        own |= {"head_size": att.get("time_faaaa", (1, 64))[-1], "head_size_divisor": 8}
    return {
        "architectures": list(architecture.matches),
        "model_type": architecture.model_types[0],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "attention_hidden_size": att.get("key.weight", (hidden,))[0],
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
        "context_length": 1024,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **own,
    }


def find(candidate: Candidate) -> OpenedLayout | None:
    """What such a file holds; None for anything else, and where a config.json lies beside it.

    Raises:
        InputError: the tensors are not those of one model of version 4, 5.2, 6 or 7.
    """
    if candidate.main is None or "config.json" in candidate.names:
        return None
    tensors, where = candidate.tensors, str(candidate.main)
    if all(mark in tensors for mark in v7_pth.MARKS):
        described, config = v7_pth.opened(tensors)
        config["torch_dtype"] = commonest_dtype(tensors).torch_name
        return OpenedLayout(NAME, described, config, notes=(f"read from {NAME}, version 7",))
    if not all(mark in tensors for mark in _MARKS):
        return None
    config = _config(where, {name: lazy.shape for name, lazy in tensors.items()})
    config["torch_dtype"] = commonest_dtype(tensors).torch_name
    spelling = SPELLINGS[config["model_type"]]
    return OpenedLayout(NAME, to_hf(where, tensors, config, spelling), config, notes=(f"read from {NAME}",))


LAYOUT = Layout(NAME, find, spellings=tuple(SPELLINGS.values()))
