"""Scales, zero points and grid points equal compressed-tensors', bit for bit."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import InputError
from llmkit.quantization import rtn
from llmkit.quantization.packing import unpack
from llmkit.quantization.schemes import Scheme

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCHEMES = [Scheme(b, g, s) for b in (4, 8) for g in (None, 32, 64) for s in (True, False)]


def library_scheme(scheme: Scheme, **extra) -> QuantizationScheme:
    weights = Scheme.quantization_config(scheme)["config_groups"]["group_0"]["weights"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights, **extra))


def by_library(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The library's own tensors for float32 arithmetic and scales rounded to `scale_dtype`."""
    theirs = library_scheme(scheme, scale_dtype=scale_dtype)
    groups = weight.float().unflatten(1, (scheme.n_groups(weight.shape[1]), -1))
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
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_compressed_tensors(scheme, dtype):
    w = weights().to(dtype)
    ours = rtn.quantize_packed(w, scheme, dtype)
    theirs = by_library(w, scheme, dtype)
    assert torch.equal(ours[1], theirs["weight_scale"].to(dtype))
    if not scheme.is_symmetric:
        assert torch.equal(ours[2], theirs["weight_zero_point"])
    assert torch.equal(ours[0], theirs["weight_packed"])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEMES), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(0, 999))
def test_row_slices_equal_the_whole(scheme, dtype, cut, seed):
    w = weights(40, 64, seed).to(dtype)
    step = scheme.per_word
    cut = min(cut * step, 40)
    whole = rtn.quantize_packed(w, scheme, dtype)
    parts = [rtn.quantize_packed(p, scheme, dtype) for p in (w[:cut], w[cut:]) if len(p)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([p[i] for p in parts]), expected)


def test_blocks_inside_a_slice_do_not_change_bits(monkeypatch):
    w, scheme = weights(40, 64), Scheme(4, 32, False)
    whole = rtn.quantize_packed(w, scheme, torch.float32)
    monkeypatch.setattr(rtn, "_BLOCK_NBYTES", 3 * 64 * 4)
    for a, b in zip(rtn.quantize_packed(w, scheme, torch.float32), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantized_equals_the_library_and_lies_within_half_a_step(scheme, dtype):
    w = weights().to(dtype)
    words, scale, *rest = rtn.quantize_packed(w, scheme, dtype)
    groups = (scheme.n_groups(w.shape[1]), -1)
    q = unpack(words, scheme.bits, w.shape[1]).unflatten(1, groups)
    zero = unpack(rest[0], scheme.bits, w.shape[0], dim=0) if rest else None
    ours = rtn.dequantize(q, scale, zero).flatten(1)
    state = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}
    if rest:
        state["weight_zero_point"] = rest[0]
    theirs = PackedQuantizationCompressor.decompress(state, library_scheme(scheme))["weight"]
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    error = (ours.double() - w.double()).abs().unflatten(1, groups).amax(-1)
    # Half a step; a symmetric grid ends at q_max = 7 while absmax is at 7.5, and stored scales are rounded.
    bound = scale.double() * (0.5 + 2**scheme.bits * torch.finfo(dtype).eps) + 1e-12
    assert (error[7:] <= bound[7:]).all()


def test_float32_arithmetic_is_closer_than_the_library_called_on_bfloat16():
    """Why half-precision weights are widened: at 8 bits the quotient must not be rounded to 8 significant bits."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(64, 512, generator=generator).to(torch.bfloat16)
    scheme = Scheme(8, None, True)
    errors = {}
    for name, compute in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        theirs = library_scheme(scheme, scale_dtype=torch.bfloat16)
        groups = w.to(compute).unflatten(1, (1, -1))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights)
        state = {"weight": w.to(compute), "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, theirs)
        packed["weight_scale"] = packed["weight_scale"].to(torch.bfloat16)
        restored = PackedQuantizationCompressor.decompress(packed, theirs)["weight"]
        errors[name] = float((restored.double() - w.double()).norm() / w.double().norm())
    assert errors["float32"] < errors["bfloat16"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, None, False)], ids=str)
def test_nan_and_infinities_are_refused(bad, scheme):
    w = torch.ones(4, 64)
    w[2, 40] = bad
    with pytest.raises(InputError, match="NaN or infinities"):
        rtn.quantize_packed(w, scheme, torch.float32)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, None, False)], ids=str)
def test_weights_beyond_the_dtype_of_their_scale_are_refused(scheme):
    w = torch.ones(4, 64)
    w[2, 40] = -1e5
    rtn.quantize_packed(w, scheme, torch.bfloat16)
    with pytest.raises(InputError, match=r"the weights reach 1e\+05: the scale of such a group is beyond"):
        rtn.quantize_packed(w, scheme, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_observed_sums_are_those_of_the_dequantized_weights(dtype):
    w, scheme = weights(16, 128, 5).to(dtype), Scheme(4, 32, False)
    seen = []
    words, scale, zeros = rtn.quantize_packed(w, scheme, dtype, lambda *sums: seen.append(sums))
    q = unpack(words, 4, 128).unflatten(1, (4, -1))
    restored = rtn.dequantize(q, scale, unpack(zeros, 4, 16, dim=0)).flatten(1)
    assert sum(n for *_, n in seen) == 16
    assert sum(s[0] for s in seen) == pytest.approx(float((restored.double() - w.double()).square().sum()), rel=1e-5)
    assert sum(s[1] for s in seen) == pytest.approx(float(w.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "expected"), [(Scheme(4, 128), 0.12), (Scheme(4, 128, False), 0.10), (Scheme(8), 0.009)]
)
def test_relative_error_on_gaussian_weights(scheme, expected):
    """In the region that plain torch, torchao and quanto measure on real weights (0.129, 0.108, 0.011)."""
    w = torch.randn(256, 896, generator=torch.Generator().manual_seed(0))
    seen = []
    rtn.quantize_packed(w, scheme, torch.float32, lambda *sums: seen.append(sums))
    assert (sum(s[0] for s in seen) / sum(s[1] for s in seen)) ** 0.5 == pytest.approx(expected, rel=0.2)
