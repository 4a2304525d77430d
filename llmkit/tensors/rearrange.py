"""Lazy reshapes, transposes, permutations and joins: elements change places, no arithmetic. Dtypes stay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.moving import Concat, Gather, MoveBytes
from llmkit.tensors.source import bytes_of, tensor_of
from llmkit.tensors.spec import DType, TensorSpec

Run = tuple[int, int, int]


def gather_rows(inputs: Sequence[Lazy], runs: Sequence[Run]) -> Lazy:
    """Rows of the inputs [n_i, …] in the order of `runs`, each (index of the input, first row, stop)."""
    merged: list[Run] = []
    for run in runs:
        if run[1] == run[2]:
            continue
        if merged and merged[-1][0] == run[0] and merged[-1][2] == run[1]:
            merged[-1] = (run[0], merged[-1][1], run[2])
        else:
            merged.append(run)
    if len(merged) == 1 and merged[0][1:] == (0, inputs[merged[0][0]].spec.n_rows):
        return inputs[merged[0][0]]
    return Gather(inputs, merged).output()


def sliceable(whole: Lazy) -> Lazy:
    """The same tensor [n, …], whose rows can be taken in slices although it is computed whole, once a step."""
    return Concat([whole]).output()


def permute_blocks(lazy: Lazy, order: Sequence[int], *, op: str = "permute") -> Lazy:
    """[n, …] -> [n, …]: in every block of len(order) rows, row j is row order[j] of the input's block.

    Raises:
        SpecError: the number of rows is not a multiple of the block.
    """
    size = len(order)
    if lazy.spec.n_rows % size:
        raise SpecError(f"{lazy.spec} does not divide into blocks of {size} rows")

    def move(pieces: Sequence[memoryview], n_rows: int) -> tuple[bytearray]:
        (data,), row = pieces, lazy.spec.row_nbytes
        starts = [(block + j) * row for block in range(0, n_rows, size) for j in order]
        return (bytearray().join([data[start : start + row] for start in starts]),)

    attrs = {"block": size, "order": _digest(tuple(order))}
    node = _Permuted(op, [lazy], lazy.spec, move, attrs, row_step=size, scratch=1.0)
    node.order = tuple(order)
    return node.output()


@lru_cache
def _digest(order: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(order).encode()).hexdigest()[:12]


class _Permuted(MoveBytes):
    order: tuple[int, ...]

    def over(self, inputs: Sequence[Lazy]) -> Lazy:
        return permute_blocks(inputs[0], self.order, op=self.op)


def view_as(lazy: Lazy, dtype: DType, shape: tuple[int, ...]) -> Lazy:
    """The same bytes, in row-major order, as elements of another dtype or shape (as `torch.Tensor.view`).

    A read of a file stays one. A computed tensor is computed whole if the number of rows changes.

    Raises:
        SpecError: the number of bytes would change.
    """
    spec = TensorSpec(dtype, shape)
    if spec == lazy.spec:
        return lazy
    node = lazy.node
    if spec.nbytes != lazy.spec.nbytes or (not spec.nbytes and spec.n_rows != lazy.spec.n_rows):
        raise SpecError(f"{lazy.spec} cannot be seen as {spec}")
    if isinstance(node, Read) and node.strides is None:
        return Read(node.name, spec, node.source, node.offset).output()
    if spec.n_rows != lazy.spec.n_rows:

        def fn(x: torch.Tensor) -> torch.Tensor:
            return tensor_of(bytes_of(x), spec)

        return sliceable(Apply("view", [lazy], spec, fn, {"as": str(spec)}, row_step=None).output())
    return MoveBytes("view", [lazy], spec, lambda pieces, _n_rows: (pieces[0],), {"as": str(spec)}).output()


def reshape(lazy: Lazy, shape: tuple[int, ...]) -> Lazy:
    """The same elements in row-major order in another shape; computed whole unless the shape is the same."""
    if lazy.shape == shape:
        return lazy
    return Apply("reshape", [lazy], TensorSpec(lazy.dtype, shape), lambda x: x.reshape(shape), row_step=None).output()


def transpose(lazy: Lazy) -> Lazy:
    """[a, b] -> [b, a]; computed whole."""
    if lazy.node.op == "transpose" and len(lazy.node.inputs) == 1:
        return lazy.node.inputs[0]
    spec = TensorSpec(lazy.dtype, lazy.shape[::-1])
    return Apply("transpose", [lazy], spec, lambda x: x.t().contiguous(), row_step=None).output()


def zeros(spec: TensorSpec) -> Lazy:
    """A tensor of zeros; computed whole."""

    def fn() -> torch.Tensor:
        return torch.zeros(spec.shape, dtype=spec.dtype.torch)

    return Apply("zeros", [], spec, fn, row_step=None).output()


def place_in_zeros(lazy: Lazy, shape: tuple[int, int], places: Sequence[tuple[Sequence[int], int]]) -> Lazy:
    """A matrix of zeros of `shape`, into which the rows of a smaller one are scattered; computed whole.

    Args:
        lazy: [sum of the numbers of rows in `places`, width].
        places: for each run of rows of `lazy`, their row numbers in the result and their first column there.
    """
    spec = TensorSpec(lazy.dtype, shape)

    def fn(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(shape, dtype=x.dtype)
        done = 0
        for rows, column in places:
            out[torch.tensor(list(rows)), column : column + x.shape[1]] = x[done : done + len(rows)]
            done += len(rows)
        return out

    attrs = {"places": [[rows[0], rows[-1], len(rows), column] for rows, column in places]}
    return sliceable(Apply("place", [lazy], spec, fn, attrs, row_step=None).output())


def join_columns(parts: Sequence[Lazy]) -> Lazy:
    """Matrices [n, columns_i] of one dtype side by side: [n, sum of columns_i].

    Raises:
        SpecError: numbers of rows or dtypes differ.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0].spec
    if any(p.spec.n_rows != first.n_rows or p.dtype is not first.dtype for p in parts):
        raise SpecError(f"cannot put {' and '.join(str(p.spec) for p in parts)} side by side")
    spec = TensorSpec(first.dtype, (first.n_rows, sum(p.shape[1] for p in parts)))

    def move(pieces: Sequence[memoryview], n_rows: int) -> tuple[bytearray]:
        sizes = [p.spec.row_nbytes for p in parts]
        rows = (x[i * n : (i + 1) * n] for i in range(n_rows) for x, n in zip(pieces, sizes, strict=True))
        return (bytearray().join(rows),)

    return MoveBytes("side by side", parts, spec, move, {}).output()


