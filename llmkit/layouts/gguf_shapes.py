"""The shapes in which GGUF files have a model's tensors, where checkpoints have them otherwise: both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.layouts.gguf_forms import leaf_of
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.moving import Concat, Stack, TakeRows
from llmkit.tensors.rearrange import gather_rows, reshape, transpose, view_as

Shape = tuple[int, ...]


def to_gguf_shapes(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """Tensors as files have them, by their names there; `model` is spelled so."""
    return _each(tensors, model, family, _filed)


def from_gguf_shapes(tensors: Mapping[str, Lazy], model: Model, family: GgufFamily) -> dict[str, Lazy]:
    """The way back; what has another shape than it is written in is left to the check of shapes.

    Axes of one element in front count as none: files drop them when they are quantized.
    """
    return _each(tensors, model, family, _kept)


def _each(
    tensors: Mapping[str, Lazy], model: Model, family: GgufFamily, read: Callable[[Lazy, Shape, Shape, bool], Lazy]
) -> dict[str, Lazy]:
    found = dict(tensors)
    for slot in model.slots.values():
        if slot.name in tensors:
            form = family.forms.get(leaf_of(slot.id))
            if form is not None and form.rows_in_all:
                rows = slot.shape[0], model.dims.evaluate(form.rows_in_all)
                found[slot.name] = _with_rows(tensors[slot.name], *(rows if read is _filed else rows[::-1]))
                continue
            is_transposed = form is not None and form.is_transposed
            formulas = form.shape if form is not None else ()
            shape = _shape(slot, model, formulas)
            if formulas or is_transposed or shape != slot.shape:
                found[slot.name] = read(tensors[slot.name], slot.shape, shape, is_transposed)
    return found


def _shape(slot: Slot, model: Model, formulas: tuple[str, ...]) -> Shape:
    """The shape in files, its last two axes not yet swapped.

    A bias that is kept as a matrix of one row is a vector there, a depthwise convolution [n, 1, k] a matrix.
    """
    shape = slot.shape
    if formulas:
        sizes = [model.dims.evaluate(size) if size else 1 for size in formulas]
        rest = slot.numel // prod(sizes)
        return tuple(n if size else rest for size, n in zip(formulas, sizes, strict=True))
    if len(shape) == 2 and slot.kind == "bias" and not slot.stack:
        return shape[1:]
    if len(shape) == 3 and shape[0] > 1 and shape[1] == 1 and not slot.stack:
        return shape[0], shape[2]
    return shape


def _with_rows(lazy: Lazy, rows: int, wanted: int) -> Lazy:
    """A matrix of `rows` rows with more, which are copies of the first, or fewer."""
    if lazy.shape[0] != rows or rows == wanted:
        return lazy
    return gather_rows([lazy], [(0, 0, min(rows, wanted)), *[(0, 0, 1)] * (wanted - rows)])


def _filed(lazy: Lazy, kept: Shape, shape: Shape, is_transposed: bool) -> Lazy:
    if len(shape) == 3 and (is_transposed or shape[1] > 1):
        return Stack([_swapped(matrix, is_transposed) for matrix in _matrices(lazy, shape)]).output()
    return _swapped(reshape(lazy, shape), is_transposed)


def _kept(lazy: Lazy, kept: Shape, shape: Shape, is_transposed: bool) -> Lazy:
    filed = (*shape[:-2], shape[-1], shape[-2]) if is_transposed else shape
    if _bare(lazy.shape) != _bare(filed):
        return lazy
    if len(shape) == 3 and (is_transposed or shape[1] > 1):
        matrices = [_swapped(matrix, is_transposed) for matrix in _matrices(lazy, filed)]
        return Stack(matrices).output() if len(kept) == 3 else Concat(matrices).output()
    return _swapped(reshape(lazy, filed), is_transposed) if is_transposed else reshape(lazy, kept)


def _swapped(lazy: Lazy, is_transposed: bool) -> Lazy:
    return transpose(lazy) if is_transposed else lazy


def _matrices(lazy: Lazy, shape: Shape) -> list[Lazy]:
    """Of [n, rows, columns], or of its rows one below the other: each [rows, columns]."""
    n, rows, _ = shape
    if isinstance(lazy.node, Stack):
        return list(lazy.node.inputs)
    if len(lazy.shape) == 2:
        return [gather_rows([lazy], [(0, i * rows, (i + 1) * rows)]) for i in range(n)]
    return [view_as(TakeRows(lazy, i, i + 1).output(), lazy.dtype, shape[1:]) for i in range(n)]


def _bare(shape: Shape) -> Shape:
    """Without axes of one element in front."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
