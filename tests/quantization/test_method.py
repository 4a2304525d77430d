"""What holds of every method: numbers that are none are refused, by the name of the weight."""

from __future__ import annotations

import pytest
import torch

from llmkit import entry_points
from llmkit.errors import InputError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import GROUP, BlockMethod, Task
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.constant import constant
from llmkit.tensors.spec import DType

METHODS = {entry.name: entry_points.load(entry) for entry in entry_points.entries(GROUP)}


def task(method, weight):
    return Task(constant(weight), method, Grid(4, 16, False), DType.F32, "lin.weight")


def statistics(x):
    return Statistics(len(x), x.T @ x, x.T @ x, x.square().sum(0), x.abs().amax(0), x)


def quantized(task, weight, known):
    if isinstance(task.method, BlockMethod):
        task.method.quantize_block({task.name: task.block_weight(weight, known)}, None)
    else:
        task.quantize(weight, known)


@pytest.mark.parametrize("name", ["squares", "maxima"])
def test_squares_and_maxima_below_zero_are_refused(name):
    with pytest.raises(InputError, match="squares or maxima below 0"):
        Statistics(40, **{name: torch.tensor([1.0, -1.0])}).require_finite()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_and_inputs_that_are_no_numbers_stop_with_the_name(method, bad):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=g), torch.randn(40, 32, generator=g)
    spoilt, strange = weight.clone(), x.clone()
    spoilt[3, 5] = strange[7, 9] = bad
    with pytest.raises(InputError, match=r"^lin\.weight: the weights hold NaN or infinities"):
        quantized(task(method, spoilt), spoilt, statistics(x))
    with pytest.raises(InputError, match=r"^lin\.weight: the inputs .* hold NaN or infinities"):
        quantized(task(method, weight), weight, statistics(strange))
