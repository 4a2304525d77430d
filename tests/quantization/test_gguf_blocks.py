"""Blocks of GGUF files: the bits of the gguf library, for every type, whole and in slices."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from llmkit.errors import InputError, RequirementError
from llmkit.formats.gguf_header import encode_header, read_header
from llmkit.formats.gguf_types import TYPE_BY_NAME, TYPES
from llmkit.quantization.codecs.gguf import quantized, stored_tensor
from llmkit.quantization.matrix import matrix_of
from llmkit.tensors.lazy import Context, Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the library, for random scales
OF_GGML = json.loads((Path(__file__).parents[1] / "golden" / "gguf" / "blocks.json").read_text())
BLOCKS = [t for t in TYPES.values() if t.dtype is None and t.is_known and t.name not in OF_GGML]


def written(path, name, data, code):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(path)
    return stored_tensor(file, file.tensors[0])


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, so that the sign of zero counts; every NaN is alike."""
    return torch.where(x.isnan(), torch.tensor(float("nan")), x).contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(7, 2), (2,), (3, 5, 1)], ids=str)
def test_dequantized_as_the_library_does(tmp_path, kind, shape):
    rng = np.random.default_rng(kind.code)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * kind.nbytes), dtype=np.uint8)
    lazy = written(tmp_path / "x.gguf", "t", raw, kind.code)
    expected = torch.from_numpy(quants.dequantize(raw, gguf.GGMLQuantizationType(kind.code)))
    assert lazy.spec == TensorSpec(DType.F32, (*shape[:-1], shape[-1] * kind.block))
    assert torch.equal(bits(lazy.load()), bits(expected))
    if len(shape) > 1:
        node = lazy.node
        pieces = [node.evaluate((i, i + 1), Context())[0] for i in range(node.n_rows)]
        assert torch.equal(bits(torch.cat(pieces)), bits(expected))


@pytest.mark.parametrize("name", OF_GGML)
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_types_that_the_library_lacks_are_restored_as_ggml_does(tmp_path, name, n_dims):
    raw = b"".join(map(bytes.fromhex, OF_GGML[name]["raw"]))
    wanted = torch.tensor(OF_GGML[name]["values"])
    wanted = wanted.view({1: (-1,), 2: (2, -1), 3: (2, 2, -1)}[n_dims])
    header, offsets, _ = encode_header({"general.architecture": "x"}, [("t", TYPE_BY_NAME[name], tuple(wanted.shape))])
    (tmp_path / "x.gguf").write_bytes(header.ljust(offsets["t"], b"\0") + raw)
    file = read_header(tmp_path / "x.gguf")
    lazy = stored_tensor(file, file.tensors[0])
    assert torch.equal(bits(lazy.load()), bits(wanted))
    if n_dims == 2:
        assert torch.equal(matrix_of(lazy).dequantized(DType.F32).load(), wanted)
        pieces = [lazy.node.evaluate((i, i + 1), Context())[0] for i in range(2)]
        assert torch.equal(torch.cat(pieces), wanted)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 30)], ids=str)
def test_floats_stay_as_they_are(tmp_path, dtype, code):
    x = torch.randn(3, 5).to(dtype)
    raw = x.view(torch.uint8).numpy() if dtype is torch.bfloat16 else x.numpy()
    lazy = written(tmp_path / "x.gguf", "t", raw, code)
    assert isinstance(lazy.node, Read)
    assert lazy.load().dtype is dtype
    assert torch.equal(lazy.load(), x)


def test_types_of_sums_are_refused(tmp_path):
    with pytest.raises(RequirementError, match="t is Q8_1, which is not dequantized"):
        written(tmp_path / "x.gguf", "t", np.zeros((1, 40), dtype=np.uint8), TYPE_BY_NAME["Q8_1"].code)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantized_as_the_library_does(tmp_path, name, dtype):
    x = (torch.randn(37, 96, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[3] = 0
    x[4, :32] = 65280.0  # the largest of bfloat16 that float16 holds, too
    x[5, :2], x[6, :2] = torch.tensor([[-64.0, 64.0], [64.0, -64.0]]).to(dtype)  # the first of both is divided by
    (tmp_path / "x").write_bytes(x.view(torch.uint8).numpy().tobytes())
    source = Read("t", TensorSpec(DType.of(dtype), (37, 96)), SourceFile(tmp_path / "x"), 0).output()
    lazy = quantized(source, name, "t")
    expected = quants.quantize(x.float().numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(lazy.load(), torch.from_numpy(expected))
    pieces = [lazy.node.evaluate((i, min(i + 5, 37)), Context())[0] for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(pieces), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((name, float(bad), "NaN or infinities") for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1") for bad in
          ("nan", "inf", "-inf")),
        ("Q8_0", 127 * 65536.0, "reach 8.32e"), ("Q4_0", -8 * 65536.0, "reach 5.24e"),
        ("Q5_0", 16 * 65536.0, "reach 1.05e"), ("Q4_1", -65536.0, "reach 6.55e"), ("Q5_1", 31 * 65536.0, "reach 2.03e"),
    ],
)  # fmt: skip
def test_blocks_whose_scale_is_not_finite_are_refused(tmp_path, name, value, said):
    x = torch.ones(4, 64)
    x[2, 40] = value
    stored = quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    # the library gives up the block without a word
    assert not np.isfinite(quants.dequantize(stored, gguf.GGMLQuantizationType[name])).all()
    (tmp_path / "x").write_bytes(x.view(torch.uint8).numpy().tobytes())
    source = Read("t", TensorSpec(DType.F32, (4, 64)), SourceFile(tmp_path / "x"), 0).output()
    with pytest.raises(InputError, match=rf"blk\.0\.w: the weights .*{said}"):
        quantized(source, name, "blk.0.w").load()
