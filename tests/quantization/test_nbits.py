"""The layout of MatMulNBits: what ONNX Runtime reads out of the bytes, and what its own quantizer would have written.

The kernel multiplies the identity: at accuracy level 0 that is the matrix it sees, bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmkit.errors import InputError
from llmkit.onnx.integer_matrices import IntegerMatrix
from llmkit.quantization.codecs.nbits import CODEC
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.method import Task, quantized
from llmkit.quantization.methods.rtn import METHOD, scales_and_zeros
from llmkit.quantization.packing import width
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from tests.quantization.lazies import held

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


def rounded(name, weight, grid, scale_dtype):
    """A float matrix as the graph would have it."""
    return CODEC.in_blocks(quantized(Task(weight, METHOD, grid, scale_dtype, name)))


def seen_by_the_kernel(matrix, *, as_table=False):
    """The float32 matrix [N, K] that ONNX Runtime computes with."""
    n, k = matrix.shape
    parts = IntegerMatrix(matrix, as_table).parts
    arrays = {name.removeprefix("weight_"): lazy.load().numpy() for name, lazy in parts.items()}
    arrays["scales"] = arrays["scales"].astype(np.float32)
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    about = {"bits": width(matrix.bits), "block_size": matrix.group, "domain": "com.microsoft"}
    if as_table:
        node = helper.make_node("GatherBlockQuantized", ["codes", "A", *list(arrays)[1:]], ["Y"], gather_axis=0,
                                quantize_axis=1, **about)  # fmt: skip
        kind, value = TensorProto.INT64, np.arange(n)
    else:
        node = helper.make_node("MatMulNBits", ["A", *arrays], ["Y"], K=k, N=n, accuracy_level=0, **about)
        kind, value = TensorProto.FLOAT, np.eye(k, dtype=np.float32)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("A", kind, list(value.shape))],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"A": value})[0]
    return found if as_table else found.T


def weights(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [256, 200, 33])
def test_the_kernel_sees_the_grid_of_round_to_nearest(bits, group, symmetric, k):
    weight = weights(24, k)
    matrix = rounded("w", held(weight), Grid(bits, group, symmetric), DType.F32)
    found = seen_by_the_kernel(matrix)
    assert np.array_equal(found, matrix.dequantized(DType.F32).load().numpy())
    # Independently, from the grid of every group: each value the nearest point, and the distance what it may be.
    size = group or k
    for start in range(0, k, size):
        part = weight[:, start : start + size]
        scale, zero = scales_and_zeros(part[:, None], Grid(bits, None, symmetric), torch.float32)
        zero = torch.zeros_like(scale) if zero is None else zero.float()
        q = torch.from_numpy(found[:, start : start + size].copy()) / scale + zero
        assert torch.allclose(q, q.round(), atol=1e-3)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        assert float((q.round() - (part / scale + zero).clamp(low, high)).abs().max()) <= 0.5001


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 16), (4, None), (8, 64)])
def test_a_table_is_read_by_rows_and_multiplied(bits, group, symmetric):
    weight = weights(30, 192)
    matrix = rounded("w", held(weight), Grid(bits, group, symmetric), DType.F32)
    assert len(IntegerMatrix(matrix, is_table=True).parts["weight_codes"].shape) == 2
    assert np.array_equal(seen_by_the_kernel(matrix, as_table=True), matrix.dequantized(DType.F32).load().numpy())


def test_zero_points_and_codes_are_those_of_onnxruntime():
    """Its quantizer has the same grid for asymmetric groups: same range, same rounding; ties may go either way."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    weight = weights(64, 256, seed=3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["A", "W"], ["Y"], name="product")], "g",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["m", 256])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["m", 64])],
        [numpy_helper.from_array(weight.t().contiguous().numpy(), "W")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False)
    quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
    quantizer.process()
    theirs = {i.name: numpy_helper.to_array(i) for i in quantizer.model.graph().initializer}
    codes, scales, zeros = (next(a for name, a in theirs.items() if end in name) for end in ("Q4", "scale", "zero"))
    matrix = rounded("w", held(weight), Grid(4, 32, is_symmetric=False), DType.F32)
    written = {name: part.load().numpy() for name, part in CODEC.write(matrix).items()}
    assert codes.shape == written["weight_codes"].shape
    assert np.allclose(scales.reshape(64, 8), written["weight_scales"], rtol=1e-6)
    assert np.array_equal(zeros.reshape(64, 4), written["weight_zeros"])
    assert (codes == written["weight_codes"]).mean() > 0.999


def codes_of(n, k, bits, group, symmetric, seed=0):
    """Codes as a reader gives them, and the matrix they stand for."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator) + 0.1
    zeros = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), generator=generator, dtype=torch.uint8)
    middle = torch.full((n, k // group), 1 << (bits - 1)) if zeros is None else zeros
    wanted = (q.float().view(n, -1, group) - middle.float()[..., None]) * scales[..., None]
    stored = q if bits == 8 else torch.nn.functional.pad(q, (0, k % 2)).view(n, -1, 2)
    stored = stored if bits == 8 else stored[..., 0] | (stored[..., 1] << 4)
    zero_points = None if zeros is None else held(zeros)
    made = QuantizedMatrix(Grid(bits, group, symmetric), (n, k), held(stored), held(scales), zero_points)
    return made, wanted.view(n, k).numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("k", "group", "block"),
    [(256, 64, 64), (1024, 512, 256), (96, 48, 16), (64, 64, 64), (50, 50, 32), (1536, 768, 256)],
)
def test_codes_that_are_there_stay_bit_for_bit(bits, symmetric, k, group, block):
    codes, wanted = codes_of(10, k, bits, group, symmetric)
    matrix = CODEC.in_blocks(codes)
    assert matrix.group == block
    assert np.array_equal(seen_by_the_kernel(matrix), wanted)
    assert np.array_equal(matrix.dequantized(DType.F32).load().numpy(), wanted)


def test_groups_that_no_block_divides_are_not_fitted():
    assert CODEC.in_blocks(codes_of(4, 48, 4, 24, True)[0]) is None
    assert CODEC.in_blocks(codes_of(4, 40, 8, 8, True)[0]) is None


@pytest.mark.parametrize(("symmetric", "group"), [(True, 64), (False, 32), (False, None)])
def test_slices_of_rows_give_the_same_bytes(symmetric, group):
    """The runner computes a matrix in slices; nothing may depend on where they begin."""
    matrix = rounded("w", held(weights(37, 100)), Grid(4, group, symmetric), DType.F32)
    for lazy in CODEC.write(matrix).values():
        assert lazy.node.row_step == 1
        pieces = [Context().rows(lazy, rows) for rows in ((0, 5), (5, 6), (6, 37))]
        assert torch.equal(torch.cat(pieces), lazy.load())


def test_what_no_grid_holds_is_named():
    weight = weights(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(InputError, match=r"layers\.0\.w: the weights hold NaN"):
        rounded("layers.0.w", held(weight), Grid(4, 32), DType.F32).codes.load()


def test_scales_in_half_precision_are_the_ones_that_are_used():
    weight = weights(8, 64)
    matrix = rounded("w", held(weight), Grid(8, 32), DType.F16)
    scales = matrix.scales.load()
    assert scales.dtype is torch.float16
    codes = matrix.codes.load().float().sub_(128).view(8, 2, 32)
    wanted = codes.mul_(scales.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(matrix.dequantized(DType.F32).load(), wanted)
    assert float((wanted - weight).abs().max()) < 1e-2
