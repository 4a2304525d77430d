"""A quantized checkpoint in another layout of quantized matrices: every code and scale stays, or nothing is written.

What the other grid cannot hold is rounded again only where that is asked for. A head or an embedding that has no place
there becomes floats, which loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized import dequantized, model_dtype
from llmkit.errors import RequirementError, counted, listing
from llmkit.quantization.codec import FolderCodec
from llmkit.quantization.matrix import Grid, QuantizedMatrix, dequantized_from, is_dequantized, matrix_of
from llmkit.quantization.method import Task, method_named, quantized
from llmkit.quantization.signs import with_positive_scales
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose
from llmkit.transforms.layers import GroupSize, choose_grid, layers_of, spelled_for
from llmkit.transforms.storing import encoded_checkpoint

_METHOD = "mse"


def to_codec(codec: FolderCodec) -> Callable[..., Checkpoint]:
    """What writes checkpoints in the layout of `codec`."""

    def write(ckpt: Checkpoint, *, requantize: bool = False) -> Checkpoint:
        """The checkpoint in this layout.

        Raises:
            RequirementError: a float checkpoint, or matrices that the layout cannot hold (without `requantize`).
        """
        floats = dequantized(ckpt)
        if not any(map(is_dequantized, floats.tensors.values())):
            raise RequirementError(
                f"{ckpt.label} has float weights; --to {codec.name} stores quantized ones",
                hint=f"llmkit quantize MODEL --bits 4 --format {codec.name} -o OUT makes them",
            )
        return reencoded(floats, codec, requantize=requantize)

    return write


def reencoded(
    floats: Checkpoint, codec: FolderCodec, *, requantize: bool, stored: Mapping[str, QuantizedMatrix] | None = None
) -> Checkpoint:
    """Floats that come from codes, in the layout of `codec`.

    Args:
        floats: of `dequantized`, or computed from those.
        requantize: what is no matrix that the layout holds may be rounded to one.
        stored: for that, what some weights were before, by name: their grid and dtypes are taken. Others get the grid
            most like those that are there.

    Raises:
        RequirementError: matrices that the layout cannot hold (without `requantize`).
    """
    floats = spelled_for(floats, codec)
    weights = weights_from_codes(floats)
    slots, stored = floats.model.tensors() if floats.model is not None else {}, stored or {}
    unchanged: dict[str, QuantizedMatrix] = {}
    refused: dict[str, tuple[Lazy, str]] = {}
    widened = []
    for name, rows in weights.items():
        slot = slots.get(name)
        matrix = matrix_of(rows)
        matrix = with_positive_scales(matrix) if matrix is not None else None
        is_layer = name.endswith(".weight") and (slot is None or slot.kind in ("linear", "head"))
        why = codec.refuses(matrix) if matrix is not None else f"{dequantized_from(rows)} is no grid"
        if is_layer and matrix is not None and why is None:
            unchanged[name] = matrix
        elif is_layer and (slot is None or slot.kind == "linear" or name in stored):
            refused[name] = (rows, str(why))
        else:
            widened.append(name)
    kinds = listing(list(dict.fromkeys(map(str, unchanged.values()))), 3)
    notes = [f"every code and scale stays in {counted(len(unchanged), 'layer')} ({kinds})"] if unchanged else []
    if widened:
        notes.append(f"{listing(widened, 2)} became floats: the layout has no place for them")
    if refused and not requantize:
        reasons = Counter(why for _, why in refused.values())
        raise RequirementError(
            f"{floats.label}: --to {codec.name} would round {len(refused)} of {len(weights)} matrices again "
            f"({listing(list(refused), 2)}): {listing(list(reasons), 2)}",
            hint="--requantize rounds them; --to dense --dtype float32 writes floats, which loses nothing",
        )
    rounded = _rounded(floats, codec, {name: rows for name, (rows, _) in refused.items()}, unchanged, stored)
    if rounded:
        kinds = listing(list(dict.fromkeys(str(matrix.grid) for matrix in rounded.values())), 3)
        notes.append(f"rounded again: {counted(len(rounded), 'layer')}, to {kinds} ({listing(list(rounded), 2)})")
    matrices = unchanged | rounded
    return encoded_checkpoint(floats.derive(notes=notes), codec, matrices, layers_of(floats, list(matrices), codec))


def weights_from_codes(floats: Checkpoint) -> dict[str, Lazy]:
    """The matrices [out, in] of floats that come from codes, by name; stacks of experts are none."""
    slots = floats.model.tensors() if floats.model is not None else {}
    return {
        name: transpose(lazy) if name in slots and slots[name].is_transposed else lazy
        for name, lazy in floats.tensors.items()
        if len(lazy.shape) == 2 and is_dequantized(lazy)
    }


def _rounded(
    ckpt: Checkpoint,
    codec: FolderCodec,
    weights: Mapping[str, Lazy],
    unchanged: Mapping[str, QuantizedMatrix],
    stored: Mapping[str, QuantizedMatrix],
) -> dict[str, QuantizedMatrix]:
    """Weights [out, in] as they were stored, or on a grid of the layout that is like the most frequent one."""
    loose = {name: lazy for name, lazy in weights.items() if name not in stored}
    chosen = {n: replace(stored[n].grid, lowest_zero=codec.lowest_zero) for n in weights if n in stored}
    if loose:
        known = [matrix_of(lazy) for lazy in loose.values()]
        usual = Counter(m.grid for m in [*known, *unchanged.values()] if m is not None).most_common(1)
        grid = usual[0][0] if usual else Grid(codec.all_bits[-1])
        points = grid.points if grid.points in codec.points else None
        all_bits = codec.all_bits if points is None else (points.bits,)
        bits = min((b for b in all_bits if b >= grid.bits), default=all_bits[-1])
        rows, size = {name: lazy.shape[1] for name, lazy in loose.items()}, grid.group_size
        fits = size in codec.sizes_for(points) and all(map(grid.divides, rows.values()))
        group: GroupSize = size if size is not None and fits else "auto"
        type = points.name if points is not None else ""
        chosen |= dict.fromkeys(loose, choose_grid(codec, bits, group, None, rows, type)[0])
    method, matrices = method_named(_METHOD), {}
    for name, lazy in weights.items():
        before = stored.get(name)
        dtype = before.scales.dtype if before is not None else model_dtype(ckpt.config) or lazy.dtype
        dtype = dtype if dtype in codec.scale_dtypes else codec.scale_dtypes[0]
        matrix = quantized(Task(lazy, method, chosen[name], dtype, name))
        matrices[name] = matrix if before is None else replace(matrix, dtype=before.dtype or matrix.dtype)
    return matrices
