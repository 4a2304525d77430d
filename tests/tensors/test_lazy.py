"""Expressions: a slice gives the bits of the whole, specs are known at once, nothing is read until asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmkit.errors import SpecError
from llmkit.formats import safetensors
from llmkit.pipeline.plan import slice_rows
from llmkit.tensors.lazy import Apply, Context
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.nodes import NodeTable
from llmkit.tensors.spec import DType, TensorSpec


@pytest.fixture
def stored(tmp_path):
    g = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(23, 6, generator=g) for n in "ab"} | {"v": torch.randn(6, generator=g)}
    save_file(tensors, tmp_path / "m.safetensors")
    return tensors, safetensors.read(tmp_path / "m.safetensors")[0]


def in_slices(lazy, slice_nbytes):
    node, context, pieces = lazy.node, Context(), []
    for rows in slice_rows(node, slice_nbytes):
        context.next_slice()
        pieces.append(node.evaluate(rows, context)[lazy.index])
    return torch.cat(pieces)


def add(x, y):
    return Apply("add", [x, y], x.spec, torch.add).output()


@settings(max_examples=60, deadline=None)
@given(slice_nbytes=st.integers(1, 800), start=st.integers(0, 22), n=st.integers(1, 23))
def test_every_slicing_gives_the_whole(tmp_path_factory, slice_nbytes, start, n):
    folder = tmp_path_factory.mktemp("s")
    g = torch.Generator().manual_seed(1)
    a, b, v = torch.randn(23, 6, generator=g), torch.randn(23, 6, generator=g), torch.randn(6, generator=g)
    save_file({"a": a, "b": b, "v": v}, folder / "m.safetensors")
    lazies, _ = safetensors.read(folder / "m.safetensors")
    stop = min(start + n, 23)
    scaled = Apply(
        "scale", [lazies["a"], lazies["v"]], lazies["a"].spec, lambda x, s: x * s, input_rows=[1, 0]
    ).output()
    whole = Apply("sorted", [lazies["b"]], lazies["b"].spec, lambda x: x.sort(0).values, row_step=None).output()
    expression = add(scaled, whole)
    assert expression.node.row_step is None
    joined = Concat([add(scaled, lazies["b"]), TakeRows(whole, start, stop).output()]).output()
    expected = torch.cat([a * v + b, b.sort(0).values[start:stop]])
    assert torch.equal(in_slices(joined, slice_nbytes), expected)
    assert torch.equal(joined.load(), expected)
    assert torch.equal(expression.load(), a * v + b.sort(0).values)


def test_row_steps_combine(stored):
    _, lazies = stored
    by4 = Apply("by4", [lazies["a"]], lazies["a"].spec, lambda x: x, row_step=4).output()
    packed = Apply("pack", [by4], TensorSpec(DType.F32, (4, 6)), lambda x: x[::6], row_step=6, output_rows=[6])
    assert packed.row_step == 12
    assert [r[0] for r in slice_rows(packed, 1)] == [0, 12]
    assert slice_rows(packed, 1)[-1] == (12, 23)


def test_whole_operands_are_computed_once_a_step(stored):
    tensors, lazies = stored
    calls = []

    def mean(x):
        calls.append(1)
        return x.mean(0)

    mean_node = Apply("mean", [lazies["a"]], lazies["v"].spec, mean, row_step=None, input_rows=[0]).output()
    out = Apply("sub", [lazies["b"], mean_node], lazies["b"].spec, torch.sub, input_rows=[1, 0]).output()
    context = Context()
    pieces = [out.node.evaluate(rows, context)[0] for rows in slice_rows(out.node, 50)]
    assert torch.equal(torch.cat(pieces), tensors["b"] - tensors["a"].mean(0))
    assert len(calls) == 1


def test_specs_and_explanations_need_no_data(stored, monkeypatch):
    from llmkit.tensors.source import SourceFile

    _, lazies = stored
    monkeypatch.setattr(SourceFile, "read_tensor", lambda *_: pytest.fail("data was read"))
    out = add(lazies["a"], lazies["b"].cast(DType.F16).cast(DType.F32))
    assert str(out.spec) == "F32[23, 6]"
    table = NodeTable()
    top = table.add(out)
    assert [table.nodes[i]["op"] for i in table.nodes[top]["inputs"]] == ["read", "cast"]
    assert out.formula().startswith("add(")
    assert len(out.reads()) == 2
    assert out.node.fingerprint() != add(lazies["b"], lazies["a"]).node.fingerprint()
    with pytest.raises(SpecError, match="cannot concat"):
        Concat([lazies["a"], lazies["v"]])
    with pytest.raises(SpecError, match="outside"):
        TakeRows(lazies["a"], 3, 24)
