"""Every codec reads what it wrote of a matrix, part by part; what it cannot hold is refused with a reason."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import entry_points
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.quantization.codec import GROUP, Codec, FolderCodec
from llmkit.quantization.codecs.nbits import NBits
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.packing import pack
from llmkit.quantization.points import Points
from llmkit.quantization.words import zero_points
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.spec import DType
from tests.quantization.lazies import held, zeros_on

ODD = Points("odd", 4, tuple(float(i) / 7 for i in range(16)))
LOADED = {e.name: entry_points.load(e) for e in entry_points.entries(GROUP) if e.is_builtin}
CODECS: dict[str, Codec] = {name: codec for name, codec in LOADED.items() if isinstance(codec, Codec)}


def matrix(grid: Grid, shape: tuple[int, int], seed: int = 0, **parts: object) -> QuantizedMatrix:
    """Random codes, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], grid.n_groups(shape[1]))
    codes = torch.randint(0, 1 << grid.bits, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, generator=generator) + 0.1).half()
    zeros = torch.randint(1, 1 << grid.bits, groups, dtype=torch.uint8, generator=generator)
    given_zeros = None if grid.is_symmetric or "offsets" in parts else held(zeros)
    return QuantizedMatrix(grid, shape, held(pack(codes, grid.bits)), held(scales), given_zeros, **parts)


def loaded(lazy: Lazy | None) -> torch.Tensor | None:
    return None if lazy is None else lazy.load()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([16, 32, 64, 128, None]),
    st.booleans(),
    st.sampled_from([1, 7, 32, 40, 64]),
    st.integers(1, 3),
)
def test_what_is_written_is_read_again(name, bits, group, symmetric, rows, groups):
    codec, grid = CODECS[name], Grid(bits, group, symmetric)
    made = matrix(grid, (rows, (group or 96) * groups), seed=rows)
    if codec.refuses(made) is not None:
        return
    if isinstance(codec, NBits):
        fitted = codec.in_blocks(made)
        assert torch.equal(fitted.dequantized(DType.F32).load(), made.dequantized(DType.F32).load())
        made = fitted
    parts = codec.write(made)
    found = codec.read(parts, codec.settings(made), made.shape)
    assert found.shape == made.shape
    # NBits has fields of 4 and 8 bits, GGUF blocks of 32 of a few sizes: of other codes the values are the same.
    is_same_grid = {"onnx": bits in (4, 8), "gguf": bits in (4, 5, 8) and group == 32}.get(name, True)
    if is_same_grid:
        if found.zeros is not None:  # all layouts with symmetric grids but AWQ's leave their zero points out
            assert torch.equal(zero_points(made).load(), found.zeros.load())
        for part in ("codes", "scales", "offsets", "order"):
            ours, theirs = loaded(getattr(made, part)), loaded(getattr(found, part))
            assert (ours is None) == (theirs is None), part
            assert ours is None or torch.equal(ours, theirs), part
        assert (found.bits, found.group) == (made.bits, made.group)
        assert found.grid.is_symmetric == made.grid.is_symmetric or name == "awq"
    assert torch.equal(found.dequantized(DType.F32).load(), made.dequantized(DType.F32).load())


def test_what_no_layout_holds_is_said():
    offsets = held(torch.ones(4, 2))
    made = {
        "offsets": matrix(Grid(4, 32, False), (4, 64), offsets=offsets),
        "codes of odd": matrix(Grid(4, 32, points=ODD), (4, 64)),
        "columns in another order": matrix(Grid(4, 32), (4, 64), order=held(torch.arange(64, dtype=torch.int32) % 2)),
    }
    for what, one in made.items():
        assert what in CODECS["llama2c"].refuses(one)
        assert one.dequantized().load().shape == (4, 64)
    compressed = CODECS["compressed-tensors"]
    assert compressed.refuses(made["columns in another order"]) is None
    assert compressed.refuses(matrix(Grid(4, 32), (4, 40))) == "rows of 40 weights do not fall into groups of 32"
    assert CODECS["llama2c"].refuses(matrix(Grid(8, 32, False), (4, 64))) == "llama2c has no zero points"
    assert CODECS["llama2c"].refuses(matrix(Grid(4, 32), (4, 64))) == "llama2c has no codes of 4 bits"
    assert CODECS["onnx"].refuses(matrix(Grid(4, 24), (4, 48))).startswith("onnx has no blocks for int4 group 24")


