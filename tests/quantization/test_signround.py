"""SignRound beside the same thing written with autograd: rounding with a straight-through gradient, signs, clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lazies import restored

from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import BlockWeight
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.methods.mse import METHOD as MSE
from llmkit.quantization.methods.signround import FROM_GPTQ
from llmkit.quantization.methods.signround import METHOD as SIGNROUND
from llmkit.quantization.search import importance_of, searched_scales
from llmkit.quantization.statistics import Statistics

N_OUT, N_IN, N_SAMPLES = 12, 40, 8


class Products:
    """A block of two matrices one after the other, with a nonlinearity between them."""

    def __init__(self, weights, seed=0):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0.2, 3, N_IN)
        self.x = torch.randn((N_SAMPLES, 16, N_IN), generator=generator) * scale
        self.targets = self._outputs(weights, range(N_SAMPLES))
        self.n_samples, self.reports, self._at = N_SAMPLES, [], 0

    def _outputs(self, weights, samples):
        return torch.tanh(self.x[list(samples)] @ weights["a"].T) @ weights["b"].T

    def draw(self, n):
        found = [(self._at + k) % N_SAMPLES for k in range(n)]
        self._at += n
        return found

    def errors(self, weights, samples):
        return (self._outputs(weights, samples) - self.targets[list(samples)]).square().mean((1, 2))

    def value(self, weights, samples):
        return self.errors(weights, samples).tolist()

    def gradient(self, weights, samples):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        error = self.errors(leaves, samples).mean()
        return error.item(), dict(zip(leaves, torch.autograd.grad(error, list(leaves.values())), strict=True))

    def report(self, done, text):
        self.reports.append((done, text))


def case(grid, dtype=torch.float16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn((N_OUT, N_IN), generator=generator) + 0.3,
        "b": torch.randn((5, N_OUT), generator=generator),
    }
    block = Products(weights)
    squares = {"a": block.x.flatten(0, 1).square().sum(0), "b": torch.rand(N_OUT, generator=generator)}
    return block, {n: BlockWeight(w, grid, dtype, Statistics(128, squares=squares[n])) for n, w in weights.items()}


class Reference(torch.nn.Module):
    """One weight as the paper has it: w' = (clip(round(w/s + v) + z) - z) s, the ends of the range scaled."""

    def __init__(self, given):
        super().__init__()
        self.grid, self.dtype, (self.n_out, self.n_in) = given.grid, given.scale_dtype, given.weight.shape
        n_groups, size = given.grid.n_groups(self.n_in), given.grid.group_size or self.n_in
        weight = torch.nn.functional.pad(given.weight, (0, n_groups * size - self.n_in))
        self.weight = weight.view(self.n_out, n_groups, size)
        scales, zeros = searched_scales(
            self.weight, given.grid, given.scale_dtype, importance_of(given.statistics, (n_groups, size))
        )
        zero = 0 if zeros is None else zeros.float()
        self.low, self.high = (
            (-given.grid.middle - zero) * scales.float(),
            (given.grid.middle - 1 - zero) * scales.float(),
        )
        self.v = torch.nn.Parameter(torch.zeros_like(self.weight))
        n_factors = 1 if given.grid.is_symmetric else 2
        self.factors = torch.nn.Parameter(torch.ones(n_factors, self.n_out, n_groups))

    def forward(self):
        n = 2**self.grid.bits - 1
        low, high = self.factors[0] * self.low, self.factors[-1] * self.high
        exact = (high - low) / n
        scale = exact + (exact.to(self.dtype).float() - exact).detach()
        if self.grid.is_symmetric:
            zero = torch.full_like(scale, self.grid.middle).detach()
        else:
            zero = -low / scale
            zero = zero + (zero.round().clamp(0, n) - zero).detach()
        scale, zero = scale[..., None], zero[..., None]
        steps = self.weight / scale + self.v
        steps = steps + (steps.round() - steps).detach()
        return ((torch.clamp(steps + zero, 0, n) - zero) * scale).flatten(1)[:, : self.n_in]


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 16, False), Grid(2, None, False), Grid(4, None)], ids=str)
@pytest.mark.parametrize("n_iterations", [1, 12])
def test_iterates_are_those_of_autograd_through_rounding(grid, n_iterations):
    """The iterate that is kept is that of the reference, weight by weight."""
    block, weights = case(grid)
    made = SIGNROUND.configured(iterations=n_iterations).quantize_block(weights, block)
    block, weights = case(grid)
    modules = {n: Reference(w) for n, w in weights.items()}
    with torch.no_grad():
        best = begin = {n: m().clone() for n, m in modules.items()}
        start = block.errors({n: m() for n, m in modules.items()}, range(N_SAMPLES))
    first, least = (2 if grid.bits <= 3 else 1) / n_iterations, 1.0
    for i in range(n_iterations):
        samples = block.draw(4)
        error = block.errors({n: m() for n, m in modules.items()}, samples).mean()
        ratio = error.item() / float(start[samples].mean())
        if i and ratio < least:
            least, best = ratio, {n: m().detach().clone() for n, m in modules.items()}
        for module in modules.values():
            module.zero_grad()
        error.backward()
        with torch.no_grad():
            for module in modules.values():
                rate = first * (1 - i / n_iterations)
                module.v.sub_(module.v.grad.sign(), alpha=rate).clamp_(-0.5, 0.5)
                module.factors.sub_(module.factors.grad.sign(), alpha=rate).clamp_(0.5, 1.5)
    last = {n: m().detach().clone() for n, m in modules.items()}
    finalists = [begin, best, last]
    best = min(finalists, key=lambda made: float(block.errors(made, range(N_SAMPLES)).sum()))
    for name, rows in made.items():
        found = restored(rows, grid, tuple(weights[name].weight.shape)).float()
        torch.testing.assert_close(found, best[name].half().float(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, None, False)], ids=str)
