"""A quantized base with an adapter in it: stored as the base is, and what the adapter does not change as its bytes."""

from __future__ import annotations

from dataclasses import replace

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.quantized import config_files, describe, reader_of
from llmkit.errors import RequirementError, counted, listing
from llmkit.quantization.codec import FolderCodec, FolderReader, config_entry
from llmkit.quantization.matrix import dequantized_from, is_dequantized, matrix_of
from llmkit.quantization.signs import with_positive_scales
from llmkit.transforms.convert.codes import reencoded, weights_from_codes


def require_quantized(base: Checkpoint) -> FolderReader:
    """What reads the matrices of a quantized base.

    Raises:
        RequirementError: it has floats, or the blocks of a GGUF file.
    """
    reader = reader_of(base)
    if reader is None:
        require_model(base, "lora merge --requantize", floats=True)
        raise RequirementError(
            f"{base.label} has float weights: --requantize has nothing to write", hint="leave --requantize out"
        )
    return reader


def with_stored(
    base: Checkpoint, floats: Checkpoint, merged: Checkpoint, reader: FolderReader, *, requantize: bool
) -> Checkpoint:
    """What was merged, in the layout of the base.

    Args:
        base: quantized.
        floats: `dequantized(base)`.
        merged: made of `floats`; what is the same tensor there was not changed.
        reader: of the base.
        requantize: matrices that were changed may be rounded to the grids that they were on.

    Raises:
        RequirementError: matrices were changed, and may not be rounded, or the layout is not written.
    """
    restored = [name for name, lazy in floats.tensors.items() if is_dequantized(lazy)]
    changed = [name for name in restored if merged.tensors.get(name) is not floats.tensors[name]]
    if not changed:
        return _untouched(base, merged, set(restored) | base.tensors.keys() - floats.tensors.keys(), reader)
    found = f"{listing(changed, 2)} {'is' if len(changed) == 1 else 'are'} changed"
    remedy = f"llmkit convert {base.origin or base.label} --to dense -o FLOATS, then merge into FLOATS"
    if not requantize:
        try:
            require_model(base, "lora merge", floats=True)
        except RequirementError as error:
            also = "--requantize rounds what the adapter changes to its grid again; " * isinstance(reader, FolderCodec)
            raise RequirementError(error.message, hint=f"{also}{error.hint}") from None
    if not isinstance(reader, FolderCodec):
        raise RequirementError(
            f"{base.label} is quantized ({reader.name}), which is read and not written: {found}, and would have to be "
            "rounded again",
            hint=remedy,
        )
    codec = reader.as_described(config_entry(base.config) or {})
    rows = weights_from_codes(floats)
    held = {
        name: matrix
        for name, lazy in rows.items()
        if (matrix := matrix_of(lazy)) and not codec.refuses(with_positive_scales(matrix))
        if codec.takes_conv1d or lazy is floats.tensors[name]
    }
    lost = [name for name in restored if name not in held]
    if lost:
        kinds = listing(list(dict.fromkeys(dequantized_from(floats.tensors[name]) for name in lost)), 2)
        raise RequirementError(
            f"{base.label}: {counted(len(lost), 'weight')} ({listing(lost, 2)}; {kinds}) cannot be written in "
            f"{codec.name} as stored, and {found}",
            hint=remedy,
        )
    written = reencoded(merged, codec, requantize=True, stored=held)
    before, after = describe(base), describe(written)
    notes = [f"stored as {after}; the base is {before}"] if before != after else []
    return replace(written, notes=(*written.notes, *notes))


def _untouched(base: Checkpoint, merged: Checkpoint, stored: set[str], reader: FolderReader) -> Checkpoint:
    """All that stores matrices, named in `stored`, as it is; the rest from `merged`."""
    tensors = {name: lazy for name, lazy in merged.tensors.items() if name not in stored}
    tensors |= {name: lazy for name, lazy in base.tensors.items() if name in stored}
    order = {name: i for i, name in enumerate(base.tensors)}
    ordered = sorted(tensors, key=lambda name: order.get(name, len(order)))
    entries = {key: base.config[key] for key in reader.config_keys if key in base.config}
    files = {name: base.files[name] for name in config_files() if name in base.files}
    return replace(
        merged,
        tensors={name: tensors[name] for name in ordered},
        config={**merged.config, **entries},
        files={**merged.files, **files},
        notes=(*merged.notes, f"no adapter changes a quantized matrix: all keep their bytes ({reader.name})"),
    )