def test_values_are_multiplied_in_float32_and_rounded_once():
    made = matrix(Grid(4, 32, points=ODD), (4, 64))
    q = torch.stack([made.codes.load() & 15, made.codes.load() >> 4], -1).flatten(1)
    wanted = torch.tensor(ODD.values)[q.long()] * made.scales.load().float().repeat_interleave(32, 1)
    assert torch.equal(made.dequantized(DType.F32).load(), wanted)
    assert torch.equal(made.dequantized(DType.BF16).load(), wanted.bfloat16())


def test_codecs_of_folders_say_what_they_write():
    folders = [codec for codec in CODECS.values() if isinstance(codec, FolderCodec)]
    assert folders
    for codec in folders:
        entry = codec.describe({"a": zeros_on(Grid(4, 32)), "b": zeros_on(Grid(4, 32))}, ["c"], are_all=True)
        assert entry["quant_method"] == codec.name.removesuffix("_v2").removesuffix("_nested")


def test_columns_in_another_order():
    """`order` gives each column its group; the layout that has a place for it keeps it."""
    order = (torch.randperm(96, generator=torch.Generator().manual_seed(2)) // 32).int()
    made = matrix(Grid(4, 32, False), (6, 96), order=held(order))
    codec = CODECS["compressed-tensors"]
    found = codec.read(codec.write(made), codec.settings(made), made.shape)
    assert codec.settings(made)["weights"]["actorder"] == "group"
    entry = codec.describe({"a": made, "b": matrix(made.grid, (6, 96))}, [], are_all=False)["config_groups"]
    assert [(g["targets"], g["weights"]["actorder"]) for g in entry.values()] == [(["a"], "group"), (["b"], None)]
    assert torch.equal(found.order.load(), order)
    q = torch.stack([found.codes.load() & 15, found.codes.load() >> 4], -1).flatten(1).half()
    wanted = (q - found.zeros.load().half()[:, order.long()]) * found.scales.load()[:, order.long()]
    assert torch.equal(found.dequantized().load(), wanted)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_gguf_are_the_librarys(kind):
    """Blocks that the library made are read as a matrix and written again, byte for byte; whole and in slices."""
    codec = CODECS["gguf"]
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)).numpy()
    raw = quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    made = codec.read({"": held(torch.from_numpy(raw))}, {"type": kind}, (24, 96))
    wanted = quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(made.dequantized(DType.F32).load().numpy(), wanted)
    assert codec.refuses(made) is None
    assert codec.type_of(made) == kind
    written = codec.write(made)[""]
    assert written.shape == (24, TYPE_BY_NAME[kind].row_nbytes(96))
    assert np.array_equal(written.load().numpy(), raw)
    pieces = [Context().rows(written, rows) for rows in ((0, 7), (7, 24))]
    assert np.array_equal(torch.cat(pieces).numpy(), raw)


def test_a_grid_of_another_layout_goes_into_blocks():
    """Symmetric int4 in groups of 32 with float16 scales is Q4_0, code for code."""
    made, codec = matrix(Grid(4, 32), (5, 64)), CODECS["gguf"]
    raw = codec.write(made)[""].load().numpy()
    wanted = quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(wanted, made.dequantized(DType.F32).load().numpy())
    assert codec.refuses(matrix(Grid(4, 64), (5, 64))) is None  # a group of two blocks
    assert codec.refuses(matrix(Grid(4, 16), (5, 64))) is not None
    assert codec.refuses(matrix(Grid(4, 32, False), (5, 64))) == "gguf has no zero points"
