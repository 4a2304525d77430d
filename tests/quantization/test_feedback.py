"""Rows rounded one after the other, against the definition: what is left is solved again after each of them."""

from __future__ import annotations

import pytest
import torch

from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.gptq import BEST, FAST
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.packing import unpack
from llmkit.quantization.statistics import Statistics

N_OUT, N_IN = 64, 96


def case(seed=0, rank=4):
    """A weight, moments of inputs and of outputs, few directions of which count."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(500, N_IN, generator=g) @ (torch.randn(N_IN, N_IN, generator=g) * torch.rand(N_IN, generator=g))
    gradients = torch.randn(300, rank, generator=g) @ torch.randn(rank, N_OUT, generator=g)
    gradients += 0.2 * torch.randn(300, N_OUT, generator=g) * torch.rand(N_OUT, generator=g)
    return torch.randn(N_OUT, N_IN, generator=g) * 0.05, x.T @ x, gradients.T @ gradients


def numbers(rows, grid):
    """What rows stand for, float64 [rows, in], by the group that each column names."""
    groups = torch.arange(N_IN) // (grid.group_size or N_IN) if rows.order is None else rows.order.long()
    zeros = torch.full_like(rows.scales, grid.middle) if rows.zeros is None else rows.zeros
    return (unpack(rows.codes, grid.bits, N_IN).double() - zeros.double()[:, groups]) * rows.scales.double()[:, groups]


def loss(error, inputs, outputs):
    error = error.double()
    return float(((outputs.double() @ error) * (error @ inputs.double())).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, 32, False), Grid(8, None), Grid(2, 40, False)], ids=str)
def test_rows_take_up_what_those_before_them_lost(grid, act_order):
    """With E the errors of the rows B that were rounded, those that are left, R, move by G_RR^-1 G_RB E."""
    weight, inputs, outputs = case()
    method = BEST.configured(act_order=act_order)
    made = method.quantize(weight, grid, torch.float32, Statistics(500, inputs, output_moments=outputs))
    g = outputs.double()
    order = g.diagonal().argsort(descending=True, stable=True)
    g = g + 0.1 * g.diagonal().mean() * torch.eye(N_OUT, dtype=torch.float64)
    wanted, found, codes = weight.double(), torch.zeros(N_OUT, N_IN).double(), torch.zeros(N_OUT, N_IN)
    for start in range(0, N_OUT, 16):
        rows, rest = order[start : start + 16], order[start + 16 :]
        some = method.quantize(wanted[rows].float(), grid, torch.float32, Statistics(500, inputs))
        assert torch.allclose(made.scales[rows], some.scales, rtol=1e-3)
        found[rows] = numbers(some, grid)
        codes[rows] = unpack(some.codes, grid.bits, N_IN).float()
        error = wanted[rows] - found[rows]
        wanted[rest] += torch.linalg.solve(g[rest][:, rest], g[rest][:, rows] @ error)
    assert (unpack(made.codes, grid.bits, N_IN).float() != codes).float().mean() < 0.02  # ties break otherwise


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, 32, False)], ids=str)
def test_the_output_of_the_block_errs_less(grid):
    weight, inputs, outputs = case(1)
    losses = []
    for moments in (None, outputs):
        made = BEST.quantize(weight, grid, torch.float32, Statistics(500, inputs, output_moments=moments))
        losses.append(loss(weight - numbers(made, grid), inputs, outputs))
    assert losses[1] < 0.6 * losses[0]


def test_outputs_that_count_alike_change_nothing():
    weight, inputs, _ = case()
    grid = Grid(3, 32, False)
    plain = GPTQ.quantize(weight, grid, torch.float32, Statistics(500, inputs))
    for moments in (7 * torch.eye(N_OUT), torch.zeros(N_OUT, N_OUT)):
        made = BEST.quantize(weight, grid, torch.float32, Statistics(500, inputs, output_moments=moments))
        assert torch.equal(made.codes, plain.codes)
        assert torch.equal(made.zeros, plain.zeros)
        torch.testing.assert_close(made.scales, plain.scales)
    fast = [
        FAST.quantize(weight, grid, torch.float32, Statistics(500, inputs, output_moments=moments)).codes
        for moments in (None, case()[2])
    ]
    assert torch.equal(*fast)
