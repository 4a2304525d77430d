"""YaRN's two factors in GGUF files of models with latent attention: on cos and sin, and on all scores.

Cos and sin are multiplied by c, scores by the square of t. With f the context's factor and g(m) = 1 + m ln(f) / 10,
transformers makes c = g(mscale) / g(mscale_all_dim) and t = g(mscale_all_dim). llama.cpp (src/llama-context.cpp,
src/models/deepseek2.cpp) makes c = a r and t = c g(l) of a, `rope.scaling.attn_factor`, and l, which is ten times
`rope.scaling.yarn_log_multiplier`; r is g(1) / g(l), and 1 where it takes l for both mscales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmkit.architecture.frequencies import yarn_factor
from llmkit.architecture.keys import as_float
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.model import Model
from llmkit.architecture.positions import Rope
from llmkit.architecture.scaling import Yarn

_LOG, _FACTOR = "rope.scaling.yarn_log_multiplier", "rope.scaling.attn_factor"


def yarn_metadata(model: Model, *, takes_both: bool) -> dict[str, float | None]:
    """What a model with YaRN adds; `takes_both`: llama.cpp takes one number for the two (`deepseek2`)."""
    found = _factors(model)
    if found is None:
        return {}
    scaling, c, t = found
    tenth = math.log(scaling.factor) / 10
    multiplier = (t / c - 1) / tenth if scaling.factor > 1 else 0.0
    stated = c / _ratio(multiplier, tenth, takes_both=takes_both)
    return {_LOG: multiplier / 10, _FACTOR: None if math.isclose(stated, 1.0, rel_tol=1e-9) else stated}


def yarn_config(metadata: Mapping[str, Any], *, takes_both: bool) -> dict[str, Any]:
    """`rope_scaling` of a file with YaRN; {} without."""
    factor = metadata.get("rope.scaling.factor")
    if metadata.get("rope.scaling.type") != "yarn" or not factor:
        return {}
    keys = {"factor": "factor", "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}  # fmt: skip
    found = {name: metadata[f"rope.scaling.{key}"] for key, name in keys.items() if f"rope.scaling.{key}" in metadata}
    config = {name: round(value, 6) for name, value in found.items()}
    return {"rope_scaling": {"rope_type": "yarn", **config, **_mscales(metadata, factor, takes_both=takes_both)}}


def _mscales(metadata: Mapping[str, Any], factor: float, *, takes_both: bool) -> dict[str, float]:
    if factor <= 1:
        return {}
    tenth, multiplier = math.log(factor) / 10, 10 * metadata.get(_LOG, 0.0)
    c = metadata.get(_FACTOR, 1.0) * _ratio(round(multiplier, 6), tenth, takes_both=takes_both)
    t = c * (1 + multiplier * tenth)
    mscale, of_all = round((c * t - 1) / tenth, 5), round((t - 1) / tenth, 5)
    stated = metadata.get("rope.scaling.yarn_attn_factor")
    if stated is not None:
        return {"attention_factor": round(stated, 6)} | ({"mscale_all_dim": of_all} if of_all else {})
    if mscale > 0 and of_all > 0:
        return {"mscale": mscale, "mscale_all_dim": of_all}
    is_usual = math.isclose(c, 1 + tenth, rel_tol=1e-5)
    return ({} if is_usual else {"attention_factor": c}) | ({"mscale_all_dim": of_all} if of_all else {})


def needs_yarn_to_stretch(model: Model) -> str | None:
    """Why llama.cpp cannot run a model whose YaRN stretches nothing and has a factor all the same."""
    found = _factors(model)
    is_odd = found is not None and found[0].factor <= 1 and (found[1], found[2]) != (1.0, 1.0)
    return "its YaRN multiplies cos and sin, for a context that is no longer" if is_odd else None


def _factors(model: Model) -> tuple[Yarn, float, float] | None:
    """The scaling, c and t of the first layer with rotary latent attention."""
    for block in model.blocks:
        position, attention = getattr(block, "position", None), getattr(block, "attention", None)
        scaling = position.bound_scaling if isinstance(position, Rope) else None
        if isinstance(scaling, Yarn) and isinstance(attention, LatentAttention):
            return scaling, yarn_factor(scaling), as_float(attention.temperature)
    return None


def _ratio(multiplier: float, tenth: float, *, takes_both: bool) -> float:
    if multiplier == 0:
        return 1 + tenth
    is_one = takes_both or multiplier == 1
    return 1.0 if is_one else (1 + tenth) / (1 + multiplier * tenth)
