"""Tensors that share a computation: the same values, whole and in slices, computed once."""

from __future__ import annotations

import torch

from llmkit.tensors.lazy import Apply, Context
from llmkit.tensors.rearrange import view_as
from llmkit.tensors.siblings import siblings
from llmkit.tensors.spec import DType, TensorSpec
from tests.quantization.lazies import held


def test_what_is_shared_is_computed_once_a_slice():
    data, calls = torch.arange(64.0).view(16, 4), []

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(x))
        return x + 1, x.sum(1)

    specs = [TensorSpec(DType.F32, (16, 4)), TensorSpec(DType.F32, (16,))]
    moved, sums = Apply("parts", [held(data)], specs, parts).outputs()
    by_eight = Apply("of 8", [sums], TensorSpec(DType.F32, (2,)), lambda s: s.view(-1, 8).sum(1), row_step=8,
                     output_rows=[8]).output()  # fmt: skip
    constant = Apply("c", [], TensorSpec(DType.F32, (3,)), lambda: torch.ones(3), row_step=1, output_rows=[0]).output()
    alone = held(data * 2)
    named = {"a": view_as(moved, DType.I32, (16, 4)), "b": by_eight, "c": constant, "d": alone}
    found = siblings(named)
    assert found["d"] is alone
    node = found["a"].node
    assert (found["b"].node, found["c"].node, node.n_rows, node.row_step) == (node, node, 16, 8)
    wanted = {"a": (data + 1).view(torch.int32), "b": data.sum(1).view(2, 8).sum(1), "c": torch.ones(3)}
    slices: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    context = Context()
    for rows in ((0, 8), (8, 16)):
        context.next_slice()
        made = node.evaluate(rows, context)
        for name in wanted:
            start, stop = node.output_rows(found[name].index, rows)
            if start < stop:
                slices[name].append(made[found[name].index])
    assert calls == [8, 8]
    for name, tensor in wanted.items():
        assert torch.equal(torch.cat(slices[name]), tensor)
        assert torch.equal(found[name].load(), tensor)
    assert node.peak_nbytes(8) >= 8 * 4 * (4 + 1 + 4)
    assert siblings({"a": moved, "d": alone}) == {"a": moved, "d": alone}
