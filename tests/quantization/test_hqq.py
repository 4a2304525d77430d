"""Zero points of HQQ are those that the library finds, for each group by itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods.hqq import METHOD as HQQ
from llmkit.quantization.methods.hqq import half_quadratic_zeros
from llmkit.quantization.methods.rtn import METHOD as RTN
from tests.goldens import GOLDEN


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "quantized" / "hqq.safetensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_those_of_the_library(recorded, bits):
    grid = Grid(bits, None, False)
    weight, scale, start, zero = (recorded[f"{bits}.{part}"] for part in ("weight", "scale", "start", "zero"))
    found = half_quadratic_zeros(weight[:, None], scale, start - grid.middle, grid) + grid.middle
    assert (zero - start).abs().max() > 0.05
    torch.testing.assert_close(found, zero, rtol=0, atol=2e-3)


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(3, 16, False), Grid(2, None, False)], ids=str)
def test_slices_are_the_whole(grid):
    weight = torch.distributions.StudentT(torch.tensor(3.0)).sample((64, 96))
    whole = HQQ.quantize(weight, grid, torch.float32)
    parts = [HQQ.quantize(weight[i : i + 7], grid, torch.float32) for i in range(0, 64, 7)]
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(torch.cat([getattr(p, part) for p in parts]), getattr(whole, part))
    assert torch.equal(whole.scales, RTN.quantize(weight, grid, torch.float32).scales)
