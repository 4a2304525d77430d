"""Casts of vectors without torch have torch's bits."""

from __future__ import annotations

import pytest
import torch

from llmkit.tensors.lazy import Context, Read
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.tensors.vectors import cast_vector


def stored(path, x: torch.Tensor):
    path.write_bytes(x.view(torch.uint8).numpy().tobytes())
    return Read("x", TensorSpec(DType.of(x.dtype), tuple(x.shape)), SourceFile(path), 0).output()


def moved(lazy) -> torch.Tensor:
    data = lazy.node.move((0, lazy.node.n_rows), Context())[0]
    return torch.frombuffer(bytearray(data), dtype=lazy.dtype.torch)


def halves(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a half-precision type."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[~every.isnan()]


def floats() -> torch.Tensor:
    """What rounding is about: random numbers, ties, the borders of overflow and underflow, infinities, zeros."""
    g = torch.Generator().manual_seed(0)
    some = torch.randn(4000, generator=g) * torch.logspace(-30, 38, 4000)
    ties = torch.cat([(h[:-1].float() + h[1:].float()) / 2 for h in (halves(torch.float16), halves(torch.bfloat16))])
    edges = torch.tensor([65504.0, 65519.0, 65520.0, 1e38, 3.4e38, 6e-8, 1e-45, 0.0, float("inf")])
    return torch.cat([some, ties[~ties.isnan()], edges, -edges])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_widened_and_narrowed_back(tmp_path, dtype):
    every = halves(dtype)
    wide = cast_vector(stored(tmp_path / "x", every), DType.F32)
    assert wide.node.is_moved
    assert torch.equal(moved(wide).view(torch.int32), every.float().view(torch.int32))
    assert torch.equal(wide.load(), every.float())
    back = cast_vector(wide, DType.of(dtype))
    assert torch.equal(moved(back).view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_as_torch_rounds(tmp_path, dtype):
    x = floats()
    found = moved(cast_vector(stored(tmp_path / "x", x), DType.of(dtype)))
    assert torch.equal(found.view(torch.int16), x.to(dtype).view(torch.int16))


def test_nan_stays(tmp_path):
    x = torch.tensor([float("nan"), 1.0])
    for dtype in (DType.F16, DType.BF16):
        assert moved(cast_vector(stored(tmp_path / "x", x), dtype)).isnan().tolist() == [True, False]


def test_matrices_and_other_dtypes_are_cast_as_ever(tmp_path):
    matrix = cast_vector(stored(tmp_path / "m", torch.ones(2, 3)), DType.F16)
    assert not matrix.node.is_moved
    assert torch.equal(matrix.load(), torch.ones(2, 3, dtype=torch.float16))
    double = cast_vector(stored(tmp_path / "d", torch.ones(3, dtype=torch.float64)), DType.F32)
    assert torch.equal(double.load(), torch.ones(3))
    same = stored(tmp_path / "s", torch.ones(3))
    assert cast_vector(same, DType.F32) is same
