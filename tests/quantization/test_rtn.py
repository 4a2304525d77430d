"""Scales, zero points and grid points equal compressed-tensors', bit for bit."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import InputError
from llmkit.quantization.codecs.compressed_tensors import CODEC
from llmkit.quantization.matrix import Grid
from llmkit.quantization.methods import rtn
from tests.quantization.lazies import LIBRARY_HAS_GAPS, compressed, held, library_weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [
    Grid(b, g, s)
    for b in ((2, 4, 8) if LIBRARY_HAS_GAPS else (2, 3, 4, 8))
    for g in (None, 32, 64)
    for s in (True, False)
]


def library_grid(grid: Grid, **extra) -> QuantizationScheme:
    weights = QuantizationArgs(**library_weights(grid), **extra)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def by_library(weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The library's own tensors for float32 arithmetic and scales rounded to `scale_dtype`."""
    theirs = library_grid(grid, scale_dtype=scale_dtype)
    groups = weight.float().unflatten(1, (grid.n_groups(weight.shape[1]), -1))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights)
    state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
    return PackedQuantizationCompressor.compress(state, theirs)


def weights(rows: int = 24, cols: int = 192, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    w *= torch.logspace(-3, 1, rows).unsqueeze(1)
    w[0] = 0.0  # all-zero groups
    w[1] = 0.25  # constant groups, positive
    w[2] = -3.0  # and negative
    w[3, :64] = 0.0
    w[4] = w[4].abs()  # one-sided
    w[5] *= 1e-7  # scales under the smallest half-precision normal
    w[6] *= 3e3
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_compressed_tensors(grid, dtype):
    w = weights().to(dtype)
    ours, theirs = compressed(w, grid, dtype), by_library(w, grid, dtype)
    theirs["weight_scale"] = theirs["weight_scale"].to(dtype)
    assert ours.keys() | {"weight_zero_point"} == theirs.keys() | {"weight_zero_point"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GRIDS), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(0, 999))
def test_row_slices_equal_the_whole(grid, dtype, cut, seed):
    w = weights(40, 64, seed).to(dtype)
    whole = rtn.METHOD.quantize(w, grid, dtype)
    parts = [rtn.METHOD.quantize(p, grid, dtype) for p in (w[:cut], w[cut:]) if len(p)]
    for name in ("codes", "scales", *([] if grid.is_symmetric else ["zeros"])):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


def test_blocks_inside_a_slice_do_not_change_bits():
    """16 of these rows are a block of 1 MiB."""
    w, grid = weights(40, 2**14), Grid(4, 32, False)
    whole = rtn.METHOD.quantize(w, grid, torch.float32)
    rows = [rtn.METHOD.quantize(row, grid, torch.float32) for row in w.split(1)]
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(torch.cat([getattr(row, name) for row in rows]), getattr(whole, name))


@pytest.mark.parametrize("cols", [100, 33])
@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(8, 32), Grid(3, 32, False), Grid(4)], ids=str)
def test_the_last_group_of_a_row_may_be_shorter(grid, cols):
    """Its grid is that of its own columns."""
    w = weights(cols=cols)
    size, found = grid.group_size or cols, rtn.METHOD.quantize(w, grid, torch.float32)
    last = rtn.METHOD.quantize(w[:, cols // size * size :] if cols % size else w, grid, torch.float32)
    assert found.scales.shape == (24, grid.n_groups(cols))
    assert torch.equal(found.scales[:, -1:], last.scales)
    assert found.codes.shape == (24, -(-cols // 2) if grid.bits <= 4 else cols)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dequantized_equals_the_library_and_lies_within_half_a_step(grid, dtype):
    w = weights().to(dtype)
    groups, state = (grid.n_groups(w.shape[1]), -1), compressed(w, grid, dtype)
    parts = {name: held(tensor) for name, tensor in state.items() if name != "weight_shape"}
    settings = {"format": "pack-quantized", "weights": library_weights(grid)}
    ours = CODEC.read(parts, settings, tuple(w.shape)).dequantized().load()
    scale = state["weight_scale"]
    theirs = PackedQuantizationCompressor.decompress(dict(state), library_grid(grid))["weight"]
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    error = (ours.double() - w.double()).abs().unflatten(1, groups).amax(-1)
    # Half a step; a symmetric grid ends at q_max = 7 while absmax is at 7.5, and stored scales are rounded.
    bound = scale.double() * (0.5 + 2**grid.bits * torch.finfo(dtype).eps) + 1e-12
    assert (error[7:] <= bound[7:]).all()


def test_float32_arithmetic_is_closer_than_the_library_called_on_bfloat16():
    """Why half-precision weights are widened: at 8 bits the quotient must not be rounded to 8 significant bits."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(64, 512, generator=generator).to(torch.bfloat16)
    grid = Grid(8, None, True)
    errors = {}
    for name, compute in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        theirs = library_grid(grid, scale_dtype=torch.bfloat16)
        groups = w.to(compute).unflatten(1, (1, -1))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights)
        state = {"weight": w.to(compute), "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, theirs)
        packed["weight_scale"] = packed["weight_scale"].to(torch.bfloat16)
        restored = PackedQuantizationCompressor.decompress(packed, theirs)["weight"]
        errors[name] = float((restored.double() - w.double()).norm() / w.double().norm())
    assert errors["float32"] < errors["bfloat16"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, None, False)], ids=str)
def test_nan_and_infinities_are_refused(bad, grid):
    w = torch.ones(4, 64)
    w[2, 40] = bad
    with pytest.raises(InputError, match="NaN or infinities"):
        compressed(w, grid, torch.float32)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, None, False)], ids=str)
def test_weights_beyond_the_dtype_of_their_scale_are_refused(grid):
    w = torch.ones(4, 64)
    w[2, 40] = -1e5
    compressed(w, grid, torch.bfloat16)
    with pytest.raises(InputError, match=r"the weights reach 1e\+05: the scale of such a group is beyond"):
        compressed(w, grid, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_observed_sums_are_those_of_the_dequantized_weights(dtype):
    w, grid = weights(16, 128, 5).to(dtype), Grid(4, 32, False)
    seen = []
    state = compressed(w, grid, dtype, lambda *sums: seen.append(sums))
    restored = PackedQuantizationCompressor.decompress(state, library_grid(grid))["weight"]
    assert sum(n for *_, n in seen) == 16
    assert sum(s[0] for s in seen) == pytest.approx(float((restored.double() - w.double()).square().sum()), rel=1e-5)
    assert sum(s[1] for s in seen) == pytest.approx(float(w.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize(("grid", "expected"), [(Grid(4, 128), 0.12), (Grid(4, 128, False), 0.10), (Grid(8), 0.009)])
def test_relative_error_on_gaussian_weights(grid, expected):
    """In the region that plain torch, torchao and quanto measure on real weights (0.129, 0.108, 0.011)."""
    w = torch.randn(256, 896, generator=torch.Generator().manual_seed(0))
    seen = []
    compressed(w, grid, torch.float32, lambda *sums: seen.append(sums))
    assert (sum(s[0] for s in seen) / sum(s[1] for s in seen)) ** 0.5 == pytest.approx(expected, rel=0.2)
