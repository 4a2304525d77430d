"""GPTQ against its definition: after each column the rest is re-solved with the inverse of what is left of H."""

from __future__ import annotations

import pytest
import torch
from lazies import restored

from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.gptq import FAST
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.methods.mse import METHOD as MSE
from llmkit.quantization.methods.rtn import METHOD as RTN
from llmkit.quantization.packing import unpack
from llmkit.quantization.points import FP8, NF4
from llmkit.quantization.search import searched_scales
from llmkit.quantization.statistics import Statistics


def case(n_out=24, n_in=96, n_tokens=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=g) * torch.rand(n_in, generator=g)
    x = torch.randn(n_tokens, n_in, generator=g) @ mixing
    weight = torch.randn(n_out, n_in, generator=g) * 0.05
    return weight, x, Statistics(n_tokens, second_moments=x.T @ x)


def loss(weight, other, x):
    return float((x.double() @ (weight - other).double().T).square().sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 32), Grid(4, 32, False), Grid(3, None, False), Grid(2, 64, False), Grid(4, 32, points=NF4),
        Grid(8, None, points=FP8),
    ],
    ids=str,
)  # fmt: skip
def test_codes_are_those_of_the_definition(grid, act_order):
    weight, _, statistics = case()
    made = FAST.configured(act_order=act_order).quantize(weight, grid, torch.float32, statistics)
    h = statistics.second_moments.double()
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    size = grid.group_size or weight.shape[1]
    left, rest = weight.double(), order.tolist()
    codes = torch.zeros(weight.shape, dtype=torch.float64)
    group = torch.arange(len(order)) // size
    if act_order and grid.group_size is not None:
        group = order.argsort() // size
        first = order[:size]
        importance = statistics.mean_squares[first].unsqueeze(0)
        scales, _ = searched_scales(weight[:, first].unsqueeze(1), grid, torch.float32, importance)
        assert torch.equal(made.order, group.int())
        assert torch.equal(made.scales[:, :1], scales)
    else:
        assert made.order is None
    zeros = torch.full_like(made.scales, grid.middle) if made.zeros is None else made.zeros.float()
    values = torch.tensor(grid.points.values).double() if grid.points else None
    while rest:
        j = rest[0]
        scale, zero = made.scales[:, group[j]].double(), zeros[:, group[j]].double()
        if values is None:
            codes[:, j] = (left[:, j] / scale + zero).round().clamp(0, 2**grid.bits - 1)
            error = left[:, j] - (codes[:, j] - zero) * scale
        else:
            nearest = ((left[:, j] / scale).unsqueeze(1) - values).abs().nan_to_num(9e9).argmin(1)
            codes[:, j], error = nearest.double(), left[:, j] - values[nearest] * scale
        inverse = torch.linalg.inv(h[rest][:, rest])
        left[:, rest] -= error[:, None] * inverse[0] / inverse[0, 0]
        rest = rest[1:]
    found = unpack(made.codes, grid.bits, weight.shape[1]).double()
    if values is not None:  # two codes of float8 are zero
        found, codes = values[found.int()], values[codes.int()]
    assert (found != codes).double().mean() < 0.005  # a tie that float32 breaks the other way


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(3, 32, False), Grid(4, 32, points=NF4)], ids=str)
def test_each_method_errs_less_than_the_one_before(grid):
    weight, x, statistics = case(64, 128, 600, seed=1)
    losses = [
        loss(weight, restored(m.quantize(weight, grid, torch.float32, statistics), grid, weight.shape), x)
        for m in (RTN, MSE, FAST, GPTQ)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_columns_that_no_token_reached_are_rounded_to_nearest():
    weight, x, _ = case()
    x[:, [3, 50]] = 0
    statistics = Statistics(len(x), second_moments=x.T @ x)
    grid = Grid(4, 32, False)
    found = restored(GPTQ.quantize(weight, grid, torch.float32, statistics), grid, weight.shape)
    assert float((found[:, [3, 50]] - weight[:, [3, 50]]).abs().max()) < float(weight.abs().max()) / 4
    assert (found[:, [3, 50]] != 0).any()


def test_moments_of_few_tokens_are_factored_all_the_same():
    weight, x, _ = case(n_tokens=4)
    statistics = Statistics(len(x), second_moments=x.T @ x)
    grid = Grid(4, 32)
    found = restored(GPTQ.quantize(weight, grid, torch.float32, statistics), grid, weight.shape)
    assert loss(weight, found, x) < loss(
        weight, restored(RTN.quantize(weight, grid, torch.float32), grid, weight.shape), x
    )


def test_moments_that_cannot_be_factored_are_damped_more_and_it_is_said():
    """Rounded sums of few tokens may have negative eigenvalues: here -1/20 of the mean, beyond the usual damping."""
    weight, _, _ = case()
    n_in, grid = weight.shape[1], Grid(4, 32)
    moments = torch.ones(n_in, n_in) + torch.diag(torch.full((n_in,), -0.05))
    made = GPTQ.quantize(weight, grid, torch.float32, Statistics(10, second_moments=moments))
    assert made.note == "the second moments of inputs are damped by 0.1 of their mean"
    assert GPTQ.quantize(weight, grid, torch.float32, case()[2]).note == ""
    with pytest.raises(InputError, match="the second moments of the inputs cannot be factored"):
        GPTQ.quantize(
            weight,
            grid,
            torch.float32,
            Statistics(10, second_moments=20 * torch.ones(n_in, n_in) - 19 * torch.eye(n_in)),
        )


def drifted(seed=3):
    """A weight, its inputs in the float model, those once the layers before it are quantized, and the statistics."""
    weight, f, _ = case(64, 128, 600, seed)
    x = f + 0.3 * f.std() * torch.randn(f.shape, generator=torch.Generator().manual_seed(seed))
    return weight, f, x, Statistics(len(x), x.T @ x, (f - x).T @ x)


def test_the_weight_is_corrected_for_inputs_that_drifted():
    """Half of the way to the least-squares solution of f W^T = x W*^T, damped as the moments are."""
    weight, f, x, statistics = drifted()
    grid, h = Grid(4, 32, False), (x.T @ x).double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    corrected = weight.double() + 0.5 * torch.linalg.solve(h, x.T.double() @ (f - x).double() @ weight.T.double()).T
    made = GPTQ.quantize(weight, grid, torch.float32, statistics)
    wanted = GPTQ.quantize(corrected.float(), grid, torch.float32, Statistics(len(x), x.T @ x))
    differing = unpack(made.codes, 4, 128) != unpack(wanted.codes, 4, 128)
    assert differing.float().mean() < 0.01
    plain = GPTQ.quantize(weight, grid, torch.float32, Statistics(len(x), x.T @ x))
    errors = [(f @ weight.T - x @ restored(rows, grid, weight.shape).T).square().sum() for rows in (made, plain)]
    assert errors[0] < 0.95 * errors[1]
    fast = [FAST.quantize(weight, grid, torch.float32, s) for s in (statistics, Statistics(len(x), x.T @ x))]
    assert torch.equal(fast[0].codes, fast[1].codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_factor_of_the_search_is_better_than_the_chosen_one(symmetric, dtype):
    """Against all scales of the range and all zero points, one by one."""
    grid, g = Grid(3, 16, symmetric), torch.Generator().manual_seed(2)
    weight = torch.randn(6, 2, 16, generator=g)
    importance = torch.rand(2, 16, generator=g)
    scales, zeros = searched_scales(weight, grid, dtype, importance)

    def errors(scale, zero):
        q = (weight / scale[..., None] + zero[..., None]).round().clamp(-4, 3)
        return ((((q - zero[..., None]) * scale[..., None]) - weight).square() * importance).sum(-1)

    zero = torch.zeros_like(scales, dtype=torch.float32) if zeros is None else zeros.float()
    chosen = errors(scales.float(), zero)
    plain, plain_zero = RTN.scales(weight, grid, dtype, None)
    widest = errors(plain.float(), zero * 0 if plain_zero is None else plain_zero.float())
    assert bool((chosen <= widest * (1 + 1e-5)).all())
    assert float(chosen.sum()) < 0.95 * float(widest.sum())


def test_a_zero_point_between_two_codes_does_not_cut_off_the_range():
    """15 steps of 1 hold both ends only from a zero point of -0.5; from a whole one, a little larger steps do."""
    weight, grid = torch.tensor([[[-7.5, 7.5]]]), Grid(4, 2, False)
    scales, zeros = searched_scales(weight, grid, torch.float32)
    q = (weight / scales[..., None] + zeros[..., None]).round().clamp(-8, 7)
    assert float(((q - zeros[..., None]) * scales[..., None] - weight).abs().max()) < 0.1
