"""Quantized checkpoints viewed as float ones: lazy, sliceable by rows, with the float model's names and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.storage import respelled
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import quantization_of
from llmkit.errors import RequirementError
from llmkit.formats.json_text import parse_object
from llmkit.quantization.codec import (
    CONFIG_KEYS,
    REMEDY,
    FolderReader,
    StoredFolder,
    config_entry,
    folder_readers,
    readers_by_method,
)
from llmkit.quantization.recognition import BLOCKS, Quantization
from llmkit.tensors.rearrange import transpose
from llmkit.tensors.spec import DType


def model_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that config.json gives the model (`dtype`, before transformers 5 `torch_dtype`), if it is a float."""
    for key in ("dtype", "torch_dtype"):
        text = config.get(key)
        if isinstance(text, str) and text != "auto":
            dtype = DType.parse(text)
            return dtype if dtype.is_float else None
    return None


def is_quantized(ckpt: Checkpoint) -> bool:
    """Whether the tensors are quantized weights, by whatever method."""
    return _folder_quantization(ckpt) is not None


def _folder_quantization(ckpt: Checkpoint) -> Quantization | None:
    """How the tensors are quantized. A GGUF opens as floats, and the tensors of an ONNX folder are its graph's."""
    scheme = quantization_of(ckpt)
    return None if scheme is None or scheme.method == BLOCKS or ckpt.layout == "onnx" else scheme


def describe(ckpt: Checkpoint) -> str | None:
    """The quantization in a few words (`int4 group 64 symmetric, compressed-tensors`); None for a float model."""
    scheme = quantization_of(ckpt)
    return None if scheme is None else scheme.words if scheme.method == BLOCKS else str(scheme)


def kv_cache_scheme(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How keys and values are to be cached, as compressed-tensors says it in config.json; None for in floats."""
    scheme = (config_entry(config) or {}).get("kv_cache_scheme")
    return scheme if isinstance(scheme, Mapping) else None


def refuse_unread(ckpt: Checkpoint) -> None:
    """Refuse a quantization that `dequantized` does not read; a float checkpoint passes.

    Raises:
        RequirementError, SpecError: as of `dequantized`.
    """
    dequantized(ckpt)


def reader_of(ckpt: Checkpoint) -> FolderReader | None:
    """What reads the matrices of a quantized folder; None for floats, and for files that open as floats.

    Raises:
        RequirementError: a layout that nothing reads.
    """
    scheme = _folder_quantization(ckpt)
    return None if scheme is None else _reader(ckpt, scheme)


def dequantized(ckpt: Checkpoint, *, dtype: DType | None = None) -> Checkpoint:
    """The float view of a quantized checkpoint; a float checkpoint is returned as it is.

    Each weight is what the layout's own library restores at that dtype, bit for bit, and remembers its codes
    (`llmkit.quantization.matrix.matrix_of`). No data is read until a tensor is loaded.

    Args:
        dtype: of the restored weights; default: the model's (config.json), or that of the scales.

    Raises:
        RequirementError: a layout that no codec reads, or a form of one that its codec does not read.
        SpecError: tensors of a quantized layer are missing or do not fit together.
    """
    scheme = _folder_quantization(ckpt)
    if scheme is None:
        return ckpt
    codec = _reader(ckpt, scheme)
    stored = _stored(ckpt, codec)
    matrices, used = codec.matrices(stored)
    if not matrices and not scheme.n_weights and not kv_cache_scheme(ckpt.config):
        raise _not_stored(ckpt, scheme)
    wanted = dtype or model_dtype(ckpt.config)
    tensors = {name: lazy for name, lazy in ckpt.tensors.items() if name not in used}
    for name, matrix in matrices.items():
        floats = matrix.dequantized(wanted)
        tensors[name] = transpose(floats) if name in stored.transposed else floats
    config = _float_config(ckpt.config, codec)
    if (architecture := registry.find(config)) is not None and architecture.names.apart:
        tensors = respelled(tensors, architecture.bind(config).fitted(tensors), architecture.names)
    return ckpt.derive(
        tensors=tensors,
        config=config,
        files={name: content for name, content in ckpt.files.items() if name not in config_files()},
        step={"transform": "dequantize"},
        warnings=codec.warnings(stored),
    )


def config_files() -> frozenset[str]:
    """The files beside config.json that say how weights are quantized; programs write those of others, too."""
    return frozenset(reader.config_file for reader in folder_readers() if reader.config_file)


def _float_config(config: Mapping[str, Any], codec: FolderReader) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in codec.config_keys}


def _reader(ckpt: Checkpoint, scheme: Quantization) -> FolderReader:
    """The codec of a layout.

    Raises:
        RequirementError: there is none.
    """
    readers = readers_by_method()
    if scheme.method in readers:
        return readers[scheme.method]
    if not scheme.n_weights:
        raise _not_stored(ckpt, scheme)
    raise RequirementError(
        f"{ckpt.label} is quantized ({scheme}), which is not read; expected {', '.join(readers)} (seen: {scheme.seen})",
        hint=REMEDY,
    )


def _not_stored(ckpt: Checkpoint, scheme: Quantization) -> RequirementError:
    return RequirementError(
        f"{ckpt.label} is quantized ({scheme}) by {scheme.seen} only: no tensor is stored so",
        hint=f"where its weights are floats, remove quantization_config from config.json; else {REMEDY}",
    )


def _stored(ckpt: Checkpoint, codec: FolderReader) -> StoredFolder:
    config = _float_config(ckpt.config, codec)
    architecture = registry.find(config)
    slots = architecture.bind(config).fitted(ckpt.tensors).tensors() if architecture is not None else {}
    stated, file = ckpt.config, ckpt.files.get(codec.config_file)
    if file is not None and config_entry(stated) is None:
        stated = {**stated, CONFIG_KEYS[0]: parse_object(file.read(), codec.config_file)}
    transposed = frozenset(name for name, slot in slots.items() if slot.is_transposed and not slot.stack)
    shapes = {name: slot.shape[::-1] if name in transposed else slot.shape for name, slot in slots.items()}
    return StoredFolder(ckpt.label, ckpt.tensors, stated, shapes, transposed)