def take_columns(lazy: Lazy, start: int, stop: int) -> Lazy:
    """Columns `start:stop` of a matrix [n, columns].

    Raises:
        SpecError: they are outside the matrix.
    """
    if (start, stop) == (0, lazy.shape[1]):
        return lazy
    if not 0 <= start < stop <= lazy.shape[1]:
        raise SpecError(f"columns {start}:{stop} are outside {lazy.spec}")
    spec = TensorSpec(lazy.dtype, (lazy.spec.n_rows, stop - start))
    attrs = {"start": start, "stop": stop}

    def move(pieces: Sequence[memoryview], n_rows: int) -> tuple[bytearray]:
        return (_columns(pieces[0], n_rows, lazy.spec, start, stop),)

    return MoveBytes("columns", [lazy], spec, move, attrs).output()


def _columns(data: memoryview, n_rows: int, spec: TensorSpec, start: int, stop: int) -> bytearray:
    row, size = spec.row_nbytes, spec.dtype.itemsize
    return bytearray().join([data[i * row + start * size : i * row + stop * size] for i in range(n_rows)])


def split_columns(lazy: Lazy, n: int) -> tuple[Lazy, ...]:
    """[rows, columns] -> `n` matrices [rows, columns / n], outputs of one node: the input is read once.

    Raises:
        SpecError: `n` does not divide the columns.
    """
    if n == 1:
        return (lazy,)
    if lazy.shape[1] % n:
        raise SpecError(f"{lazy.spec} does not divide into {n} equal pieces of columns")
    spec = TensorSpec(lazy.dtype, (lazy.spec.n_rows, lazy.shape[1] // n))

    def move(pieces: Sequence[memoryview], n_rows: int) -> tuple[bytearray, ...]:
        width = spec.shape[1]
        return tuple(_columns(pieces[0], n_rows, lazy.spec, k * width, (k + 1) * width) for k in range(n))

    return MoveBytes("split columns", [lazy], [spec] * n, move, {"pieces": n}).outputs()
