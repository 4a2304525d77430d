"""Second moments H, damped, and factored for rounding one row or column after the other.

What is rounded with an error e at place j leaves the least error where the later places move by
-e U[j, j+1:] / U[j, j], U being the upper Cholesky factor of the inverse of H. H is damped by a share of its mean
diagonal, and by ten times as much as often as its factorization fails.

Source: Frantar et al. 2022, arXiv:2210.17323.
"""

from __future__ import annotations

from typing import NamedTuple

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.tensors.products import inverse_of_lower
from llmkit.tensors.stopped import raise_if_stopped

_MOST_DAMPING = 10.0


class Factored(NamedTuple):
    """Second moments [n, n], once they are damped.

    Attributes:
        order: int64 [n], the places by falling moments.
        factor: the upper Cholesky factor U of their inverse, U^T U, places in this order; float32.
        damping: the share of the mean diagonal that was added.
    """

    order: torch.Tensor
    factor: torch.Tensor
    damping: float


def factored(moments: torch.Tensor, damping: float) -> Factored:
    """Of second moments [n, n], float32: with the places the other way round they are L L^T, and U is L^-1.

    A place without moments gets the mean of them.

    Args:
        damping: the share to begin with.

    Raises:
        InputError: they cannot be factored, however much they are damped.
    """
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    mean = float(diagonal.mean())
    if mean <= 0:
        return Factored(order, torch.eye(len(moments)), damping)
    backwards = order.flip(0)
    damped = moments[backwards][:, backwards]
    damped.diagonal()[diagonal[backwards] == 0] = mean
    added = 0.0
    while damping <= _MOST_DAMPING:
        raise_if_stopped()
        damped.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = inverse_of_lower(lower)
            if bool(torch.isfinite(inverse).all()):
                del damped, lower  # each as large as what is returned
                return Factored(order, inverse.flip(0, 1), damping)
        damping *= 10
    raise InputError(
        "the second moments of the inputs cannot be factored", hint="calibrate on a longer text, or use --method mse"
    )
