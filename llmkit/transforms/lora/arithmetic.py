"""The arithmetic of adapters as lazy nodes, in row slices, rounded where huggingface/peft rounds.

An update is B A in float32, then times its scale, then added to the weight, then cast: each step rounds, and folding
the scale into the product would give other bits wherever it is no power of two. Updates of an embedding and of bare
parameters are cast to the dtype of the weight before they are added.

Matrix products are computed in fixed blocks of rows, the last one filled up with zeros. The bits of a product may
depend on how many rows a BLAS call gets (few rows take another kernel), and the slices of the runner depend on what
else happens to a tensor: with fixed blocks a row has the same bits in every slice, those of the product of the whole
matrix, and a composed plan gives the bytes of the staged runs.

Formulas: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024, eq. 5), IA3 (Liu et al. 2022), LoHa and LoKr (LyCORIS), as
huggingface/peft computes them in src/peft/tuners/*/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.quantization.method import Observe
from llmkit.tensors.lazy import Apply, Context, Lazy, Node, Rows
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import sliceable, transpose
from llmkit.tensors.spec import DType, TensorSpec

BLOCK_ROWS = 64
_F32 = DType.F32


def transposed(lazy: Lazy) -> Lazy:
    """[a, b] -> [b, a] of a small matrix, in its own dtype; computed whole, sliceable by rows."""
    return sliceable(transpose(lazy))


def product(left: Lazy, right: Lazy) -> Lazy:
    """[a, r] and [r, b] -> their product [a, b] in float32; computed whole."""
    spec = TensorSpec(_F32, (left.shape[0], right.shape[1]))
    return sliceable(Apply("matmul", [left, right], spec, lambda a, b: a.float() @ b.float(), row_step=None).output())


def add_low_rank(
    weight: Lazy,
    left: Lazy,
    right: Lazy,
    scale: float,
    dtype: DType,
    *,
    name: str,
    rounds_update: bool = False,
    divisor: float = 1.0,
    observe: Observe | None = None,
) -> Lazy:
    """W + scale / divisor * left @ right (LoRA), as `dtype`.

    Args:
        weight: [rows, columns], a float type.
        left: [rows, r].
        right: [r, columns].
        name: of the weight, for messages.
        rounds_update: the update is cast to `dtype` before it is added.
        observe: is told the squared Frobenius norms of the change and of W.
    """
    left, right = left.cast(_F32), right.cast(_F32)
    attrs = {"scale": scale} if divisor == 1.0 else {"scale": scale, "divisor": divisor}
    gram_spec = TensorSpec(_F32, (right.shape[0], right.shape[0]))
    gram = Apply("gram", [right], gram_spec, lambda r: r @ r.T, row_step=None).output()

    def add(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.empty(w.shape, dtype=dtype.torch)
        # |left @ right|^2 = tr(left' left right right'): known without a pass over the weight.
        change = (scale / divisor) ** 2 * float(((a.T @ a).double() * g.double()).sum())
        _check_finite(name, change)
        norm = 0.0
        # Blocks of warm memory for all: fresh pages for each cost more than the arithmetic.
        work, warm = torch.empty((BLOCK_ROWS, w.shape[1])), torch.empty((BLOCK_ROWS, w.shape[1]))
        for start in range(0, w.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            block = torch.mm(_filled(a[rows]), b, out=work)[: w.shape[0] - start]
            if scale != 1.0:
                block.mul_(scale)
            if divisor != 1.0:
                block.div_(divisor)
            if rounds_update and dtype is not _F32:
                block = block.to(dtype.torch).float()
            before = warm[: w.shape[0] - start].copy_(w[rows])
            if observe is not None:
                norm += float(torch.dot(before.view(-1), before.view(-1)))
            out[rows] = block.add_(before)
        if observe is not None:
            observe(change, norm, w.shape[0])
        return out

    spec, operands = weight.spec.with_dtype(dtype), [weight, left, right, gram]
    return Apply("lora", operands, spec, add, attrs, row_step=BLOCK_ROWS, input_rows=[1, 1, 0, 0], scratch=2.0).output()


def add_dora(
    weight: Lazy,
    left: Lazy,
    right: Lazy,
    magnitude: Lazy,
    scale: float,
    dtype: DType,
    *,
    name: str,
    by_column: bool,
    observe: Observe | None = None,
) -> Lazy:
    """W + scale * left @ right with its rows (`by_column`: columns) rescaled to the lengths `magnitude`, as `dtype`.

    Args:
        weight: [rows, columns], a float type.
        left: [rows, r].
        right: [r, columns].
        magnitude: [rows], or [columns].
    """
    operands, per = [left, right, magnitude], [1, 0, 1]
    if by_column:
        norms = ColumnNorms(weight, left.cast(_F32), right.cast(_F32), scale).output()
        operands, per = [*operands, norms], [1, 0, 0, 0]

    def rescale(
        block: torch.Tensor, rows: slice, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, *norms: torch.Tensor
    ) -> torch.Tensor:
        moved = block + _rows_of(a, rows, b) * scale
        if norms:
            return moved * (m / norms[0])
        factor: torch.Tensor = (m[rows] / torch.linalg.vector_norm(moved, dim=1))[:, None]
        return moved * factor

    attrs: dict[str, object] = {"scale": scale, "by_column": by_column}
    return _by_blocks("dora", weight, operands, per, rescale, dtype, attrs, name=name, observe=observe)


def add_experts(
    weight: Lazy, left: Lazy, right: Lazy, scale: float, dtype: DType, *, name: str, observe: Observe | None = None
) -> Lazy:
    """W[e] + scale * left[e] @ right[e] of stacked matrices, each update cast to `dtype` first.

    Args:
        weight: [E, rows, columns], a float type.
        left: [E, rows, r].
        right: [E, r, columns].
        dtype: of the result, which has the shape of the weight.
    """

    def add(block: torch.Tensor, rows: slice, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return block + ((a[rows] @ b[rows]) * scale).to(dtype.torch).float()

    attrs: dict[str, object] = {"scale": scale}
    return _by_blocks("lora", weight, [left, right], [1, 1], add, dtype, attrs, name=name, observe=observe, step=1)


def add_hadamard(
    weight: Lazy, factors: Sequence[Lazy], scale: float, dtype: DType, *, name: str, observe: Observe | None = None
) -> Lazy:
    """W + scale * (w1_a @ w1_b) * (w2_a @ w2_b), the second product elementwise (LoHa), as `dtype`.

    Args:
        weight: [rows, columns], a float type.
        factors: w1_a [rows, r], w1_b [r, columns], w2_a and w2_b alike.
    """

    def add(block: torch.Tensor, rows: slice, *f: torch.Tensor) -> torch.Tensor:
        return block + _rows_of(f[0], rows, f[1]) * _rows_of(f[2], rows, f[3]) * scale

    attrs: dict[str, object] = {"scale": scale}
    return _by_blocks("loha", weight, factors, [1, 0, 1, 0], add, dtype, attrs, name=name, observe=observe)


def add_kronecker(
    weight: Lazy, first: Lazy, second: Lazy, scale: float, dtype: DType, *, name: str, observe: Observe | None = None
) -> Lazy:
    """W + scale * kron(first, second) (LoKr), as `dtype`; row i comes from row i // c of the first factor.

    Args:
        weight: [a * c, b * d], a float type.
        first: [a, b].
        second: [c, d].
    """
    height = second.shape[0]

    def add(block: torch.Tensor, rows: slice, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return block + torch.kron(a[rows.start // height : rows.start // height + 1], b) * scale

    attrs: dict[str, object] = {"scale": scale}
    operands, per = [first, second], [height, 0]
    return _by_blocks("lokr", weight, operands, per, add, dtype, attrs, name=name, observe=observe, step=height)


def scale_rows(weight: Lazy, factor: Lazy, dtype: DType, *, name: str, observe: Observe | None = None) -> Lazy:
    """Row i of a float matrix, or element i of a vector, times factor[i], as `dtype`; factor [rows] or [rows, 1]."""

    def scaled(block: torch.Tensor, rows: slice, f: torch.Tensor) -> torch.Tensor:
        return block * f.reshape(-1, *[1] * (block.dim() - 1))[rows]

    return _by_blocks("scale rows", weight, [factor], [1], scaled, dtype, {}, name=name, observe=observe)


def scale_columns(weight: Lazy, factor: Lazy, dtype: DType, *, name: str, observe: Observe | None = None) -> Lazy:
    """Column j of a float matrix [rows, columns] times factor[j], as `dtype`; factor [columns] or [1, columns]."""

    def scaled(block: torch.Tensor, rows: slice, f: torch.Tensor) -> torch.Tensor:
        return block * f.reshape(-1)

    return _by_blocks("scale columns", weight, [factor], [0], scaled, dtype, {}, name=name, observe=observe)


def add_vector(vector: Lazy, addend: Lazy, scale: float, dtype: DType, *, name: str) -> Lazy:
    """`vector` [n] + scale * `addend` [n], summed in float32, as `dtype`."""

    def add(block: torch.Tensor, rows: slice, x: torch.Tensor) -> torch.Tensor:
        return block + x[rows] * scale

    return _by_blocks("add", vector, [addend], [1], add, dtype, {"scale": scale}, name=name, observe=None)


def replace_rows(weight: Lazy, rows: Sequence[int], values: Lazy) -> Lazy:
    """The weight with row `rows[i]` replaced by `values[i]`; of equal ids the last one counts.

    Rows below the last one of the weight are added; there may be no gap between them.
    """
    source = {row: i for i, row in enumerate(rows)}
    values = values.cast(weight.dtype)
    pieces: list[Lazy] = []
    position = 0
    for row in sorted(source):
        if row > position:
            pieces.append(TakeRows(weight, position, row).output())
        pieces.append(TakeRows(values, source[row], source[row] + 1).output())
        position = row + 1
    if position < weight.shape[0]:
        pieces.append(TakeRows(weight, position, weight.shape[0]).output())
    return Concat(pieces).output()


class ColumnNorms(Node):
    """The lengths of the columns of W + scale * left @ right, read in blocks of rows.

    The squares are summed in float32 row after row, as torch's norm over the first dimension of a matrix does: a
    better sum would give other bits than PEFT's.
    """

    op = "column norms"

    def __init__(self, weight: Lazy, left: Lazy, right: Lazy, scale: float) -> None:
        self.inputs = (weight, left, right)
        self.scale = scale
        self.attrs = {"scale": scale}
        self.specs = (TensorSpec(_F32, (weight.shape[1],)),)
        self.n_rows = weight.shape[1]
        self.row_step = None
        step = weight.node.row_step
        self._block = None if step is None else lcm(step, BLOCK_ROWS)

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        weight, left, right = self.inputs
        a, b = context.whole(left), context.whole(right)
        n = weight.shape[0]
        block = self._block or n
        total = torch.zeros(self.n_rows)
        for start in range(0, n, block):
            stop = min(start + block, n)
            w = context.whole(weight) if self._block is None else context.rows(weight, (start, stop))
            for low in range(start, stop, BLOCK_ROWS):
                high = min(low + BLOCK_ROWS, stop)
                moved = w[low - start : high - start].float() + _rows_of(a, slice(low, high), b) * self.scale
                for row in moved.square_():
                    total += row
        return (total.double().sqrt_().float(),)  # correctly rounded, which float32's need not be

    def peak_nbytes(self, n_rows: int) -> int:
        weight, left, right = self.inputs
        block = min(self._block or weight.shape[0], weight.shape[0])
        small = left.spec.nbytes + right.spec.nbytes + 2 * self.specs[0].nbytes * 2
        return weight.node.peak_nbytes(block) + 4 * BLOCK_ROWS * weight.shape[1] * 4 + small


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """A block of rows, filled up with zeros."""
    missing = BLOCK_ROWS - rows.shape[0]
    return rows if missing == 0 else torch.nn.functional.pad(rows, (0, 0, 0, missing))


def _rows_of(left: torch.Tensor, rows: slice, right: torch.Tensor) -> torch.Tensor:
    """Rows of left @ right, at most a block of them, with the bits that they have in the whole product."""
    part = left[rows]
    return (_filled(part) @ right)[: part.shape[0]]


def _by_blocks(
    op: str,
    weight: Lazy,
    operands: Sequence[Lazy],
    per: Sequence[int],
    one: Callable[..., torch.Tensor],
    dtype: DType,
    attrs: dict[str, object],
    *,
    name: str,
    observe: Observe | None,
    step: int = BLOCK_ROWS,
) -> Lazy:
    """`one(block, rows, *operands)` for each block of rows of a weight, in float32, cast once; measures the change.

    Args:
        per: rows of the weight for one of each operand; 0: it is needed whole.
    """

    def fn(w: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
        out = torch.empty(w.shape, dtype=dtype.torch)
        change = norm = 0.0
        for start in range(0, w.shape[0], step):
            rows = slice(start, min(start + step, w.shape[0]))
            before = w[rows].float()
            after = one(before, rows, *data)
            out[rows] = after
            difference = float(torch.sum((after - before).square_()))
            _check_finite(name, difference)
            change += difference
            if observe is not None:
                norm += float(torch.sum(before * before))
        if observe is not None:
            observe(change, norm, w.shape[0])
        return out

    inputs, spec = [weight, *(operand.cast(_F32) for operand in operands)], weight.spec.with_dtype(dtype)
    return Apply(
        op, inputs, spec, fn, attrs, row_step=step, input_rows=[1, *per], scratch=2.0 if step == BLOCK_ROWS else 3.0
    ).output()


def _check_finite(name: str, squared: float) -> None:
    if squared - squared != 0.0:  # true of nan and of both infinities
        raise InputError(
            f"{name}: the adapter's update holds nan or infinite values",
            hint="its training diverged: use an earlier one",
        )
