"""A matrix rounded some output rows after the others: the error that those make is taken up by the rows that follow.

Outputs of one layer do not count alike, nor each for itself: those of q and k meet in products, those of v are mixed
by what comes next. With G = sum of J^T J over tokens, J being the derivative of the output of the decoder block by the
outputs of the layer, an error E of the weight changes the output of the block by about tr(G E H E^T), H being the
second moments of the inputs. So rows are to G what columns are to H. They go in the order of falling diag(G), some at
a time, and those that are left move by what makes up for the error of those that were rounded. Rows of one time count
each for itself.

Source: Tseng et al. 2025, arXiv:2505.22988 (YAQA), where G and H are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from llmkit.lazy_imports import torch
from llmkit.quantization.factored import factored
from llmkit.quantization.refinement import Grids
from llmkit.tensors.products import add_product
from llmkit.tensors.stopped import raise_if_stopped

_DAMPING = 0.1
_LEAST_ROWS, _MOST_TIMES = 16, 32

# (columns [in, rows], their grids) -> points int8, and what they are nearest to; both with the columns of a group
# beside each other.
Round: TypeAlias = "Callable[[torch.Tensor, Grids], tuple[torch.Tensor, torch.Tensor]]"


def rounded_with_feedback(
    columns: torch.Tensor, grids: Grids, moments: torch.Tensor, rounded: Round, grouped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rounded` makes of all rows of a matrix, whose grids it finds.

    Args:
        columns: of the wanted weight, float32 [in, out].
        moments: G, float32 [out, out].
        grouped: int64 [in], the columns in the order of their groups.
    """
    order, factor, _ = factored(moments, _DAMPING)
    columns, own = columns[:, order], grids.of_rows(order)
    q, nearest_to = torch.empty(columns.shape, dtype=torch.int8), torch.empty_like(columns)
    n_out, ungrouped = len(order), grouped.argsort()
    step = max(_LEAST_ROWS, -(-n_out // _MOST_TIMES))
    for start in range(0, n_out, step):
        raise_if_stopped()
        rows, rest = slice(start, start + step), slice(start + step, n_out)
        some = own.of_rows(rows)
        q[:, rows], nearest_to[:, rows] = rounded(columns[:, rows].clone(), some)
        error = columns[grouped, rows] - some.restored(q[:, rows])
        moved = torch.linalg.solve_triangular(factor[rows, rows], factor[rows, rest], upper=True)
        add_product(columns[:, rest], error[ungrouped], moved, alpha=-1)
    back = order.argsort()
    grids.take(own.of_rows(back))
    return q[:, back], nearest_to[:, back]
