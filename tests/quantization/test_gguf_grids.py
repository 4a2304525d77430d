"""The integers of GGUF blocks, multiplied out in numpy: the floats of the gguf library, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from test_gguf_blocks import OF_GGML, written

from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.quantization.codecs.gguf_grids import GRIDS as ALL_GRIDS
from llmkit.quantization.matrix import matrix_of
from llmkit.quantization.packing import unpack
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType

GRIDS = [name for name in ALL_GRIDS if name not in OF_GGML]
# Bytes of a block that hold float16 numbers: random bits there would make NaN and infinities.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": []}  # fmt: skip


def random_blocks(kind, n_rows, n_blocks):
    """Rows of random codes and scales, negative and subnormal ones among them."""
    rng = np.random.default_rng(kind.code)
    raw = rng.integers(0, 256, (n_rows, n_blocks, kind.nbytes), dtype=np.uint8)
    for at in HALVES[kind.name]:
        sizes = rng.choice([1e-7, 1e-4, 1e-2, 3.0], (n_rows, n_blocks, 1))
        values = (rng.standard_normal((n_rows, n_blocks, 1)) * sizes).astype(np.float16)
        raw[..., at : at + 2] = values.view(np.uint8)
    if kind.name == "MXFP4":
        raw[..., 0] = rng.integers(0, 200, raw.shape[:2])  # the exponent; more would overflow
    return raw.reshape(n_rows, -1)


def restored(matrix):
    """The float32 matrix, in the order of operations that `QuantizedMatrix` states."""
    values = unpack(matrix.codes.load(), matrix.bits, matrix.shape[1]).numpy().astype(np.int64)
    scales = matrix.scales.load().float().numpy()
    if matrix.grid.points is not None:
        values = np.array(matrix.grid.points.values)[values]
    elif matrix.offsets is None:
        values = values - (1 << (matrix.bits - 1))
    values = values.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
    if matrix.offsets is not None:
        values = values + matrix.offsets.load().float().numpy()[..., None]
    return values.reshape(len(values), -1)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_matrix_of_the_library(tmp_path, name):
    kind = TYPE_BY_NAME[name]
    raw = random_blocks(kind, 9, 3)
    matrix = matrix_of(written(tmp_path / "x.gguf", "t", raw, kind.code))
    wanted = quants.dequantize(raw, gguf.GGMLQuantizationType(kind.code))
    assert matrix.shape == wanted.shape
    assert np.array_equal(restored(matrix), wanted)
    assert np.array_equal(matrix.dequantized(DType.F32).load().numpy(), wanted)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_in_slices_of_rows(tmp_path, name):
    kind = TYPE_BY_NAME[name]
    matrix = matrix_of(written(tmp_path / "x.gguf", "t", random_blocks(kind, 7, 2), kind.code))
    for part in (matrix.codes, matrix.scales, matrix.offsets):
        if part is not None:
            pieces = [Context().rows(part, rows) for rows in ((0, 3), (3, 7))]
            assert torch.equal(torch.cat(pieces), part.load())


def test_types_that_are_no_even_grid_have_no_codes(tmp_path):
    kind = TYPE_BY_NAME["IQ2_XXS"]
    raw = np.zeros((2, kind.nbytes), dtype=np.uint8)
    assert matrix_of(written(tmp_path / "x.gguf", "t", raw, kind.code)) is None