def test_the_output_comes_nearer_than_rounding_on_the_same_grid_brings_it(grid):
    block, weights = case(grid, torch.float32)
    made = SIGNROUND.configured(iterations=150).quantize_block(weights, block)
    alone = {n: MSE.quantize(w.weight, grid, w.scale_dtype, w.statistics) for n, w in weights.items()}

    def error(rows):
        return block.errors({n: restored(r, grid, tuple(weights[n].weight.shape)) for n, r in rows.items()}, range(8))

    assert error(made).mean() < 0.9 * error(alone).mean()
    assert [done for done, _ in block.reports][-2:] == [140 / 150, 1]
    shares = [float(text.removeprefix("error ×")) for _, text in block.reports]
    assert shares[0] == 1
    assert shares[-1] < 0.7


def test_without_iterations_it_is_where_it_begins():
    grid = Grid(4, 16)
    block, weights = case(grid)
    made = SIGNROUND.configured(iterations=0).quantize_block(weights, block)
    for name, rows in made.items():
        alone = MSE.quantize(weights[name].weight, grid, torch.float16, weights[name].statistics)
        torch.testing.assert_close(rows.codes, alone.codes, rtol=0, atol=0)
        torch.testing.assert_close(rows.scales, alone.scales, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 16, False), Grid(2, None, False)], ids=str)
def test_from_gptq_the_first_iterate_is_what_gptq_makes_and_the_last_is_nearer(grid):
    block, weights = case(grid, torch.float32)
    inputs = {"a": block.x.flatten(0, 1), "b": torch.tanh(block.x.flatten(0, 1) @ weights["a"].weight.T)}
    given = {}
    for name, weight in weights.items():
        known = Statistics(128, second_moments=inputs[name].T @ inputs[name])
        start = FROM_GPTQ.quantize(weight.weight, grid, torch.float32, known)
        given[name] = replace(weight, statistics=known, start=start)
    first = FROM_GPTQ.configured(iterations=0).quantize_block(given, block)
    for name, rows in first.items():
        alone = GPTQ.quantize(weights[name].weight, grid, torch.float32, given[name].statistics)
        torch.testing.assert_close(rows.codes, alone.codes, rtol=0, atol=0)
        torch.testing.assert_close(rows.scales, alone.scales, rtol=0, atol=0)
        assert rows.squared_error == pytest.approx(alone.squared_error)
    last = FROM_GPTQ.configured(iterations=150).quantize_block(given, block)

    def error(rows):
        made = {n: restored(r, grid, tuple(weights[n].weight.shape)) for n, r in rows.items()}
        return float(block.errors(made, range(N_SAMPLES)).mean())

    assert error(last) < 0.95 * error(first)


def test_iterations_are_for_methods_that_learn():
    assert SIGNROUND.configured(iterations=7).attrs() == {"method": "signround", "iterations": 7}
    with pytest.raises(InputError, match="does not learn in iterations"):
        GPTQ.configured(iterations=7)


def test_weights_that_are_no_numbers_are_refused():
    block, weights = case(Grid(4, 16))
    weights["a"].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        SIGNROUND.configured(iterations=1).quantize_block(weights, block)
