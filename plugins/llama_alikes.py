"""Models that are Llama by another name, published with code of their own: XVERSE, Aquila, Skywork and the first Yi.

Each is the llama plugin with what its code has otherwise. transformers has none of these classes: its Llama stands for
them (`equivalents`), and outputs of the originals are recorded in tests/golden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.keys import Computed, Key, lookup, respelled
from llmkit.architecture.kinds import RMSNorm, Rope
from llmkit.architecture.scaling import NoScaling, Scaling, scaling_of

from .llama import ARCHITECTURE as LLAMA
from .llama import BLOCK, GGUF, NAMES, TINY

_THETA = Key("rope_theta", 10000.0)


def as_llama(config: Mapping[str, Any], *left_out: str, **values: Any) -> dict[str, Any]:
    """The config of the same model as transformers' Llama, without keys of its own and with others."""
    gone = dict.fromkeys(("auto_map", "tokenizer_class", *left_out), "")
    return respelled(config, "LlamaForCausalLM", "llama", gone, **values)


def alike(
    name: str,
    releases: tuple[str, ...],
    matches: tuple[str, ...],
    model_type: str,
    same: Callable[[Mapping[str, Any]], dict[str, Any]] = as_llama,
    **changes: Any,
) -> Architecture:
    """Llama under another name, with changes; most of them are Llama to llama.cpp, too (`--as llama`)."""
    return replace(
        LLAMA,
        **{
            "name": name,
            "releases": releases,
            "matches": matches,
            "model_types": (model_type,),
            "equivalents": {"llama": same},
            "reference_config": same,
            "gguf": None,
            "no_gguf": "llama.cpp knows it as Llama: convert it --as llama first",
            "tiny": {**TINY, "rms_norm_eps": 1e-5},
            "variants": {},
            **changes,
        },
    )


XVERSE = alike(
    "xverse",
    ("XVERSE-7B", "XVERSE-13B", "XVERSE-65B"),
    ("XverseForCausalLM",),
    "xverse",
    block=BLOCK,
    unused=("max_tokenizer_truncation",),
    gguf=replace(GGUF, arch="xverse", flags={}, has_own_head=True),
)
AQUILA = alike(
    "aquila", ("Aquila-7B", "Aquila2-7B", "Aquila2-34B"), ("AquilaForCausalLM", "AquilaModel"), "aquila", block=BLOCK
)


def _yi(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_key_value_heads": 4, "rope_theta": 5e6, "rms_norm_eps": 1e-5} | as_llama(config)


YI = alike(
    "yi",
    ("Yi-6B", "Yi-34B"),
    ("YiForCausalLM",),
    "Yi",
    _yi,
    dims=replace(LLAMA.dims, kv_heads=Key("num_key_value_heads", 4)),
    block=replace(
        BLOCK,
        norm=RMSNorm(eps=Key("rms_norm_eps", 1e-5)),
        position=Rope(theta=Key("rope_theta", 5e6), scaling=NoScaling()),
    ),
    names=replace(NAMES, slots={**NAMES.slots, "attn_norm": "ln1", "mlp_norm": "ln2"}),
    reference_config=None,
)


def _is_ntk(config: Mapping[str, Any]) -> bool:
    """Skywork's scaling `ntk`: the base is multiplied by the factor, for every length."""
    return (config.get("rope_scaling") or {}).get("type") == "ntk"


def _theta(config: Mapping[str, Any]) -> float:
    theta = float(lookup(_THETA, config))
    return theta * config["rope_scaling"]["factor"] if _is_ntk(config) else theta


def _scaling(config: Mapping[str, Any]) -> Scaling:
    return NoScaling() if _is_ntk(config) else scaling_of(config.get("rope_scaling"), config)


SKYWORK = alike(
    "skywork",
    ("Skywork-13B",),
    ("SkyworkForCausalLM",),
    "skywork",
    lambda config: as_llama(
        config, rope_theta=_theta(config), rope_scaling=None if _is_ntk(config) else config.get("rope_scaling")
    ),
    block=replace(BLOCK, position=Rope(theta=Computed(_theta), scaling=Computed(_scaling))),
    variants={"ntk": {"rope_scaling": {"type": "ntk", "factor": 8.0}}},
)
