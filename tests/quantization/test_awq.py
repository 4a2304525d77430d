"""AWQ's scale against the same search written out: every scale of the paper's form, judged on the inputs themselves."""

from __future__ import annotations

import pytest
import torch

from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.method import BlockWeight
from llmkit.quantization.methods.awq import METHOD as AWQ
from llmkit.quantization.methods.mse import METHOD as MSE
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.constant import constant

GRIDS = [Grid(3, 32), Grid(4, 32, False), Grid(3, None, False), Grid(4, 64)]


def case(n_in=80, n_tokens=300, dead=None):
    """Two weights of one input, a few channels of which are large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn((n_tokens, n_in), generator=g) * torch.randn(n_in, generator=g).mul(1.5).exp()
    if dead is not None:
        x[:, dead] = 0
    weights = [0.05 * torch.randn((n, n_in), generator=g) * (1 + torch.rand(n_in, generator=g)) for n in (24, 10)]
    return weights, x


def given(weights, x, grid):
    statistics = Statistics(len(x), second_moments=x.T @ x)
    return [BlockWeight(w, grid, torch.float32, statistics) for w in weights]


def loss(weights, x, grid, scale):
    """The error of the outputs, what is stored of the scaled weights multiplied by the divided inputs."""
    total = 0.0
    for weight in weights:
        made = MSE.quantize(
            weight * scale, grid, torch.float32, Statistics(len(x), squares=(x / scale).square().sum(0))
        )
        zeros = None if made.zeros is None else constant(made.zeros)
        stored = QuantizedMatrix(grid, tuple(weight.shape), constant(made.codes), constant(made.scales), zeros)
        total += float(((x / scale) @ stored.dequantized().load().T - x @ weight.T).double().square().sum())
    return total


def relative(weight, size):
    """|W| beside the largest of its group, the mean over rows; groups of `size` columns."""
    parts = [part.abs() / part.abs().amax(1, keepdim=True) for part in weight.split(size, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("repeats", [1, 2])
def test_no_scale_of_the_published_form_is_better(grid, repeats):
    weights, x = case()
    source = torch.arange(80) if repeats == 1 else torch.arange(40).view(10, 1, 4).expand(-1, 2, -1).flatten()

    def shared(values):
        return torch.stack([values[source == j].mean() for j in range(int(source.max()) + 1)])[source]

    size = shared(x.square().mean(0).sqrt())
    weight = shared(torch.cat([relative(w, grid.group_size or 80) for w in weights]).mean(0))
    tried = [size**0]
    for a in torch.linspace(0.2, 1, 5):
        tried += [size**a, size**a / weight ** (1 - a)]
    losses = [loss(weights, x, grid, s / s.log().mean().exp()) for s in tried]
    found = AWQ.input_scales(given(weights, x, grid), source)
    assert found.shape == (80 // repeats,)
    assert loss(weights, x, grid, found[source]) <= min(losses) * 1.001
    assert min(losses[1:]) < 0.9 * losses[0]  # there was something to find


def test_rows_left_out_of_a_large_matrix_change_little():
    weights, x = case()
    large = [torch.cat([weights[0] * (1 + 0.01 * i) for i in range(40)])]
    grid = Grid(3, 32)
    found = AWQ.input_scales(given(large, x, grid), torch.arange(80))
    assert loss(large, x, grid, found) < 0.9 * loss(large, x, grid, torch.ones(80))


def test_a_channel_that_no_token_reached_keeps_its_scale():
    weights, x = case(dead=7)
    weights[0][:, 11] = weights[1][:, 11] = 0
    found = AWQ.input_scales(given(weights, x, Grid(4, 32)), torch.arange(80))
    assert found.isfinite().all()
    assert found[7] == found[11] == 1
    weights, x = case(dead=slice(None))
    assert torch.equal(AWQ.input_scales(given(weights, x, Grid(4, 32)), torch.arange(80)), torch.ones(80))


def test_no_inputs():
    with pytest.raises(InputError, match="second moments"):
        AWQ.input_scales([BlockWeight(torch.ones((2, 32)), Grid(4, 32), torch.float32, None)], torch.arange(32))
