"""The language model inside a model of several modalities: `text_config`, and the tensors that are its own.

transformers publishes such models as `XForConditionalGeneration`, whose config has the decoder's under `text_config`,
and whose tensors have one of several prefixes. Text alone goes through the decoder alone: that is what is computed.
Transforms that keep every tensor see the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.names import NameTable
from llmkit.architecture.registry import find
from llmkit.architecture.storage import single_experts
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.class_config import class_config, is_known_class
from llmkit.checkpoint.embeddings import with_true_tying
from llmkit.checkpoint.order import sort_tensors
from llmkit.checkpoint.quantized import dequantized
from llmkit.checkpoint.spelling import LANGUAGE_MODEL_PREFIXES
from llmkit.errors import SpecError
from llmkit.quantization.codec import CONFIG_KEYS
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType

_SHARED = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", *CONFIG_KEYS)
_TIED = "tie_word_embeddings"


def text_part(ckpt: Checkpoint) -> Checkpoint:
    """The decoder of a model of several modalities, as a checkpoint of its family; any other checkpoint as it is."""
    stated = ckpt.config.get("text_config")
    if not isinstance(stated, Mapping) or find(ckpt.config) is not None:
        return ckpt
    architecture = find({"model_type": stated.get("model_type")})
    if architecture is None:
        return ckpt
    outer = {key: ckpt.config[key] for key in _SHARED if ckpt.config.get(key) is not None}
    own = {key: stated[key] for key in outer if stated.get(key) is not None}
    config = {**_whole(architecture, stated), **outer, **own, "architectures": [architecture.matches[0]]}
    whole = single_experts(ckpt.tensors, architecture.names)
    tensors = _decoder_tensors(architecture, whole)
    tied = ckpt.config.get(_TIED, stated.get(_TIED))
    head = NameTable(architecture.names).name("head.weight").removesuffix("weight")
    if not tied and not any(name.startswith(head) for name in tensors) and is_known_class(ckpt.config):
        tied = class_config(ckpt.config, ckpt.label).tie_word_embeddings
    if tied is not None:
        config[_TIED] = tied
    left = len(whole) - len(tensors)
    note = f"the text part of {ckpt.label} ({architecture.name}); {left} tensors of other parts are left out"
    return with_true_tying(ckpt.derive(tensors=sort_tensors(tensors), config=config, notes=[note]))


def float_text_part(ckpt: Checkpoint, *, dtype: DType | None = None) -> Checkpoint:
    """The decoder in floats: a config names quantized modules as the whole model does, so they are restored first.

    Args:
        dtype: of the restored weights, as of `dequantized`.

    Raises:
        RequirementError, SpecError: as of `dequantized`.
    """
    return text_part(dequantized(ckpt, dtype=dtype))


def _whole(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what it leaves to the defaults of transformers' class (as Gemma 3's published ones do)."""
    try:
        architecture.bind(config)
    except SpecError:
        if is_known_class(config):
            full = class_config(config, "config.json").to_dict()
            return {key: value for key, value in full.items() if not key.startswith("_")}
    return dict(config)


def _decoder_tensors(architecture: Architecture, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Those that the family's name table knows, under the beginning that finds most."""
    tables = [NameTable(names) for names in (architecture.names, architecture.names.without_stacks)]

    def renamed(prefixes: Mapping[str, str]) -> dict[str, Lazy]:
        named = {}
        for name, lazy in tensors.items():
            start = next((b for b in prefixes if name.startswith(b)), "")
            full_name = prefixes.get(start, "") + name.removeprefix(start)
            if any(table.slot(full_name) is not None for table in tables):
                named[full_name] = lazy
        return named

    return max(map(renamed, LANGUAGE_MODEL_PREFIXES), key=len)
