"""The refinement of a rounded matrix against plain definitions of its two steps, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmkit.quantization.matrix import Grid
from llmkit.quantization.points import NF4
from llmkit.quantization.refinement import Grids, Inputs, refine

GRIDS = [
    Grid(2, 32, False), Grid(3, 16), Grid(4, None, False), Grid(2, 40, False), Grid(4, 32, points=NF4),
    Grid(4, 160), Grid(3, 128, False),
]  # fmt: skip


def case(grid, n_out=12, n_in=288, scale_dtype=torch.float32, seed=0):
    """A matrix rounded to nearest on the searched grid: wanted and points [in, out], its grids, and its inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, n_in, generator=g) @ (torch.randn(n_in, n_in, generator=g) * torch.rand(n_in, generator=g))
    moments = x.T @ x
    columns = 0.05 * torch.randn(n_in, n_out, generator=g)
    grids = Grids(n_out, n_in, grid, scale_dtype)
    grids.search(0, columns, moments.diagonal())
    groups = torch.arange(n_in) // grids.group_size
    q = torch.stack([grids.nearest(int(groups[i]), columns[i])[0] for i in range(n_in)]).to(torch.int8)
    return columns, q, grids, Inputs(moments, 0.01 * float(moments.diagonal().mean())), groups


def restored(q, grids, groups):
    return (grids.steps(q, groups) * grids.scales.float()[groups]).double()


def errors(wanted, q, grids, inputs, groups):
    """Of each output, damped."""
    e = wanted.double() - restored(q, grids, groups)
    h = inputs.moments.double() + inputs.damping * torch.eye(len(e))
    return (e * (h @ e)).sum(0)


def swept(wanted, q, grids, inputs, groups):
    """One sweep by its definition, each step from the whole error; scales by `lstsq` of the square root of H."""
    h = inputs.moments.double() + inputs.damping * torch.eye(len(wanted))
    root = torch.linalg.cholesky(h).T
    wanted, q, steps = wanted.double(), q.clone(), grids.steps(q, groups).double()
    made = Grids(wanted.shape[1], len(wanted), grids.grid, torch.float32)
    made.scales, made.zeros = grids.scales.clone(), grids.zeros
    numbers = restored(q, made, groups)
    for column in range(len(wanted)):
        group = int(groups[column])
        if column % grids.group_size == 0:
            own = groups == group
            for row in range(wanted.shape[1]):
                rest = wanted[:, row] - torch.where(own, 0.0, numbers[:, row])
                alone = (root @ torch.where(own, steps[:, row], 0.0)).unsqueeze(1)
                found = float(torch.linalg.lstsq(alone, (root @ rest).unsqueeze(1)).solution)
                if found > 0:
                    made.scales[group, row] = found
            numbers[own] = steps[own] * made.scales[group].double()
        nearest_to = numbers[column] + h[column] @ (wanted - numbers) / h[column, column]
        q[column], numbers[column] = made.nearest(group, nearest_to.float())
    return q, made.scales


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_sweep_is_that_of_the_definition(grid):
    wanted, q, grids, inputs, groups = case(grid)
    q_of_definition, scales = swept(wanted, q, grids, inputs, groups)
    refine(wanted, q, grids, inputs, 1)
    torch.testing.assert_close(
        grids.scales, scales, rtol=1e-2, atol=1e-6
    )  # a tie that breaks the other way moves those behind it
    assert (q != q_of_definition).double().mean() < 0.01  # ties, and what follows from them


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_sweep_makes_the_error_of_an_output_larger(grid, scale_dtype):
    before = []
    for n in (0, 1, 2, 5):
        wanted, q, grids, inputs, groups = case(grid, scale_dtype=scale_dtype, seed=1)
        refine(columns := wanted.clone(), q, grids, inputs, n)
        before.append(errors(wanted, q, grids, inputs, groups))
        assert bool((grids.scales > 0).all())
        if n:
            nearest = torch.stack([grids.nearest(int(groups[i]), columns[i])[0] for i in range(len(q))])
            assert torch.equal(nearest.to(torch.int8), q)
    for a, b in itertools.pairwise(before):
        assert bool((b <= a * (1 + 1e-4)).all())
    assert float(before[-1].sum()) < 0.9 * float(before[0].sum())


def test_all_rows_are_worked_on_and_are_those_of_their_own():
    """More than are worked on at a time: each as it is alone."""
    wanted, q, grids, inputs, _ = case(Grid(3, 32, False), n_out=1500)
    alone_wanted, alone_q = wanted[:, 1400:1401].clone(), q[:, 1400:1401].clone()
    alone = Grids(1, len(wanted), grids.grid, torch.float32)
    alone.scales, alone.zeros = grids.scales[:, 1400:1401].clone(), grids.zeros[:, 1400:1401].clone()
    first = q.clone()
    refine(wanted, q, grids, inputs, 1)
    refine(alone_wanted, alone_q, alone, inputs, 1)
    torch.testing.assert_close(grids.scales[:, 1400:1401], alone.scales, rtol=1e-3, atol=0)
    assert (q[:, 1400:1401] != alone_q).float().mean() < 0.02
    assert bool((q != first).any(0).double().mean() > 0.9)


def test_columns_without_inputs_and_groups_of_zeros_stay_finite():
    wanted, q, grids, _, groups = case(Grid(2, 32))
    wanted[:32] = 0
    q[:32] = 0
    moments = torch.randn(50, 288, generator=torch.Generator().manual_seed(3))
    moments[:, 40:50] = 0
    for damping in (0.0, 1.0):
        refine(columns := wanted.clone(), q, grids, Inputs(moments.T @ moments, damping), 2)
        assert bool(torch.isfinite(columns).all())
        assert bool(torch.isfinite(restored(q, grids, groups)).all())
        assert bool((grids.scales > 0).all())
    nearest = torch.stack([grids.nearest(1, wanted[i])[0] for i in range(40, 50)])
    assert torch.equal(q[40:50], nearest.to(torch.int8))  # rounded to nearest
