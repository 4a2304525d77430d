"""GGUF files, one or the parts of a split one, as transformers would lay them out: names, row orders, config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.gguf import CONSTANT_TENSORS, GgufFamily
from llmkit.errors import InputError, SpecError
from llmkit.formats.folder import is_weight_file
from llmkit.formats.gguf_files import GgufModel, find_gguf, looks_like, read_model
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.gguf_values import architecture_of, config_of, family_of
from llmkit.layouts.gguf_weights import from_gguf, lists_from_metadata
from llmkit.layouts.layout import Layout, OpenedLayout, plain_model
from llmkit.quantization.codecs.gguf import stored_tensor
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.tensors.vectors import cast_vector

NAME = "gguf"
SOURCE_DTYPE = "llmkit.source_dtype"
"""Metadata key: the float dtype of all tensors of the original, whose vectors were widened to float32."""
_MALFORMED = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)
_SHOWN_VALUES = 16  # longer lists are shown by their length


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a GGUF file holds, or a folder that has no other weights; None for anything else.

    Raises:
        InputError: a malformed file, missing parts, several models.
        RequirementError: a quantization, or a scaling of positions, that is not read.
    """
    path = candidate.path
    if path.is_file():
        return read(path) if looks_like(candidate.head) else None
    if any(is_weight_file(n) and not n.endswith(".gguf") for n in candidate.names):
        return None
    file = find_gguf(path)
    return read(file) if file is not None else None


def read(path: Path) -> OpenedLayout:
    """A model by one of its files. A file whose architecture no plugin describes keeps its names and has no config."""
    model = read_model(path)
    tensors = {name: stored_tensor(file, tensor) for name, (file, tensor) in model.tensors.items()}
    if model.metadata.get("general.type") == "adapter":
        return OpenedLayout(NAME, tensors, {}, details=_details(model))
    arch = model.metadata.get("general.architecture")
    n_experts = model.metadata.get(f"{arch}.expert_count", 0)
    architecture = architecture_of(model.metadata, tensors)
    family = family_of(architecture, model.metadata, tensors) if architecture is not None else None
    if architecture is None or family is None:
        what = f"{arch!r} with {n_experts} experts" if n_experts else repr(arch)
        warning = f"no plugin describes GGUF's {what}: names stay as in the file, only tensor-wise work is possible"
        return OpenedLayout(NAME, tensors, {}, warnings=(warning,), details=_details(model))
    return _as_transformers(path, model, tensors, architecture, family)


def _as_transformers(
    path: Path, model: GgufModel, tensors: dict[str, Lazy], architecture: Architecture, family: GgufFamily
) -> OpenedLayout:
    def load(name: str) -> list[float] | None:
        return [float(x) for x in tensors[name].load().flatten().tolist()] if name in tensors else None

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path} has no token_embd.weight: it is no whole model")
    n_layers = model.metadata.get(f"{family.arch}.block_count")
    if isinstance(n_layers, int) and n_layers > len(tensors):
        raise InputError(f"{path}: {family.arch}.block_count is {n_layers}, for {len(tensors)} tensors in all")
    try:
        config = config_of(model.metadata, architecture, family, tensors, embedding.spec.n_rows, load)
    except _MALFORMED as error:  # a value of another type than the key has, or a size that is missing or zero
        raise InputError(f"{path}: malformed metadata: {type(error).__name__}: {error}") from error
    dtype = _dtype(tensors)
    config["torch_dtype"] = dtype.torch_name
    weights = {n: t for n, t in tensors.items() if n not in CONSTANT_TENSORS}
    try:
        bound = plain_model(str(path), config)
        weights |= lists_from_metadata(model.metadata, bound.spelled(family.names), family)
        weights_by_name = from_gguf(weights, bound, family)
    except SpecError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error
    if model.metadata.get(SOURCE_DTYPE) == dtype.torch_name:
        weights_by_name = {n: cast_vector(t, dtype) if t.dtype is DType.F32 else t for n, t in weights_by_name.items()}
    return OpenedLayout(
        NAME,
        weights_by_name,
        config,
        _generation(model.metadata, config),
        own=tuple(file.source.path.name for file in model.files),
        details=_details(model),
        vocabulary=model.metadata,
    )


def _dtype(tensors: Mapping[str, Lazy]) -> DType:
    """The dtype of most matrices, by bytes."""
    sizes: dict[DType, int] = {}
    for lazy in tensors.values():
        if len(lazy.shape) > 1 and lazy.dtype.is_float:
            sizes[lazy.dtype] = sizes.get(lazy.dtype, 0) + lazy.spec.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else DType.F32


def _details(model: GgufModel) -> dict[str, Any]:
    """How the tensors are stored, and the metadata without the vocabulary."""
    types: dict[str, dict[str, int]] = {}
    for _, tensor in model.tensors.values():
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "nbytes": 0})
        entry["tensors"] += 1
        entry["nbytes"] += tensor.nbytes
    shown = {
        k: f"{len(v)} values" if isinstance(v, list) and len(v) > _SHOWN_VALUES else v
        for k, v in model.metadata.items()
    }
    return {
        "version": model.files[0].version,
        "types": dict(sorted(types.items(), key=lambda kv: -kv[1]["nbytes"])),
        "metadata": shown,
    }


def _generation(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """generation_config.json: the ids that end a text, those at the end of a message too."""
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
    eos_ids = [metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    eos_ids = [*dict.fromkeys(i for i in eos_ids if isinstance(i, int))]
    if len(eos_ids) > 1:
        ids["eos_token_id"] = eos_ids
    return {"generation_config.json": (json.dumps(ids, indent=2) + "\n").encode()} if ids else {}


LAYOUT = Layout(NAME, find, has_own_format=True)
