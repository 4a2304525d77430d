"""Codes follow the rows of the float matrix through every movement of rows, and are lost by everything else."""

from __future__ import annotations

import pytest
import torch

from llmkit.quantization.matrix import Decoded, Grid, QuantizedMatrix, is_dequantized, matrix_of
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.rearrange import gather_rows, permute_blocks, take_columns, transpose, view_as
from llmkit.tensors.spec import DType, TensorSpec


def constant(data: torch.Tensor) -> Lazy:
    spec = TensorSpec(DType.of(data.dtype), tuple(data.shape))
    return Apply("constant", [], spec, lambda: data, row_step=None, output_rows=[0]).output()


def decoded(seed: int = 0, group: int = 4, *, zeros: bool = True) -> Lazy:
    """Eight rows of eight codes."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
    scales = torch.rand(8, 8 // group, generator=generator)
    zero = torch.randint(0, 256, (8, 8 // group), generator=generator, dtype=torch.uint8)
    parts = [constant(q), constant(scales), *([constant(zero)] if zeros else [])]

    def fn(q: torch.Tensor, s: torch.Tensor, *z: torch.Tensor) -> torch.Tensor:
        return restored(q, s, z[0] if z else None)

    node = Decoded("decode", parts, TensorSpec(DType.F32, (8, 8)), fn, row_step=None)
    node.matrix = QuantizedMatrix(Grid(8, group, not zeros), (8, 8), *parts)
    return node.output()


def restored(q: torch.Tensor, s: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    zero = torch.full(s.shape, 128) if z is None else z
    group = q.shape[1] // s.shape[1]
    return (q.float() - zero.float().repeat_interleave(group, 1)) * s.repeat_interleave(group, 1)


MOVES = {
    "itself": lambda a, b: a,
    "cut": lambda a, b: TakeRows(a, 2, 7).output(),
    "joined": lambda a, b: Concat([a, b]).output(),
    "gathered": lambda a, b: gather_rows([a, b], [(0, 4, 6), (1, 0, 3), (0, 0, 2)]),
    "permuted": lambda a, b: permute_blocks(a, [2, 0, 3, 1]),
    "cast": lambda a, b: a.cast(DType.F16),
    "all of it": lambda a, b: permute_blocks(gather_rows([a, b], [(1, 0, 4), (0, 0, 4)]), [1, 0]),
}


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_codes_move_with_their_rows(move, zeros):
    moved = MOVES[move](decoded(1, zeros=zeros), decoded(2, zeros=zeros))
    matrix = matrix_of(moved)
    assert matrix is not None
    found = restored(matrix.codes.load(), matrix.scales.load(), matrix.zeros.load() if matrix.zeros else None)
    assert torch.equal(found.to(moved.dtype.torch), moved.load())
    assert matrix.shape == moved.shape


def test_what_is_no_movement_of_rows_has_none():
    one, other = decoded(1), decoded(2, group=8)
    for changed in (
        transpose(one),
        take_columns(one, 0, 4),
        Concat([one, other]).output(),
        Concat([one, decoded(3, zeros=False)]).output(),
        Apply("add", [one], one.spec, lambda x: x + 1).output(),
    ):
        assert matrix_of(changed) is None
        assert is_dequantized(changed)
    assert matrix_of(constant(torch.ones(2, 2))) is None
    assert not is_dequantized(constant(torch.ones(2, 2)))
    assert matrix_of(transpose(transpose(one))) is not None


def test_viewed_keeps_bytes():
    data = torch.arange(24, dtype=torch.int32).view(3, 8)
    seen = view_as(constant(data), DType.U8, (3, 4, 8))
    assert torch.equal(seen.load().view(3, 32), data.view(torch.uint8))
    vector = torch.arange(5.0)
    assert torch.equal(view_as(constant(vector), DType.F32, (5, 1)).load(), vector[:, None])
