"""First values of new rows. Every method reads the old matrix only, so it serves embedding and head alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.errors import InputError, suggestion
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Context, Lazy, Rows
from llmkit.tensors.rearrange import zeros
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.vocab.rows import BLOCK_ROWS, MakeRows, column_mean, digest_of, gather, row_slices

# Old ids and their weights.
Mixture = tuple[tuple[int, ...], tuple[float, ...]]

INITS = {
    "mean": "the mean of the old rows",
    "pieces": "the mean of the rows of its old tokenization",
    "zero": "zeros",
    "normal": "a normal draw around the mean, with 1e-9 of the old rows' covariance",
    "focus": "a sparse combination of old rows, by similarity on a corpus",
}
# transformers' mean_resizing: far below the spread of the rows, so that new tokens begin alike but not equal.
_EPSILON = 1e-9


def check_init(name: str) -> str:
    """The name of a method, or an error with the nearest one.

    Raises:
        InputError: there is no such method.
    """
    if name in INITS:
        return name
    hint = suggestion(name, INITS, "use one of " + ", ".join(INITS))
    raise InputError(f"unknown initialization {name!r}", hint=hint)


def new_rows(matrix: Lazy, parts: Sequence[tuple[int, ...]], *, init: str, seed: int) -> Lazy:
    """One new row for each entry of `parts`, in the dtype of `matrix`.

    Args:
        init: `mean`, `pieces`, `zero` or `normal`.
        parts: for each new row the old ids of its pieces; none gives the mean of all rows.
    """
    spec = matrix.spec.with_rows(len(parts))
    if init == "zero":
        return zeros(spec)
    if init == "normal" and len(spec.shape) == 2:
        return _normal(matrix, spec, seed)
    groups = [mean_of(p) for p in parts] if init == "pieces" else [((), ())] * len(parts)
    longest = max((len(ids) for ids, _ in groups), default=0)
    attrs = {"longest": longest, "sha256": digest_of([ids for ids, _ in groups])} if longest else {}
    name = "mean_of_pieces" if init == "pieces" else "mean_rows"
    return combined_rows(matrix, len(parts), lambda: groups, name, attrs, longest)


def mean_of(ids: Sequence[int]) -> Mixture:
    """The plain mean of some rows."""
    return tuple(ids), (1 / len(ids),) * len(ids) if ids else ()


def combined_rows(
    matrix: Lazy,
    n_rows: int,
    mixtures: Callable[[], Sequence[Mixture]],
    op: str,
    attrs: Mapping[str, Any],
    longest: int,
) -> Lazy:
    """Row i is a weighted sum of rows of `matrix`, in float32; the mean of all of them where its mixture is empty.

    Args:
        mixtures: gives the mixture of each row; called while rows are computed.
        attrs: what tells these mixtures from others.
        longest: upper estimate of the rows in one mixture.
    """
    spec = matrix.spec.with_rows(n_rows)
    mean = column_mean(matrix)

    def compute(rows: Rows, context: Context) -> torch.Tensor:
        mine = mixtures()[rows[0] : rows[1]]
        wanted = sorted({old for ids, _ in mine for old in ids})
        place = {old: n for n, old in enumerate(wanted)}
        old_rows = torch.empty((len(wanted), *spec.shape[1:]), dtype=torch.float32)
        gather(context, matrix, list(zip(range(len(wanted)), wanted, strict=True)), old_rows)
        out = torch.zeros((len(mine), *spec.shape[1:]), dtype=torch.float32)
        target = torch.tensor([i for i, (ids, _) in enumerate(mine) for _ in ids], dtype=torch.long)
        source = torch.tensor([place[old] for ids, _ in mine for old in ids], dtype=torch.long)
        factor = torch.tensor([w for _, weights in mine for w in weights], dtype=torch.float32)
        out.index_add_(0, target, old_rows[source] * factor.view(-1, *[1] * (out.dim() - 1)))
        empty = [i for i, (ids, _) in enumerate(mine) if not ids]
        if empty:
            out[empty] = context.whole(mean)
        return out.to(spec.dtype.torch)

    # The rows that one slice needs, once in their dtype and twice in float32.
    held = BLOCK_ROWS * max(longest, 1) * (matrix.spec.row_nbytes // matrix.dtype.itemsize) * 10
    return MakeRows(op, spec, compute, [matrix, mean], {"rows": n_rows, **attrs}, held=held).output()


def _normal(matrix: Lazy, spec: TensorSpec, seed: int) -> Lazy:
    """Draws of N(mean, 1e-9 covariance), as transformers' mean_resizing; the mean where that is not positive definite.

    Row r depends on the seed and r alone: rows are drawn in fixed blocks.
    """
    width = spec.shape[1]
    moments = _moments(matrix)

    def compute(rows: Rows, context: Context) -> torch.Tensor:
        values = context.whole(moments)
        mean, factor = values[:1], values[1:]
        out = []
        for block in range(rows[0] // BLOCK_ROWS, -(-rows[1] // BLOCK_ROWS)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
            drawn = torch.randn((BLOCK_ROWS, width), generator=generator) @ factor.T + mean
            first = block * BLOCK_ROWS
            out.append(drawn[max(rows[0] - first, 0) : rows[1] - first])
        return torch.cat(out).to(spec.dtype.torch)

    attrs = {"rows": spec.n_rows, "seed": seed, "epsilon": _EPSILON}
    held = moments.spec.nbytes + 2 * BLOCK_ROWS * width * 4
    return MakeRows("normal_rows", spec, compute, [matrix, moments], attrs, held=held).output()


def _moments(matrix: Lazy) -> Lazy:
    """The mean (row 0) and below it the Cholesky factor of 1e-9 times the covariance, zeros where there is none."""
    width = matrix.shape[1]
    mean = column_mean(matrix)

    def compute(_: Rows, context: Context) -> torch.Tensor:
        centre = context.whole(mean)
        covariance = torch.zeros((width, width), dtype=torch.float64)
        for start, stop in row_slices(matrix.spec.n_rows):
            centred = (context.cut(matrix, (start, stop)).float() - centre).double()
            covariance += centred.T @ centred
        scaled = (_EPSILON * (covariance / matrix.spec.n_rows)).float()
        factor, info = torch.linalg.cholesky_ex(scaled)
        return torch.cat([centre, factor if not info else torch.zeros_like(factor)])

    spec = TensorSpec(DType.F32, (width + 1, width))
    held = width * width * 20
    return MakeRows(
        "moments", spec, compute, [matrix, mean], {"over": matrix.spec.n_rows}, held=held, row_step=None
    ).output()
