"""Between GGUF metadata and config.json, for any family: the sizes, and the values of the kinds."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.frequencies import llama3_scaled
from llmkit.architecture.gguf import CONFIG_KEYS, GgufFamily, Metadata, main_block, mixture_of
from llmkit.architecture.keys import Key, as_float
from llmkit.architecture.kinds import Alibi, Block, LayerNorm, RMSNorm, Rope
from llmkit.architecture.model import Model
from llmkit.architecture.scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRope,
    NoScaling,
    Proportional,
    Scaling,
    Yarn,
    method_of,
)
from llmkit.errors import InputError, RequirementError
from llmkit.formats.json_text import parse_object
from llmkit.lazy_imports import np

NOTED = "llmkit.config"
"""Metadata key: keys of config.json that GGUF has no place for, as JSON."""
Load = Callable[[str], list[float] | None]
_YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_CONTEXT = 2048  # where nothing states it
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_STILL = 1e30  # what a frequency is divided by for a pair that does not turn
# factor, low_freq_factor, high_freq_factor, original context of the published models with frequencies of Llama 3.1.
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 4.0, 8192))


def architecture_of(metadata: Metadata, names: Collection[str]) -> Architecture | None:
    """The family that reads a file with these metadata and tensors, or None when no plugin describes it."""
    arch = metadata.get("general.architecture")
    stripped = _stripped(metadata, str(arch))
    has_experts = bool(stripped.get("expert_count"))
    of_arch = [a for a in _families() if a.gguf is not None and a.gguf.arch == arch]
    same = [a for a in of_arch if _has_experts(a) == has_experts]
    same = same or [a for a in of_arch if any(_has_experts(a, variant) == has_experts for variant in a.variants)]
    claiming = [a for a in same if a.gguf is not None and a.gguf.claims is not None and a.gguf.claims(stripped, names)]
    general = [a for a in same if a.gguf is not None and a.gguf.claims is None]
    return next(iter([*claiming, *general]), None)


def family_of(architecture: Architecture, metadata: Metadata, names: Collection[str]) -> GgufFamily | None:
    """How a file of a family that has these metadata and tensors has them; None where the family has no files."""
    family = architecture.gguf
    return None if family is None else family.of_file(_stripped(metadata, family.arch), names)


def _families() -> Iterator[Architecture]:
    for loaded in registry.default_registry().load_all().values():
        if isinstance(loaded, Architecture):
            yield loaded


def _has_experts(architecture: Architecture, variant: str | None = None) -> bool:
    return any(map(mixture_of, architecture.bind(architecture.tiny_config(variant)).blocks))


def _stripped(metadata: Metadata, arch: str) -> dict[str, Any]:
    return {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if not key.startswith("general.")}


def config_of(
    metadata: Metadata,
    architecture: Architecture,
    family: GgufFamily,
    names: Collection[str],
    vocab: int,
    load: Load,
) -> dict[str, Any]:
    """The config.json that a file's metadata stand for.

    Args:
        names: of the tensors there are.
        vocab: rows of the embedding.
        load: the values of a constant tensor by name, None where there is none.
    """
    values = _stripped(metadata, family.arch) | {"vocab_size": vocab}
    config: dict[str, Any] = {k: architecture.tiny[k] for k in ("architectures", "model_type")}
    config |= deepcopy(dict(family.config))
    config |= {key: name in names for key, name in family.flags.items()}
    for key, name in {**CONFIG_KEYS, **family.keys}.items():
        value = values.get(key)
        if name and isinstance(value, list):
            raise InputError(f"{family.arch}.{key} differs from layer to layer, which no plugin describes")
        if name and value is not None:
            _put(config, name, shortest(value) if isinstance(value, float) else value)
    vocab_key = architecture.dims.vocab
    config[vocab_key if isinstance(vocab_key, str) else "vocab_size"] = vocab
    scaling = _scaling_config(values, load)
    for key, value in (scaling or {}).items():
        _put(config, f"{family.scaling}.{key}", value)
    if isinstance(architecture.head.tied, Key):
        config[architecture.head.tied.spellings[0]] = "output.weight" not in names
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        value = values.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int):
            config[name] = value
    if family.read is not None:
        config |= family.read(values)
    if family.read_names is not None:
        config |= family.read_names(values, names)
    return config | _noted(values)


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *objects, key = path.split(".")
    for name in objects:
        config = config.setdefault(name, {})
    config[key] = value


def _noted(metadata: Metadata) -> dict[str, Any]:
    try:
        return parse_object(str(metadata.get(NOTED, "{}")), NOTED)
    except InputError:
        return {}


def shortest(value: float) -> float:
    """The float64 with the fewest digits that is the float32 `value`: 1e-06 for what is stored of 1e-06."""
    for digits in range(1, 10):
        near = float(f"{value:.{digits}g}")
        if _float32(near) == value:
            return near
    return value


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def _scaling_config(metadata: Metadata, load: Load) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    original = metadata.get("rope.scaling.original_context_length")
    if kind == "yarn" and factor:
        more = {name: shortest(metadata[key]) for key, name in _YARN.items() if key in metadata}
        config = {"rope_type": "yarn", "factor": shortest(factor), **more}
        return config | ({"original_max_position_embeddings": original} if original else {})
    long, short = load("rope_factors_long.weight"), load("rope_factors_short.weight")
    if long is not None and short is not None:
        config = {
            "rope_type": "longrope",
            "long_factor": [*map(shortest, long)],
            "short_factor": [*map(shortest, short)],
        }
        stated = metadata.get("rope.scaling.attn_factor")
        if stated is not None and not _is_usual_factor(stated, metadata.get("context_length"), original):
            config["attention_factor"] = shortest(stated)
        return config | ({"original_max_position_embeddings": original} if original else {})
    if kind in ("linear", None) and factor and factor != 1.0:
        return {"rope_type": "linear", "factor": shortest(factor)}
    factors = load("rope_freqs.weight")
    if factors and all(factor == 1.0 or factor >= _STILL for factor in factors):
        turning, n = factors.count(1.0), len(factors)
        share = turning / n if int(turning / n * n) == turning else (turning + 0.5) / n
        return {"rope_type": "proportional", "partial_rotary_factor": share}
    return _llama3_config(metadata, factors) if factors is not None else None


def _is_usual_factor(stated: float, context: int | None, original: int | None) -> bool:
    """Whether LongRoPE's factor of cos and sin is the one that follows from the two contexts."""
    if not context or not original or original < 2:
        return False
    usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
    return math.isclose(stated, usual, rel_tol=1e-6)


