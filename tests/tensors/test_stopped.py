"""Long arithmetic notices that its run was stopped, and gives the same where it is not."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch

from llmkit.pipeline import pool
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.awq import METHOD as AWQ
from llmkit.quantization.methods.gptq import METHOD as GPTQ
from llmkit.quantization.refinement import Grids, Inputs, refine
from llmkit.quantization.statistics import Statistics
from llmkit.tensors import products
from llmkit.tensors.stopped import Stopped, raise_if_stopped, stop_of_thread, stoppable

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


class After:
    """Says that the run was stopped once it was asked so often."""

    def __init__(self, n: int) -> None:
        self.n_left = n

    def __call__(self) -> bool:
        self.n_left -= 1
        return self.n_left < 0


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n", [0, 3, 6])
def test_gptq_is_stopped_between_its_columns(random, n):
    x, weight = torch.randn(500, 384, generator=random), torch.randn(8, 384, generator=random)
    statistics = Statistics(500, second_moments=x.T @ x, cross_moments=x.T @ x)
    asked = After(n)
    with stoppable(asked), pytest.raises(Stopped):
        GPTQ.quantize(weight, Grid(4, True, 32), torch.float32, statistics)
    assert asked.n_left == -1  # the first answer counts
    raise_if_stopped()


def test_a_sweep_of_the_refinement_is_stopped(random):
    columns, grids = torch.randn(512, 4, generator=random), Grids(4, 512, Grid(4, True, 32), torch.float32)
    q = torch.zeros(512, 4, dtype=torch.int8)
    with stoppable(After(3)), pytest.raises(Stopped):
        refine(columns, q, grids, Inputs(torch.eye(512), 0.0), 1)


def test_the_search_of_input_scales_is_stopped(random):
    from llmkit.quantization.method import BlockWeight

    x = torch.randn(50, 32, generator=random)
    statistics = Statistics(50, second_moments=x.T @ x)
    weight = BlockWeight(torch.randn(8, 32, generator=random), Grid(4, True, 32), torch.float32, statistics)
    with stoppable(lambda: True), pytest.raises(Stopped):
        AWQ.input_scales([weight], torch.arange(32))


@pytest.mark.parametrize("flop", [5_000, 40_000, 10**12])
def test_products_in_pieces_are_those_of_torch(random, flop):
    a, b, c = (torch.randn(*shape, generator=random) for shape in ((60, 50), (50, 40), (60, 40)))
    want = torch.addmm(c, a, b, beta=0.5, alpha=-2.0)
    close(products.add_product(c.clone(), a, b, alpha=-2.0, beta=0.5, flop=flop), want, rtol=1e-4, atol=1e-4)
    x, bias = torch.randn(3, 5, 50, generator=random), torch.randn(40, generator=random)
    with torch.no_grad():
        close(products.product_in_pieces(x, b.T, bias, flop=flop), x @ b + bias, rtol=1e-4, atol=1e-4)
    lower = torch.randn(60, 60, generator=random).tril(-1) * 0.1 + torch.eye(60)
    close(products.inverse_of_lower(lower, flop=flop), torch.linalg.inv(lower), rtol=1e-4, atol=1e-4)
    if flop == 5_000:
        with stoppable(After(1)), pytest.raises(Stopped):
            products.add_product(c, a, b, flop=flop)
        with stoppable(After(1)), pytest.raises(Stopped):
            products.inverse_of_lower(lower, flop=flop)


def test_a_small_product_ends_a_stopped_run_too(random):
    x, weight = torch.randn(2, 3, 4, generator=random), torch.randn(5, 4, generator=random)
    with stoppable(After(0)), pytest.raises(Stopped):
        products.product_in_pieces(x, weight, None)


def test_threads_of_a_pool_are_stopped_with_the_run_and_by_an_error(monkeypatch):
    monkeypatch.setattr(pool, "n_cores", lambda: 2)
    with stoppable(lambda: True), pytest.raises(Stopped):
        pool.map_on_cores(lambda _: raise_if_stopped(), [1])
    begun, ended = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            begun.wait(10)
            raise ValueError("the first to fail")
        begun.set()
        try:
            until = time.monotonic() + 20
            while time.monotonic() < until:
                raise_if_stopped()
                time.sleep(0.01)
        except Stopped:
            ended.set()
            raise

    with pytest.raises(ValueError, match="the first to fail"):
        pool.map_on_cores(work, [0, 1])
    assert ended.is_set()
    assert not stop_of_thread()()
