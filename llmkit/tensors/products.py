"""Matrix products that take many seconds, in pieces between which a stopped run is noticed."""

from __future__ import annotations

from llmkit.lazy_imports import torch
from llmkit.tensors.stopped import raise_if_stopped

_PIECE_FLOP = 2 * 10**11  # a few seconds on a core or two


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
    n_rows = max(flop // max(2 * b.numel(), 1), 1)
    for start in range(0, len(into), n_rows):
        raise_if_stopped()
        into[start : start + n_rows].addmm_(a[start : start + n_rows], b, beta=beta, alpha=alpha)
    return into


def inverse_of_lower(lower: torch.Tensor, *, flop: int = _PIECE_FLOP) -> torch.Tensor:
    """The inverse of a lower triangular matrix [n, n].

    Args:
        flop: multiplications and additions at a time.

    Raises:
        Stopped: the run was stopped.
    """
    n = len(lower)
    pieces = []
    step = min(max(flop // max(n**2, 1), 1), max(n, 1))
    for start in range(0, n, step):  # what lies above the diagonal is zero
        raise_if_stopped()
        units = torch.eye(n - start, min(step, n - start))
        below = torch.linalg.solve_triangular(lower[start:, start:], units, upper=False)
        pieces.append(torch.cat([below.new_zeros((start, below.shape[1])), below]) if start else below)
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def product_in_pieces(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, flop: int = _PIECE_FLOP
) -> torch.Tensor:
    """A linear layer: x [..., in] @ weight [out, in]^T + bias [out], without gradients where it takes long.

    Args:
        flop: multiplications and additions at a time.

    Raises:
        Stopped: the run was stopped.
    """
    raise_if_stopped()  # of a small product, too: a block that sees many samples is many of them
    rows = x.reshape(-1, x.shape[-1])
    n_rows = max(flop // max(2 * weight.numel(), 1), 1)
    if len(rows) <= n_rows or torch.is_grad_enabled():
        return torch.nn.functional.linear(x, weight, bias)
    made = rows.new_empty((len(rows), len(weight)))
    for start in range(0, len(rows), n_rows):
        raise_if_stopped()
        made[start : start + n_rows] = torch.nn.functional.linear(rows[start : start + n_rows], weight, bias)
    return made.view(*x.shape[:-1], len(weight))
