"""A checkpoint as a GGUF file: names and row orders of llama.cpp, metadata, vocabulary, matrices in one type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture import registry
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.difference import difference
from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model
from llmkit.architecture.storage import normalized_rows
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.text_part import text_part
from llmkit.errors import InputError, LlmkitError, RequirementError, suggestion
from llmkit.formats.gguf_container import GgufContainer
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.layouts.gguf import SOURCE_DTYPE
from llmkit.layouts.gguf_values import NOTED, architecture_of, config_of, metadata_of, rope_factors
from llmkit.layouts.gguf_weights import to_gguf
from llmkit.quantization.codecs.gguf import quantized
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.tensors.vectors import cast_vector
from llmkit.tokenization.to_gguf import vocabulary_metadata
from llmkit.transforms.convert.casting import Overflow, cast

if TYPE_CHECKING:
    import torch

__all__ = ["TYPE_NAMES", "write"]

TYPE_NAMES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_KEPT_FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md")
_ALWAYS_F32 = ("position_embd.weight",)
_FALLBACK = "F16"


def write(ckpt: Checkpoint, *, type: str = "f16", overflow: Overflow | None = None) -> Checkpoint:
    """The checkpoint as one GGUF file, `<label>-<TYPE>.gguf`.

    Vectors and norms are float32, as llama.cpp wants them, matrices of the given type. Rows that a block does not
    divide are stored as F16.

    Args:
        type: one of `TYPE_NAMES`.
        overflow: counts values that a plain type cannot hold; a block type whose scale cannot raises when written.

    Raises:
        InputError: no such type.
        RequirementError: llama.cpp does not know the family, or metadata cannot say what the model is.
        SpecError: the tensors do not fit the config.
    """
    kind = _type(type)
    ckpt = text_part(ckpt)
    config = dict(ckpt.config)
    architecture = registry.require(config, ckpt.label)
    family = architecture.gguf
    if family is None:
        raise RequirementError(
            f"{ckpt.label} is of the {architecture.name} architecture, which llama.cpp does not know",
            hint="--to hf or --to bin holds any",
        )
    model, notes = ckpt.require_model(), []
    model.unread.raise_if_refused(ckpt.label)
    model.check({name: lazy.spec for name, lazy in ckpt.tensors.items()}).raise_if_bad(ckpt.label)
    why = family.refuses(model) if family.refuses is not None else None
    if why is not None:
        raise RequirementError(f"llama.cpp cannot run this {architecture.name} model: {why}", hint="--to hf holds any")
    tensors = dict(ckpt.tensors)
    if as_bool(model.head.normalized):
        head = model.name_of("head.weight")
        tensors[head] = normalized_rows(tensors[head])
        notes.append("the rows of the head are divided by their norms, as the original does at run time")
    stored = {**to_gguf(tensors, model, family), **_constants(model)}
    values, warnings = metadata_of(model, config, family)
    metadata = {"general.architecture": family.arch, "general.type": "model", "general.name": ckpt.label, **values}
    metadata |= _noted(model, config, family, metadata, stored)
    types = {name: _type_of(name, lazy, kind) for name, lazy in stored.items()}
    fallen = [name for name, found in types.items() if found == _FALLBACK != kind]
    if fallen:
        notes.append(
            f"{len(fallen)} matrices whose rows are no multiple of {TYPE_BY_NAME[kind].block} are stored as F16"
        )
    vocabulary, more = vocabulary_metadata(
        ckpt.label, ckpt.files, config, model.dims.vocab, kind=architecture.tokenizer, pre=family.tokenizer_pre
    )
    metadata |= {"general.file_type": TYPE_BY_NAME[kind].file_type, **_source_dtype(ckpt)}
    metadata |= {"general.quantization_version": 2, **vocabulary}
    name = f"{ckpt.label}-{kind}.gguf"
    counted = overflow if overflow is not None else Overflow()
    return ckpt.derive(
        tensors={name: _stored(name, lazy, types[name], counted) for name, lazy in stored.items()},
        config={},
        files={n: content for n, content in ckpt.files.items() if n in _KEPT_FILES},
        container=GgufContainer(name, metadata, types),
        notes=[*notes, f"{name}: {len(stored)} tensors, matrices as {kind}, vectors as F32"],
        warnings=[*model.unread.warnings, *warnings, *more],
    )


def _type(text: str) -> str:
    if text.lower() in TYPE_NAMES:
        return text.upper()
    raise InputError(
        f"--type {text!r} is no type that llmkit writes; expected {', '.join(TYPE_NAMES)}",
        hint=suggestion(text.lower(), TYPE_NAMES, "K-quants need llama.cpp: llama-quantize on an f16 file", "--type "),
    )


def _constants(model: Model) -> dict[str, Lazy]:
    """Factors of the rotary frequencies, as tensors."""

    def constant(values: list[float]) -> Lazy:
        def fn() -> torch.Tensor:
            import torch

            return torch.tensor(values, dtype=torch.float32)

        return Apply(
            "constant", [], TensorSpec(DType.F32, (len(values),)), fn, {"values": values}, row_step=None
        ).output()

    return {name: constant(values) for name, values in rope_factors(model).items()}


def _noted(
    model: Model, config: Mapping[str, Any], family: GgufFamily, metadata: Mapping[str, Any], stored: Mapping[str, Lazy]
) -> dict[str, str]:
    """What has to be noted of the config for a reader to find the same model; nothing for most.

    Raises:
        RequirementError: the metadata cannot say what the model is; the first difference is named.
    """
    reader = architecture_of(metadata, stored)
    if reader is None or reader.gguf is None:
        raise RequirementError(f"no plugin reads GGUF's {family.arch!r}")
    constants = rope_factors(model)
    found = config_of(metadata, reader, reader.gguf, stored, model.dims.vocab, constants.get)
    noted = {key: config[key] for key in family.noted if key in config and config[key] != found.get(key)}
    plain = replace(model, head=replace(model.head, normalized=False))
    differs = _difference(plain, reader, found | noted)
    if differs is not None:
        raise RequirementError(
            f"--to gguf cannot hold this {model.family} model: {differs}", hint="--to hf or --to bin holds any"
        )
    return {NOTED: json.dumps(noted)} if noted else {}


def _difference(model: Model, reader: Architecture, config: Mapping[str, Any]) -> str | None:
    try:
        back = reader.bind(config)
    except LlmkitError as error:
        return error.message
    return difference(model, replace(back, head=replace(back.head, normalized=False)))


def _type_of(name: str, lazy: Lazy, kind: str) -> str:
    if len(lazy.shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight") or name in _ALWAYS_F32:
        return "F32"
    return kind if lazy.shape[-1] % TYPE_BY_NAME[kind].block == 0 else _FALLBACK


def _stored(name: str, lazy: Lazy, kind: str, overflow: Overflow) -> Lazy:
    dtype = TYPE_BY_NAME[kind].dtype
    if dtype is DType.F32 and lazy.dtype is not DType.F64:
        return cast_vector(lazy, dtype)
    return quantized(lazy, kind, name) if dtype is None else cast({name: lazy}, dtype, overflow)[name]


def _source_dtype(ckpt: Checkpoint) -> dict[str, str]:
    dtypes = {lazy.dtype for lazy in ckpt.tensors.values()}
    only = next(iter(dtypes))
    return {SOURCE_DTYPE: only.torch_name} if len(dtypes) == 1 and only in (DType.F16, DType.BF16) else {}
