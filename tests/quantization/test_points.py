"""Codes of points that are no integers are those of the nearest value, as torch and a plain search find them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import SpecError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.points import FP4, FP8, MXFP4, NF4

FLOATS = st.floats(-2, 2, width=32)


@pytest.mark.parametrize("points", [NF4, FP4, MXFP4], ids=str)
def test_codes_are_those_of_a_plain_search(points):
    values = torch.tensor(points.values)
    order = values.argsort(stable=True)
    bounds = (values[order][1:] + values[order][:-1]) / 2
    near = torch.cat([bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0)), values])
    x = torch.cat([near, torch.randn(5000, generator=torch.Generator().manual_seed(0)) * points.largest / 2])
    codes = points.codes(x.view(1, -1))
    assert torch.equal(codes, order[torch.bucketize(x, bounds)].to(torch.uint8).view(1, -1))
    assert torch.equal(points.numbers(codes), values[codes.int()])


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_no_value_is_nearer(numbers):
    x = torch.tensor(numbers)
    for points in (NF4, FP4):
        distances = (torch.tensor(points.values) - x.unsqueeze(1)).abs()
        assert torch.equal((points.numbers(points.codes(x)) - x).abs(), distances.amin(1))


def test_float8_is_that_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(FP8.numbers(codes, dtype).nan_to_num(7), wanted.to(dtype).nan_to_num(7))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 300
    assert torch.equal(FP8.codes(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_grid_of_points_has_their_bits_and_no_zero_points():
    assert str(Grid(4, 64, points=NF4)) == "nf4 group 64"
    assert str(Grid(8, points=FP8)) == "fp8 per channel"
    for bits, symmetric in ((8, True), (4, False)):
        with pytest.raises(SpecError, match="nf4 has codes of 4 bits and no zero points"):
            Grid(bits, 64, symmetric, NF4)
