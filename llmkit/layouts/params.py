"""The params.json of Meta's releases, and the config.json that says the same.

Source: facebookresearch/llama (llama/model.py: ModelArgs, FeedForward) and meta-llama/llama-models (use_scaled_rope).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import LARGEST_SIZE
from llmkit.architecture.keys import as_float
from llmkit.architecture.model import Model
from llmkit.architecture.positions import Rope
from llmkit.architecture.scaling import Llama3Scaling
from llmkit.errors import InputError, RequirementError
from llmkit.layouts.described import decoder_config
from llmkit.tensors.spec import DType

PARAMS = "params.json"
_LARGEST_NUMBER = 1e30
_MULTIPLES = (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1)
_MULTIPLIERS = (None, 1.3, 1.5, 1.2, 1.0)
_SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SCALED_CONTEXT = 131072
# use_scaled_rope states no factor. It is 8 in Llama 3.1 and 32 in 3.2, whose two sizes (dim, layers) tell it.
_FACTOR, _FACTOR_OF = 8.0, {(2048, 16): 32.0, (3072, 28): 32.0}
# The context is not stated either; by the base of the frequencies (LLaMA 1 and 2, Code Llama, Llama 3).
_CONTEXT_OF = {10000.0: 2048, 1000000.0: 16384, 500000.0: 8192}


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The inner size of the MLP: 8/3 of `dim`, times the multiplier, rounded up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def config_of(where: str, params: Mapping[str, Any], vocab: int, ffn: int, dtype: DType) -> dict[str, Any]:
    """The config.json of a params.json; `vocab` and `ffn` are those of the tensors.

    Raises:
        InputError: a key is missing or no number, or contradicts the tensors.
    """
    dim, layers, heads = (whole(where, params, key) for key in ("dim", "n_layers", "n_heads"))
    stated = params.get("vocab_size", -1)
    if stated not in (-1, vocab):
        raise InputError(
            f"{where}: vocab_size is {stated}, the tensors have {vocab} rows", hint="give the params.json of this model"
        )
    if "multiple_of" in params:
        multiplier = number(where, params, "ffn_dim_multiplier", 0.0) or None
        expected = ffn_size(dim, whole(where, params, "multiple_of"), multiplier)
        if expected != ffn:
            raise InputError(
                f"{where}: dim, multiple_of and ffn_dim_multiplier give feed-forward layers of {expected}, "
                f"the tensors have {ffn}",
                hint="give the params.json of this model",
            )
    theta = number(where, params, "rope_theta", 10000.0)
    scaled = bool(params.get("use_scaled_rope", False))
    has_many = vocab >= 128000  # Llama 3's ids of begin and end; SentencePiece has 1 and 2
    scaling = None
    if scaled:
        factor = number(where, params, "rope_scaling_factor", _FACTOR_OF.get((dim, layers), _FACTOR))
        scaling = {"rope_type": "llama3", "factor": factor, **_SCALED}
    context = _SCALED_CONTEXT if scaled else _CONTEXT_OF.get(theta, 2048)
    return decoder_config(
        hidden=dim,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=None if params.get("n_kv_heads") is None else whole(where, params, "n_kv_heads"),
        vocab=vocab,
        eps=number(where, params, "norm_eps", 1e-5),
        theta=theta,
        scaling=scaling,
        context=whole(where, params, "max_seq_len") if params.get("max_seq_len") else context,
        dtype=dtype,
        bos=128000 if has_many else 1,
        eos=128001 if has_many else 2,
    )


def params_of(model: Model) -> dict[str, Any]:
    """The params.json that comes nearest to a model; what it cannot state is found by translating it back.

    Raises:
        RequirementError: a feed-forward size that params.json cannot state.
    """
    sizes = model.dims
    multiple_of, multiplier = _ffn_terms(sizes.hidden, sizes.ffn)
    params: dict[str, Any] = {"dim": sizes.hidden, "n_layers": sizes.layers, "n_heads": sizes.heads}
    if sizes.kv_heads != sizes.heads:
        params["n_kv_heads"] = sizes.kv_heads
    params["vocab_size"] = sizes.vocab
    params["multiple_of"] = multiple_of
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["norm_eps"] = getattr(model.final_norm, "eps", 1e-6)
    position = getattr(model.block, "position", None)
    if isinstance(position, Rope):
        theta, scaling = as_float(position.theta), position.bound_scaling
        if theta != 10000.0:
            params["rope_theta"] = theta
        if isinstance(scaling, Llama3Scaling):
            params["use_scaled_rope"] = True
            if scaling.factor != _FACTOR_OF.get((sizes.hidden, sizes.layers), _FACTOR):
                params["rope_scaling_factor"] = scaling.factor
    return params


def _ffn_terms(dim: int, ffn: int) -> tuple[int, float | None]:
    for multiplier in _MULTIPLIERS:
        for multiple_of in _MULTIPLES[:3]:
            if ffn_size(dim, multiple_of, multiplier) == ffn:
                return multiple_of, multiplier
    for multiple_of in _MULTIPLES:
        if ffn % multiple_of:
            continue
        for multiplier in (None, round((ffn - multiple_of / 2) / int(2 * (4 * dim) / 3), 6)):
            if ffn_size(dim, multiple_of, multiplier) == ffn:
                return multiple_of, multiplier
    raise RequirementError(
        f"no multiple_of and ffn_dim_multiplier of params.json give feed-forward layers of {ffn} at dim {dim}",
        hint="--to hf or --to bin holds any",
    )


def whole(where: str, params: Mapping[str, Any], key: str) -> int:
    """A positive whole number; InputError for anything else."""
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
        raise InputError(
            f"{where}: {key} is {value!r:.60}, expected a positive whole number",
            hint="give the params.json of this model",
        )
    return value


def number(where: str, params: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0; `default` where the key is absent or null."""
    value = params.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST_NUMBER:
        raise InputError(
            f"{where}: {key} is {value!r:.60}, expected a number above 0", hint="give the params.json of this model"
        )
    return float(value)
