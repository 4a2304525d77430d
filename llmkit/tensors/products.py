"""Matrix products that take many seconds, in pieces between which a stopped run is noticed."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.lazy_imports import torch
from llmkit.tensors.stopped import raise_if_stopped

_PIECE_FLOP = 2 * 10**11  # a few seconds on a core or two


def _row_pieces(n_rows: int, other: torch.Tensor, flop: int) -> Iterator[slice]:
    """Slices of `n_rows` rows whose products with a matrix are of `flop` each; a stopped run is noticed before each."""
    step = max(flop // max(2 * other.numel(), 1), 1)
    for start in range(0, n_rows, step):
        raise_if_stopped()
        yield slice(start, start + step)


def add_product(
    into: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    flop: int = _PIECE_FLOP,
) -> torch.Tensor:
    """`into` [n, m], in place: beta * into + alpha * a @ b, of a [n, k] and b [k, m].

    Args:
        flop: multiplications and additions at a time.

    Raises:
        Stopped: the run was stopped.
    """
    for rows in _row_pieces(len(into), b, flop):
        into[rows].addmm_(a[rows], b, beta=beta, alpha=alpha)
    return into


def inverse_of_lower(lower: torch.Tensor, *, flop: int = _PIECE_FLOP) -> torch.Tensor:
    """The inverse of a lower triangular matrix [n, n].

    Args:
        flop: multiplications and additions at a time.

    Raises:
        Stopped: the run was stopped.
    """
    n = len(lower)
    step = min(max(flop // max(n**2, 1), 1), max(n, 1))
    inverse = torch.zeros((n, n))
    for start in range(0, n, step):  # what lies above the diagonal is zero
        raise_if_stopped()
        units = torch.eye(n - start, min(step, n - start))
        inverse[start:, start : start + step] = torch.linalg.solve_triangular(lower[start:, start:], units, upper=False)
    return inverse


def product_in_pieces(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, flop: int = _PIECE_FLOP
) -> torch.Tensor:
    """A linear layer: x [..., in] @ weight [out, in]^T + bias [out], without gradients where it takes long.

    Args:
        flop: multiplications and additions at a time.

    Raises:
        Stopped: the run was stopped.
    """
    inputs = x.reshape(-1, x.shape[-1])
    if 2 * inputs.shape[0] * weight.numel() <= flop or torch.is_grad_enabled():
        raise_if_stopped()  # of a small product, too: a block that sees many samples is many of them
        return torch.nn.functional.linear(x, weight, bias)
    made = inputs.new_empty((len(inputs), len(weight)))
    for rows in _row_pieces(len(inputs), weight, flop):
        made[rows] = torch.nn.functional.linear(inputs[rows], weight, bias)
    return made.view(*x.shape[:-1], len(weight))