def _llama3_config(metadata: Metadata, factors: list[float]) -> dict[str, Any]:
    """The parameters of Llama 3.1's frequencies: noted by llmkit, or those of a published model that give the same."""
    theta, n = float(metadata.get("rope.freq_base", 10000.0)), 2 * len(factors)
    noted = metadata.get("llmkit.rope_scaling")
    candidates = [tuple(noted)] if isinstance(noted, list) and len(noted) == 4 else list(_LLAMA3)
    for factor, low, high, original in candidates:
        scaling = Llama3Scaling(float(factor), float(low), float(high), int(original))
        wanted = llama3_factors(scaling, theta, n)
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(wanted, factors, strict=True)):
            return {
                "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": int(original),
            }  # fmt: skip
    raise RequirementError(
        "rope_freqs.weight scales the rotary frequencies in a way that none of the known parameters of Llama 3.1's "
        "method gives",
        hint="start from the original checkpoint, whose config.json states them",
    )


def llama3_factors(scaling: Llama3Scaling, theta: float, n: int) -> list[float]:
    """What each of the n/2 rotary frequencies is divided by (Llama 3.1)."""
    inverse = theta ** (-np.arange(0, n, 2) / n)
    factors: list[float] = (inverse / llama3_scaled(inverse, scaling)).tolist()
    return factors


