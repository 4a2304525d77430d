"""Weights restored of what bitsandbytes wrote are its own, bit for bit; what does not fit together is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import LlmkitError
from llmkit.quantization.codecs.bitsandbytes import CODEC, NESTED
from llmkit.quantization.codecs.nested_scales import dynamic_map
from llmkit.quantization.matrix import Grid, matrix_of
from llmkit.quantization.method import Task, quantized
from llmkit.quantization.methods.rtn import METHOD
from llmkit.quantization.points import FP4, NF4
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from tests.goldens import GOLDEN
from tests.quantization.lazies import held

RECORDED = GOLDEN / "quantized" / "bitsandbytes.safetensors"
CASES = {"case0": (6, 128), "case1": (17, 512), "case2": (6, 128), "case3": (5, 128), "case4": (7, 30), "rows": (6, 40)}


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED)


def folder(path, tensors, case):
    save_file({k: v for k, v in tensors.items() if k.startswith(f"{case}.")}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(tmp_path, recorded, case):
    expected = recorded[f"expected.{case.removeprefix('case')}"]
    ckpt = open_checkpoint(folder(tmp_path, recorded, case))
    floats = dequantized(ckpt, dtype=DType.of(expected.dtype))
    assert list(floats.tensors) == [f"{case}.weight"]
    lazy = floats[f"{case}.weight"]
    assert lazy.shape == CASES[case]
    whole = lazy.load()
    assert torch.equal(whole[[0, -1]], expected)
    n = len(whole)
    assert torch.equal(torch.cat([Context().rows(lazy, (0, 2)), Context().rows(lazy, (2, n))]), whole)
    if case == "case4":
        return  # blocks that cross rows are no matrix on a grid
    again = matrix_of(lazy).dequantized(DType.F32).load()
    assert torch.allclose(again, whole.float(), rtol=1e-2 if expected.dtype is torch.bfloat16 else 1e-3, atol=0)


def test_names_what_it_is(tmp_path, recorded):
    words = {"case0": "nf4, bitsandbytes", "case2": "fp4, bitsandbytes", "rows": "int8, bitsandbytes"}
    for case, said in words.items():
        (tmp_path / case).mkdir()
        assert describe(open_checkpoint(folder(tmp_path / case, recorded, case))) == said


@pytest.mark.parametrize(
    ("i", "points", "shape", "dtype", "codec", "size"),
    [
        (0, NF4, (6, 128), torch.bfloat16, CODEC, 64),
        (1, NF4, (17, 512), torch.float16, NESTED, 32),
        (2, FP4, (6, 128), torch.float32, CODEC, 128),
        (3, FP4, (5, 128), torch.bfloat16, NESTED, 64),
    ],
)
def test_rounded_to_nearest_is_written_as_the_library_does(recorded, i, points, shape, dtype, codec, size):
    """Every tensor, bit for bit, of the weights that `make_bitsandbytes.py` gave to `quantize_4bit`."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) * 0.05
    made = quantized(Task(held(weight), METHOD, Grid(4, size, points=points), DType.F32))
    assert (NESTED.refuses(made) is None, CODEC.refuses(made)) == (False, None)
    parts = codec.write(codec.prepared(made))
    wanted = {k.removeprefix(f"case{i}."): v for k, v in recorded.items() if k.startswith(f"case{i}.")}
    assert parts.keys() == wanted.keys()
    for name, expected in wanted.items():
        found = parts[name].load()
        assert found.dtype == expected.dtype
        if "quant_state" in name:
            assert json.loads(bytes(found)) == json.loads(bytes(expected))
        else:
            assert torch.equal(found, expected), name
    again = codec.write(codec.read(parts, {}, None))
    assert all(torch.equal(part.load(), parts[name].load()) for name, part in again.items())


def test_the_table_of_nested_scales_is_the_librarys(recorded):
    assert torch.equal(torch.tensor(dynamic_map()), recorded["case1.weight.nested_quant_map"])


def test_int8_is_read_as_it_was_written():
    weight = torch.randn((6, 40), generator=torch.Generator().manual_seed(9))
    made = quantized(Task(held(weight), METHOD, Grid(8), DType.F32))
    found = CODEC.read(CODEC.write(made), {}, None)
    assert torch.equal(found.codes.load(), made.codes.load())
    assert torch.allclose(found.scales.load(), made.scales.load(), rtol=2**-22, atol=0)
    assert NESTED.refuses(made) == "bitsandbytes_nested has no codes of 8 bits"


def as_bytes(entry) -> torch.Tensor:
    return torch.tensor(list(entry if isinstance(entry, bytes) else json.dumps(entry).encode()), dtype=torch.uint8)


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 128]}
STATE = "case0.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({STATE: as_bytes(GOOD | {"shape": [6, 127]})}, r"expected 381 bytes for \[6, 127\]"),
        ({STATE: as_bytes(GOOD | {"shape": [6, -128]})}, "shape is"),
        ({STATE: as_bytes(GOOD | {"shape": "x" * 3000})}, "shape is"),
        ({STATE: as_bytes(GOOD | {"blocksize": 0})}, "blocksize is '0'"),
        ({STATE: as_bytes(GOOD | {"blocksize": True})}, "blocksize is 'True'"),
        ({STATE: as_bytes(b"{" * 90)}, "JSON"),
        ({STATE: torch.zeros(9999, dtype=torch.uint8)}, "more than 4096"),
        ({"case0.weight.absmax": torch.ones(11)}, r"absmax is F32\[11\]; expected F32\[12\]"),
        ({"case0.weight.absmax": torch.ones(12).half()}, r"absmax is F16\[12\]; expected F32\[12\]"),
        ({"case0.weight.quant_map": torch.full((16,), torch.nan)}, "quant_map holds NaN"),
        ({"case0.weight.quant_map": None}, "quant_map is missing"),
        ({STATE: None}, "it has 0 tensors"),
        ({"case0.weight": None}, "case0.weight is missing"),
        ({"case0.weight.nested_absmax": torch.ones(1)}, "nested_blocksize is 'None'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, recorded, changed, message):
    tensors = {k: v for k, v in (recorded | changed).items() if v is not None}
    with pytest.raises(LlmkitError, match=message) as caught:
        dequantized(open_checkpoint(folder(tmp_path, tensors, "case0")))
    assert caught.value.message.startswith("case0.weight: ")


def test_tiles_of_a_gpu_are_refused(tmp_path, recorded):
    tensors = recorded | {"rows.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(LlmkitError, match="tiles of a GPU"):
        dequantized(open_checkpoint(folder(tmp_path, tensors, "rows")))


def test_states_in_pickles_are_refused_by_name(tmp_path):
    """What Baichuan2's `-4bits` releases hold: bytes, and a list beside them, which says how to read them."""
    state = [torch.ones(4), torch.Size([4, 64]), torch.float16, 64, None, "nf4", torch.zeros(16)]
    weight = "model.layers.0.mlp.up_proj.weight"
    stored = {f"{weight}.data": torch.zeros((128, 1), dtype=torch.uint8), f"{weight}.quant_state": state}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(LlmkitError, match=r"4 bits, bitsandbytes before 0\.42, pickled\), which is not read"):
        dequantized(open_checkpoint(tmp_path))
