"""Weights restored of what HQQ wrote are its own, bit for bit; its texts are compared, never evaluated."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.errors import LlmkitError
from llmkit.quantization.matrix import matrix_of
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from tests.goldens import GOLDEN
from tests.published import text_tensor

RECORDED = GOLDEN / "quantized" / "hqq_layout.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED)


def opened(path, tensors, case):
    save_file({k: v for k, v in tensors.items() if k.startswith(f"{case}.")}, path / "model.safetensors")
    return open_checkpoint(path)


@pytest.mark.parametrize("case", range(9))
def test_equals_the_library(tmp_path, recorded, case):
    expected = recorded[f"expected.{case}"]
    ckpt = opened(tmp_path, recorded, f"case{case}")
    assert describe(ckpt) == "hqq"
    floats = dequantized(ckpt, dtype=DType.of(expected.dtype))
    assert list(floats.tensors) == [f"case{case}.{end}" for end in (("bias", "weight") if case == 0 else ("weight",))]
    lazy = floats[f"case{case}.weight"]
    assert lazy.shape == tuple(recorded[f"case{case}.shape"].tolist())
    whole = lazy.load()
    assert torch.equal(whole[[0, -1]], expected)
    assert torch.equal(torch.cat([Context().rows(lazy, (0, 3)), Context().rows(lazy, (3, len(whole)))]), whole)
    assert (matrix_of(lazy) is None) == (case in (5, 6, 7))  # groups that are not of neighbours in a row


EVIL = text_tensor("open('evaluated', 'w')")


@pytest.mark.parametrize(
    ("end", "part", "message"),
    [
        ("packing", EVIL, "packing .* is not read; expected 8bit_u8"),
        ("packing", torch.zeros(5000, dtype=torch.uint8), "more than 4096"),
        ("packing", None, "packing is missing"),
        ("shape", torch.tensor([6, -64]), "are no weight's"),
        ("shape", torch.tensor([6.0, 64.0]), "shape is F32"),
        ("shape", torch.tensor([6, 65]), "groups of 32 do not divide 6 x 65"),
        ("shape", torch.tensor([2**62, 64]), "are no weight's"),
        ("group_size", torch.tensor(0, dtype=torch.int32), "are no weight's"),
        ("group_size", torch.tensor([32, 32], dtype=torch.int32), "group_size is I32"),
        ("axis", torch.tensor(2, dtype=torch.int32), "are no weight's"),
        ("scale", torch.ones(11, 1), r"scale is F32\[11, 1\]; expected F16\[12, 1\]"),
        ("zero", None, "zero is missing"),
        ("W_q", torch.zeros(5, 32, dtype=torch.uint8), "cannot be seen as"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, recorded, end, part, message):
    tensors = {k: v for k, v in (recorded | {f"case1.{end}": part}).items() if v is not None}
    with pytest.raises(LlmkitError, match=message) as caught:
        dequantized(opened(tmp_path, tensors, "case1"))
    assert caught.value.message.startswith("case1: ")


def test_what_the_library_evaluates_is_not_looked_at(tmp_path, recorded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = recorded | {"case1.compute_dtype": EVIL, "case1.unpack_view_dtype": EVIL.clone()}
    found = dequantized(opened(tmp_path, tensors, "case1"), dtype=DType.BF16)["case1.weight"].load()
    assert torch.equal(found[[0, -1]], recorded["expected.1"])
    assert not (tmp_path / "evaluated").exists()


def test_the_pickle_of_its_own_models(tmp_path):
    """`qmodel.pt`: numbers and texts beside tensors, in a mapping for each module; dtypes are names only."""
    expected = load_file(GOLDEN / "quantized" / "hqq_qmodel.safetensors")
    (tmp_path / "qmodel.pt").write_bytes((GOLDEN / "quantized" / "hqq_qmodel.pt").read_bytes())
    ckpt = open_checkpoint(tmp_path)
    assert describe(ckpt) == "hqq"
    floats = dequantized(ckpt)
    assert set(floats.tensors) == {*expected, "norm.bias", "down.bias"}
    for name, weight in expected.items():
        assert torch.equal(floats.tensors[name].load(), weight), name


def test_pickles_that_are_no_such_models(tmp_path):
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    parts = {"W_q": codes, "packing": EVIL, "shape": (6, 2**70), "scale": [1.5], "nbits": "4" * 2000}
    torch.save({"up": parts, "norm": {"weight": torch.ones(2), "axis": 1}, 3: {"W_q": codes}}, tmp_path / "qmodel.pt")
    ckpt = open_checkpoint(tmp_path)
    assert set(ckpt.tensors) == {"up.W_q", "up.packing", "norm.weight"}
    with pytest.raises(LlmkitError, match=r"up: packing .* is not read"):
        dequantized(ckpt)
    torch.save({"up": {"W_q": codes, "compute_dtype": print}}, tmp_path / "qmodel.pt")
    with pytest.raises(LlmkitError, match=r"wants to run \w+\.print"):
        open_checkpoint(tmp_path)