def metadata_of(model: Model, config: Mapping[str, Any], family: GgufFamily) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a model, with the prefix of its architecture, and warnings about what they cannot express."""
    dims = model.dims
    warnings: list[str] = []
    metadata: dict[str, Any] = {
        "context_length": dims.context, "embedding_length": dims.hidden, "block_count": dims.layers,
        "feed_forward_length": dims.ffn, "attention.head_count": dims.heads, "attention.head_count_kv": dims.kv_heads,
        "vocab_size": dims.vocab,
    }  # fmt: skip
    if dims.head_dim * dims.heads != dims.hidden or config.get("head_dim"):
        metadata |= {"attention.key_length": dims.head_dim, "attention.value_length": dims.head_dim}
    own = family.write(model, config) if family.write is not None else {}
    norm = model.final_norm
    if isinstance(norm, RMSNorm):
        metadata["attention.layer_norm_rms_epsilon"] = norm.epsilon
    elif isinstance(norm, LayerNorm):
        metadata["attention.layer_norm_epsilon"] = norm.epsilon
    main = main_block(model)
    if isinstance(main, Block):
        if isinstance(main.position, Rope):
            rope = main.position
            metadata["rope.dimension_count"] = rope.rotated(dims.head_dim)
            metadata["rope.freq_base"] = rope.base
            metadata |= _scaling_metadata(rope.bound_scaling, own, warnings)
        elif isinstance(main.position, Alibi):
            metadata["attention.max_alibi_bias"] = as_float(main.position.steepness)
        attention = main.attention
        if isinstance(attention, GroupedQuery):
            metadata["attn_logit_softcapping"] = attention.softcap
            metadata["attention.clamp_kqv"] = attention.limit
            metadata["attention.sliding_window"] = window = _window(model)
            if window is not None and not family.has_windows and (dims.context is None or window < dims.context):
                warnings.append(f"llama.cpp runs {family.arch} models without a sliding window; this one has {window}")
    metadata |= _of_experts(model)
    metadata["final_logit_softcapping"] = model.head.softcap
    metadata |= own
    if metadata["context_length"] is None:
        metadata["context_length"] = _CONTEXT
        key = model.dims.keys["context"]
        warnings.append(f"config.json states no context ({key}), which llama.cpp needs: {_CONTEXT} tokens are written")
    return {
        k if k.startswith("llmkit.") else f"{family.arch}.{k}": v for k, v in metadata.items() if v is not None
    }, warnings


def _of_experts(model: Model) -> dict[str, Any]:
    experts = next(filter(None, map(mixture_of, model.blocks)), None)
    if experts is None:
        return {}
    shared = experts.shared and model.dims.evaluate(experts.shared)
    return {
        "expert_count": experts.n_experts, "expert_used_count": experts.router.n_chosen,
        "expert_feed_forward_length": model.dims.evaluate(experts.width), "expert_shared_feed_forward_length": shared,
    }  # fmt: skip


def _window(model: Model) -> int | None:
    attentions = [getattr(block, "attention", None) for block in model.blocks]
    windows = [a.window for a in attentions if isinstance(a, GroupedQuery) and isinstance(a.window, int)]
    return windows[0] if windows else None


def _scaling_metadata(scaling: Scaling, own: Metadata, warnings: list[str]) -> dict[str, Any]:
    if isinstance(scaling, NoScaling):
        return {}
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        noted = (
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            float(scaling.original_max_position),
        )
        return {"llmkit.rope_scaling": list(noted)}
    if isinstance(scaling, LongRope):
        return {
            "rope.scaling.type": "longrope", "rope.scaling.attn_factor": scaling.attention_factor,
            "rope.scaling.original_context_length": scaling.max_position,
        }  # fmt: skip
    if isinstance(scaling, Yarn):
        has_mscale = scaling.mscale is not None or scaling.mscale_all_dim is not None
        if (has_mscale and "rope.scaling.yarn_log_multiplier" not in own) or not scaling.truncate:
            warnings.append(
                "GGUF has no place for mscale and truncate of the YaRN scaling: llama.cpp will not see them"
            )
        if (scaling.beta_fast, scaling.beta_slow) != (_BETA_FAST, _BETA_SLOW):
            warnings.append(
                "llama.cpp reads YaRN's beta_fast and beta_slow of few architectures: it runs others with "
                f"{_BETA_FAST:g} and {_BETA_SLOW:g}, this model has {scaling.beta_fast:g} and {scaling.beta_slow:g}"
            )
        return {
            "rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.yarn_attn_factor": scaling.attention_factor,
            # What llama.cpp multiplies its own 1 + 0.1 ln(factor) by; of the key above it makes nothing.
            "rope.scaling.attn_factor": None
            if scaling.attention_factor is None
            else scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor)),
            "rope.scaling.yarn_beta_fast": scaling.beta_fast, "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }  # fmt: skip
    if isinstance(scaling, Proportional) and scaling.factor == 1.0:
        return {}
    warnings.append(f"GGUF has no place for the RoPE scaling {method_of(scaling)!r}: llama.cpp will run without it")
    return {}


def rope_factors(model: Model) -> dict[str, list[float]]:
    """The constant tensors that a model's rotary scaling needs in a file, by name."""
    position = getattr(main_block(model), "position", None)
    if not isinstance(position, Rope):
        return {}
    scaling = position.bound_scaling
    if isinstance(scaling, Llama3Scaling):
        n = position.rotated(model.dims.head_dim)
        return {"rope_freqs.weight": llama3_factors(scaling, position.base, n)}
    if isinstance(scaling, Proportional):
        pairs = model.dims.evaluate(position.size) // 2
        return {"rope_freqs.weight": [1.0 if j < int(scaling.share * pairs) else _STILL for j in range(pairs)]}
    if isinstance(scaling, LongRope):
        return {
            "rope_factors_long.weight": list(scaling.long_factor),
            "rope_factors_short.weight": list(scaling.short_factor),
        }
    return {}
