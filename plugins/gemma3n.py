"""Gemma 3n's text models: four streams of hidden states, per-layer embeddings, shared keys, sparse activations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.altup import AltUpBlock, AltUpInputs, AltUpNorm, GaussianTopK
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.carried import InputGate, Lending, NormedValues, SharedKeys, count_in, lending
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import Embedding, GatedMLP, Head, Kind, PerLayer, RMSNorm, Sandwich, UnitRMS
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.errors import SpecError

from .gemma import BIAS, EMBEDDING, TINY
from .gemma import DIMS as GEMMA_DIMS
from .gemma2 import ACTIVATION, NAMES, cap
from .gemma3 import GLOBAL, LOCAL
from .gemma4 import IN_SHARED_LAYERS, OUTER, SLOTS

_EPS = Key("rms_norm_eps", 1e-6)
_NORM = RMSNorm(eps=_EPS)
_STREAMS = Key("altup_num_inputs", 4)


def _of_layer(config: Mapping[str, Any], key: str, i: int, usual: Any) -> Any:
    """What a list says of layer `i`; a number is all layers'."""
    value = config.get(key)
    if isinstance(value, list) and len(value) <= i:
        raise SpecError(f"config.json: {key} has {len(value)} entries, expected {config['num_hidden_layers']}")
    value = value[i] if isinstance(value, list) else usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"config.json: {key} has {value!r:.60} for layer {i}, expected a number")
    return value


def _is_local(config: Mapping[str, Any], i: int) -> bool:
    return is_sliding(config, i, lambda i: bool((i + 1) % 5))


def _lending(config: Mapping[str, Any]) -> Lending:
    layers = range(config["num_hidden_layers"])
    width = 2 * count_in(config, "num_key_value_heads", 2) * count_in(config, "head_dim", 256)
    at = len(layers) * count_in(config, "hidden_size_per_layer_input", 256)
    n_shared = count_in(config, "num_kv_shared_layers", 15)
    return lending([_is_local(config, i) for i in layers], n_shared, at, [width] * len(layers))


def _block(config: Mapping[str, Any], i: int) -> AltUpBlock:
    is_local, lent, width = _is_local(config, i), _lending(config), count_in(config, "hidden_size_per_layer_input", 256)
    common: dict[str, Any] = {
        "qkv_bias": BIAS,
        "out_bias": BIAS,
        "scale": 1.0,
        "window": window_of(config, 512) if is_local else None,
        "qk_norm": replace(_NORM, width="head_dim"),
    }
    attention: Kind = NormedValues(**common, v_norm=UnitRMS(_EPS), lends_at=lent.columns.get(i))
    if i in lent.sources:
        attention = SharedKeys(**common, source=lent.sources[i], at=lent.columns[lent.sources[i]])
    sparsity = _of_layer(
        config, "activation_sparsity_pattern", i, 0.95 if i < 10 < config["num_hidden_layers"] else 0.0
    )
    return AltUpBlock(
        norm=_NORM,
        attention=attention,
        position=LOCAL if is_local else GLOBAL,
        mlp=GatedMLP(
            GaussianTopK(ACTIVATION, sparsity) if sparsity else ACTIVATION,
            width=str(_of_layer(config, "intermediate_size", i, 16384)),
        ),
        residual=Sandwich(),
        gate=InputGate(ACTIVATION, width, i * width, _NORM),
        streams=_STREAMS,
        active=Key("altup_active_idx", 0),
        output_scaled=Key("altup_correct_scale", True),
        rank=Key("laurel_rank", 64),
    )


_INPUTS = AltUpInputs(
    rows=Key("vocab_size_per_layer_input", 262144),
    layers=Key("num_hidden_layers"),
    width=Key("hidden_size_per_layer_input", 256),
    norm=Computed(lambda config: RMSNorm(_EPS, width=str(count_in(config, "hidden_size_per_layer_input", 256)))),
    room=Computed(lambda config: _lending(config).room),
    streams=_STREAMS,
)
_STREAM_NAMES = {
    f"{part}.stream.{i}": f"model.{name}.{i - 1}"
    for i in range(1, 64)
    for part, name in (("beside", "altup_projections"), ("final_norm", "altup_unembed_projections"))
}
ARCHITECTURE = Architecture(
    name="gemma3n",
    releases=("Gemma 3n E2B", "Gemma 3n E4B"),
    matches=("Gemma3nForCausalLM", "Gemma3nTextModel"),
    model_types=("gemma3n_text",),
    dims=replace(
        GEMMA_DIMS,
        kv_heads=Key("num_key_value_heads", 2),
        ffn=Computed(lambda config: int(_of_layer(config, "intermediate_size", 0, 16384))),
    ),
    embedding=Embedding(scale=EMBEDDING.scale, beside=_INPUTS),
    block=PerLayer(_block),
    final_norm=AltUpNorm(eps=_EPS, streams=_STREAMS),
    head=Head(tied=Key("tie_word_embeddings", True), softcap=cap("final_logit_softcapping", 30.0)),
    no_gguf="not written yet: llama.cpp has it, with a width and a window for each layer",
    names=replace(
        NAMES,
        slots={
            **NAMES.slots,
            **SLOTS,
            "altup.router": "altup.modality_router",
            "altup.router_norm": "altup.router_norm",
            "altup.predict": "altup.prediction_coefs",
            "altup.correct": "altup.correction_coefs",
            "altup.scale": "altup.correct_output_scale",
            "laurel.left": "laurel.linear_left",
            "laurel.right": "laurel.linear_right",
            "laurel.norm": "laurel.post_laurel_norm",
        },
        outer={**OUTER, **_STREAM_NAMES},
        ignored=(*NAMES.ignored, *IN_SHARED_LAYERS),
    ),
    unused=("altup_coef_clip", "sliding_window", "rope_parameters.*_attention", "rope_local_base_freq", "rope_theta"),
    tiny={
        **TINY,
        "num_hidden_layers": 4, "intermediate_size": [48, 40, 48, 48], "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90, "num_kv_shared_layers": 1,
        "laurel_rank": 4, "altup_num_inputs": 4, "activation_sparsity_pattern": [0.7, 0.5, 0.0, 0.0],
        "layer_types": [f"{s}_attention" for s in ("sliding", "full") * 2],
        "sliding_window": 7, "rope_theta": 1000000.0, "rope_local_base_freq": 300.0,
    },
    variants={
        "defaults": {
            "intermediate_size": 48, "activation_sparsity_pattern": None, "layer_types": None, "rope_theta": None,
            "num_kv_shared_layers": 0, "rope_local_base_freq": None, "sliding_window": None,
        },
        "streams": {
            "num_kv_shared_layers": 2, "altup_num_inputs": 3, "altup_active_idx": 1, "altup_correct_scale": False,
        },
        "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "transformers-5": {
            "rope_theta": None,
            "rope_local_base_freq": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
)  # fmt: skip
