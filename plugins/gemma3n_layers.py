"""The layers of Gemma 3n, and what goes beside their hidden states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.architecture.altup import AltUpBlock, AltUpInputs, GaussianTopK
from llmkit.architecture.keys import Computed, Key
from llmkit.architecture.kinds import GatedMLP, Kind, RMSNorm, Sandwich, UnitRMS
from llmkit.architecture.layer_inputs import InputGate, KVSharing, NormedValues, SharedKeys, count_in, kv_sharing
from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.errors import SpecError

from .gemma import BIAS
from .gemma2 import ACTIVATION
from .gemma3 import GLOBAL, LOCAL
from .gemma4_layers import EPS, SIZES_OF_INPUTS

STREAMS = Key("altup_num_inputs", 4)
_NORM = RMSNorm(eps=EPS)


def of_layer(config: Mapping[str, Any], key: str, i: int, usual: Any) -> Any:
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


def _sharing(config: Mapping[str, Any]) -> KVSharing:
    layers = range(config["num_hidden_layers"])
    width = 2 * count_in(config, "num_key_value_heads", 2) * count_in(config, "head_dim", 256)
    at = len(layers) * count_in(config, "hidden_size_per_layer_input", 256)
    n_shared = count_in(config, "num_kv_shared_layers", 15)
    return kv_sharing([_is_local(config, i) for i in layers], n_shared, at, [width] * len(layers))


def block(config: Mapping[str, Any], i: int) -> AltUpBlock:
    """Layer `i`."""
    is_local, sharing = _is_local(config, i), _sharing(config)
    width = count_in(config, "hidden_size_per_layer_input", 256)
    common: dict[str, Any] = {
        "qkv_bias": BIAS,
        "out_bias": BIAS,
        "scale": 1.0,
        "window": window_of(config, 512) if is_local else None,
        "qk_norm": replace(_NORM, width="head_dim"),
    }
    attention: Kind = NormedValues(**common, v_norm=UnitRMS(EPS), shared_kv_at=sharing.columns.get(i))
    if i in sharing.sources:
        attention = SharedKeys(**common, source=sharing.sources[i], at=sharing.columns[sharing.sources[i]])
    sparsity = of_layer(config, "activation_sparsity_pattern", i, 0.95 if i < 10 < config["num_hidden_layers"] else 0.0)
    return AltUpBlock(
        norm=_NORM,
        attention=attention,
        position=LOCAL if is_local else GLOBAL,
        mlp=GatedMLP(
            GaussianTopK(ACTIVATION, sparsity) if sparsity else ACTIVATION,
            width=str(of_layer(config, "intermediate_size", i, 16384)),
        ),
        residual=Sandwich(),
        gate=InputGate(ACTIVATION, width, i * width, _NORM),
        streams=STREAMS,
        active=Key("altup_active_idx", 0),
        output_scaled=Key("altup_correct_scale", True),
        rank=Key("laurel_rank", 64),
    )


INPUTS = AltUpInputs(**SIZES_OF_INPUTS, room=Computed(lambda config: _sharing(config).room), streams=STREAMS)
