"""Blocks made of floats: no worse than ggml's own (recorded: tests/golden/gguf), and readable by the gguf library."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from lazies import held

from llmkit.errors import InputError
from llmkit.quantization.codecs.gguf import CODEC, quantized
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from tests.golden.gguf.record import HERE, TYPES, WEIGHTS, by_ggml, importance, measured_error

RECORDED = json.loads((HERE / "errors.json").read_text())
OF_INTEGERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def read(raw: torch.Tensor, kind: str) -> np.ndarray:
    return quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("of", WEIGHTS)
def test_the_error_is_no_larger_than_that_of_ggml(of, kind, is_weighted):
    weights = WEIGHTS[of]()
    squares = held(torch.from_numpy(importance(weights.shape[1]))) if is_weighted else None
    raw = quantized(held(torch.from_numpy(weights)), kind, "w", squares).load()
    recorded = RECORDED[of][kind]["weighted" if is_weighted else "plain"]
    assert measured_error(read(raw, kind), weights, is_weighted=is_weighted) <= recorded * (1 + 1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("scale", [1e-4, 3.0])
def test_the_same_beside_the_library_itself(kind, scale):
    """Other weights than the recorded ones, small and large, with columns that count little."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    rng = np.random.default_rng(5)
    weights = (rng.standard_t(4, (32, 512)) * np.exp(0.5 * rng.standard_normal((1, 512))) * scale).astype(np.float32)
    squares = importance(512)
    for given in (None, squares):
        lazy = None if given is None else held(torch.from_numpy(given))
        own = read(quantized(held(torch.from_numpy(weights)), kind, "w", lazy).load(), kind)
        errors = [measured_error(made, weights, is_weighted=given is not None)
                  for made in (own, by_ggml(weights, kind, given))]  # fmt: skip
        assert errors[0] <= errors[1] * (1 + 1e-5), (given is None, errors)


@pytest.mark.parametrize("kind", [*OF_INTEGERS, "IQ4_NL"])
def test_what_is_written_is_read_alike_by_the_library_and_here(kind):
    x = held(torch.from_numpy(WEIGHTS["random"]()))
    lazy = quantized(x, kind, "w", held(torch.from_numpy(importance(x.shape[1]))))
    raw = lazy.load()
    pieces = [Context().rows(lazy, rows) for rows in ((0, 5), (5, 64))]
    assert torch.equal(torch.cat(pieces), raw)  # a row is computed from itself alone
    matrix = CODEC.read({"": held(raw)}, {"type": kind}, tuple(x.shape))
    wanted = read(raw, kind)
    assert np.array_equal(matrix.dequantized(DType.F32).load().numpy(), wanted)
    assert not wanted[3].any()  # a row of zeros
    assert abs(wanted[4] - 0.5).max() < {"Q2_K": 0.02, "Q3_K": 0.02}.get(kind, 0.01)  # a row of one value


@pytest.mark.parametrize("kind", OF_INTEGERS)
def test_columns_that_no_token_reached_are_rounded_all_the_same(kind):
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    squares = torch.ones(256)
    squares[32:64] = 0
    raw = quantized(held(x), kind, "w", held(squares)).load()
    error = (torch.from_numpy(read(raw, kind)) - x).square()
    assert error[:, 32:64].mean() < 2 * error.mean()


def test_inputs_of_zero_count_nothing_and_infinite_ones_are_refused():
    x = held(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)))
    plain = quantized(x, "Q4_K", "w").load()
    assert torch.equal(quantized(x, "Q4_K", "w", held(torch.zeros(256))).load(), plain)
    for value, said in ((torch.inf, "NaN or infinities"), (-1.0, "squares below 0")):
        with pytest.raises(InputError, match=f"w: what was measured of its inputs holds {said}"):
            quantized(x, "Q4_K", "w", held(torch.full((256,), value))).load()


@pytest.mark.parametrize("kind", [*OF_INTEGERS, "IQ4_NL"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or infinities"), (3e9, "reach 3e")])
def test_weights_that_no_block_holds_are_refused(kind, value, said):
    x = torch.ones(2, 256)
    x[1, 77] = value
    with pytest.raises(InputError, match=f"the matrix: the weights .*{said}"):
        quantized(held(x), kind, "the matrix").load()
